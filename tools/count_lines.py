"""Count the lines of code of the sources and of the tests, room by room.

    python tools/count_lines.py              # src/softmeet and tests, by room
    python tools/count_lines.py DIRECTORY    # any other directory

A line of code holds part of a statement that is not a docstring: blank lines, comments and docstrings are left out.
`functions` shows how many functions span more than 60 lines, by the same count.
"""

import ast
import io
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

LONGEST_FUNCTION = 60
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


def span(node: ast.stmt) -> set[int]:
    """Return the numbers of the lines that `node` takes."""
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines.update(span(first))
    return lines


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines of `source` that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(ast.parse(source))


def long_functions(source: str, longest: int = LONGEST_FUNCTION) -> list[tuple[str, int]]:
    """Return the name and the lines of code of each function of `source` with more than `longest` below its head."""
    code = code_lines(source)
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    counted = ((node.name, len(code & set().union(*map(span, node.body)))) for node in functions)
    return [(name, lines) for name, lines in counted if lines > longest]


def print_rooms(directory: Path) -> None:
    """Print the files, the lines of code and all lines of each direct folder of `directory`, and their sum."""
    rooms: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for path in sorted(directory.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        parts = path.relative_to(directory).parts
        counts = (len(code_lines(source)), source.count("\n"), len(long_functions(source)))
        rooms[parts[0] if len(parts) > 1 else "."].append(counts)
    print(f"{directory}\n  {'room':<14}{'files':>7}{'code':>8}{'lines':>8}{'functions':>11}")
    everything = [counts for room in rooms.values() for counts in room]
    for name, files in [*sorted(rooms.items()), ("all", everything)]:
        code, lines, functions = (sum(column) for column in zip(*files, strict=True))
        print(f"  {name:<14}{len(files):>7}{code:>8}{lines:>8}{functions:>11}")


if __name__ == "__main__":
    for argument in sys.argv[1:] or ("src/softmeet", "tests"):
        print_rooms(Path(argument))
