"""What anybody may rely on in the source: every class has a name of its own, and a function fits a screen."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from count_lines import long_functions

FILES = sorted((Path(__file__).parents[2] / "src" / "softmeet").rglob("*.py"))


def test_no_class_name_stands_twice():
    homes = defaultdict(list)
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(str(file))
    assert len(homes) > 200
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def test_no_function_has_more_than_60_lines_of_code():
    assert not {str(file): found for file in FILES if (found := long_functions(file.read_text()))}


# Where it may be asked whether symbols are bytes, or be known how they are read.
MAKERS = {
    "hf/__init__.py", "hf/byte_modeling.py", "hf/checkpoint.py", "hf/configuration.py",
    "hf/modeling.py", "hf/protocol.py",
}  # fmt: skip
SHOWN = {"cli/check.py", "cli/inspect.py", "hf/inspected.py"}
TEXTS = {"evaluation/byte_harness.py", "members/byte_member.py"}
ASKS = re.compile(r"over_bytes|ByteEnsemble|ByteMember|ByteReader|bytes\.covers")


def test_nothing_above_readers_asks_whether_symbols_are_bytes():
    """But for what makes ensembles, what a user reads, the harness, whose requests are texts, and a former name."""
    root, texts = FILES[0].parent, [(file, file.read_text()) for file in FILES]
    found = {str(file.relative_to(root)) for file, text in texts if ASKS.search(text) and ASKS.search(_code(text))}
    asking = {name for name in found if not name.startswith("readers/")}
    assert asking == MAKERS | SHOWN | TEXTS


def _code(source):
    """A file without its docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)
