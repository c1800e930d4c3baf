"""Write the figures on pages from the results that benchmarks leave: make figures, or python tools/update_figures.py.

A result is what a benchmark's ``--json benchmarks/results/NAME.json`` leaves: rows of figures, with the command, the
date and the machine. Which sentence of a page shows which figure is said in docs/figures.yml, by page: the sentence, or
as much of it as stands on that page once, with the figure's name in braces:

    README.md:
      - >-
        `meet` takes {NAME[WHICH].COLUMN:FORMAT} calls

WHICH picks the row, by text that stands in a cell of it or by COLUMN=VALUE, with semicolons between several; without
[WHICH] the figure is one of the whole result, such as its date. A table has, in its first comment, a template of a row;
the header is written by hand, and all below it is made, with a line that says by which command:

    <!-- figures: NAME
    | {rule:code} | {calls a token:.0f} | -->
    | rule | calls a token |
    |---|---|
    | `meet` | 365 |
    <!-- end -->

Several results, each with its [WHICH] or without, are written one below the other: ``figures: NAME + OTHER[WHICH]``.
FORMAT is Python's (``.2f``, ``.3g``, ``.0%``), or ``code``. Text is written as it is, a cell without its figure empty.

The benchmarks are not run. Behind each result stands the command that measures it again; one that is *transcribed* was
typed from a page, and waits for its command.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_OTHERS = ("README.md", "CONTRIBUTING.md", "paper/paper.md")
PAGES = [*(ROOT / name for name in _OTHERS), *sorted((ROOT / "docs").rglob("*.md"))]
# What benchmarks/report.py writes into every result.
NEEDED = ("title", "command", "date", "machine", "rows")

SENTENCES = ROOT / "docs" / "figures.yml"
PLACE = re.compile(r"\{([a-z][\w-]*(?:\[[^\]]*\])?\.[^{}]+)\}")
TABLE = re.compile(
    r"^<!-- figures: (?P<sources>[^\n]+)\n(?P<row>\|[^\n]*\|) -->\n(?P<head>\|[^\n]*\|\n\|[-:|]+\|\n)"
    r"(?P<now>(?:(?!<!--)[^\n]*\n)*)<!-- end -->$",
    re.MULTILINE,
)
OPENED = re.compile(r"<!-- figures:")
SOURCE = re.compile(r"(?P<name>[\w-]+)(?:\[(?P<which>[^\]]*)\])?")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")

_TABLE_FORM = "<!-- figures: NAME, a line | TEMPLATE | -->, a header of two lines, rows, and a line <!-- end -->"

Row = Mapping[str, Any]


class FigureError(ValueError):
    """Says which sentence, table or result is wrong, and what is expected."""


def read(folder: Path = RESULTS) -> dict[str, Row]:
    """Return all results of a folder by name."""
    return {file.stem: _read(file) for file in sorted(folder.glob("*.json"))}


def sentences(file: Path = SENTENCES) -> dict[str, list[str]]:
    """Return the sentences with figures of each page, by its path from the root of the repository."""
    found: dict[str, list[str]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    if gone := [name for name in found if not (ROOT / name).exists()]:
        raise FigureError(f"{file.name} names {gone[0]}, which is no file")
    return found


def updated(page: str, results: Mapping[str, Row], told: Sequence[str] = ()) -> str:
    """Return a page with every figure of its tables, and of the sentences ``told``, as the results have it."""
    known = {match.start() for match in TABLE.finditer(page)}
    for opened in OPENED.finditer(page):
        if opened.start() not in known:
            raise FigureError(f"line {_line(page, opened)}: expected {_TABLE_FORM}")
    page = TABLE.sub(lambda match, page=page: _told(page, match, results), page)  # type: ignore[misc]
    for sentence in told:
        page = _filled(page, sentence, results)
    return page


def _filled(page: str, sentence: str, results: Mapping[str, Row]) -> str:
    """Return a page in which a sentence has its figures."""
    parts = PLACE.split(sentence)
    if len(parts) < 3 or not all(parts[::2]):
        raise FigureError(f"expected a sentence with {{NAME[WHICH].COLUMN}} between words of it, got {sentence!r}")
    # Behind the point of a sentence there is no digit, as there is behind that of a number.
    form = ".{1,80}?".join(re.escape(part) + r"(?!\d)" * part.endswith((".", ",")) for part in parts[::2])
    found = [*re.finditer(form, page)]
    if len(found) != 1:
        raise FigureError(
            f"{sentence!r} stands there {len(found)} times, expected once: reword it in {SENTENCES.name} as on the page"
        )
    try:
        filled = "".join(figure(part, results) if k % 2 else part for k, part in enumerate(parts))
    except FigureError as error:
        raise FigureError(f"{sentence!r}: {error}") from None
    return page[: found[0].start()] + filled + page[found[0].end() :]


def figure(what: str, results: Mapping[str, Row]) -> str:
    """Return a figure by its name, NAME[WHICH].COLUMN:FORMAT."""
    match = re.fullmatch(rf"({SOURCE.pattern})\.(?P<column>[^:]+)(?::(?P<form>.*))?", what)
    if match is None:
        raise FigureError(f"expected NAME[WHICH].COLUMN:FORMAT, got {what!r}")
    rows = picked(match[1], results) if match["which"] else [results[_known(match["name"], results)]]
    if len(rows) > 1:
        raise FigureError(f"{len(rows)} rows fit {match[1]!r}, expected one; name more of it: [A; COLUMN=VALUE]")
    value: Any = rows[0]
    for part in (match["column"],) if match["which"] else match["column"].split("."):
        value = value[_known(part, value)]
    return written(value, match["form"] or "")


def picked(source: str, results: Mapping[str, Row]) -> list[Row]:
    """Return the rows of NAME, or those of NAME[WHICH]."""
    match = SOURCE.fullmatch(source.strip())
    if match is None:
        raise FigureError(f"expected NAME or NAME[WHICH], got {source!r}")
    rows: list[Row] = results[_known(match["name"], results)]["rows"]
    words = [word.strip() for word in (match["which"] or "").split(";") if word.strip()]
    found = [row for row in rows if all(_has(row, word) for word in words)]
    if not found:
        raise FigureError(f"no row of {match['name']} has {' and '.join(words)}; columns are {', '.join(rows[0])}")
    return found


def written(value: Any, form: str) -> str:
    """Return a value as a page shows it."""
    if isinstance(value, list):
        return ", ".join(written(each, form) for each in value)
    if form == "code":
        return f"`{value}`"
    if isinstance(value, bool):
        return "yes" if value else "no"
    try:
        return value if isinstance(value, str) else _plain(format(value, form).replace("%", " %"))
    except (TypeError, ValueError) as error:
        raise FigureError(f"{value!r} cannot be written as {form!r}: {error}") from error


def _plain(number: str) -> str:
    """A number without an exponent, or with one as it is written by hand, and without a point at its end."""
    digits, _, power = number.removesuffix(".").partition("e")
    if not power:
        return digits
    return f"{float(number):,.0f}" if int(power) > 0 else f"{digits}·10" + str(int(power)).translate(SUPERSCRIPTS)


def _read(file: Path) -> Row:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    lacking = [field for field in NEEDED if not found.get(field)]
    if lacking:
        raise FigureError(f"{file.name} lacks {', '.join(lacking)}, which a benchmark's --json writes")
    for script in re.findall(r"benchmarks/\w+\.py", found["command"]):
        if not (ROOT / script).exists():
            raise FigureError(f"{file.name} is by {script}, which is no file")
    return found


def _told(page: str, match: re.Match[str], results: Mapping[str, Row]) -> str:
    try:
        return _table(match, results)
    except FigureError as error:
        raise FigureError(f"line {_line(page, match)}: {error}") from None


def _table(match: re.Match[str], results: Mapping[str, Row]) -> str:
    sources = match["sources"].split(" + ")
    rows = [row for source in sources for row in picked(source, results)]
    columns = {column for row in rows for column in row}
    for column, _ in FIELD.findall(match["row"]):
        _known(column, columns)
    if match["row"].count("|") != match["head"].partition("\n")[0].count("|"):
        raise FigureError("the template of a row has not as many cells as the header")
    cells = [[_cell(cell, row) for cell in match["row"].strip("|").split("|")] for row in rows]
    lines = "".join(f"|{'|'.join(line)}|\n" for line in cells)
    opening = f"<!-- figures: {match['sources']}\n{match['row']} -->\n{match['head']}"
    return f"{opening}{lines}\n{_origin(sources, results)}\n<!-- end -->"


def _cell(template: str, row: Row) -> str:
    if any(row.get(column) is None for column, _ in FIELD.findall(template)):
        return " "
    return FIELD.sub(lambda match: written(row[match[1]], match[2] or ""), template)


def _origin(sources: list[str], results: Mapping[str, Row]) -> str:
    """The line below a table: by which commands, when and where."""
    homes: dict[str, dict[str, None]] = {}
    for source in sources:
        result = results[SOURCE.match(source.strip())["name"]]  # type: ignore[index]
        homes.setdefault(f"{result['date']}, {result['machine']}", {})[f"`{result['command']}`"] = None
    return "\n\n".join(_by(home, [*commands]) for home, commands in homes.items())


def _by(home: str, commands: list[str]) -> str:
    return f"{commands[0]} ({home})." if len(commands) == 1 else "\n- ".join([f"{home}:\n", *commands])


def _has(row: Row, word: str) -> bool:
    column, equals, value = word.partition("=")
    if not equals or column.strip() not in row:
        return any(cell == word for cell in row.values() if isinstance(cell, str))
    cell = row[column.strip()]
    return value.strip() in (str(cell), f"{cell:g}" if isinstance(cell, float) else "")


def _known(name: str, names: Any) -> str:
    if name in names:
        return name
    near = get_close_matches(name, names, 1)
    raise FigureError(f"nothing is named {name!r}; " + (f"did you mean {near[0]!r}?" if near else _listed(names)))


def _listed(names: Any) -> str:
    return f"there are {', '.join(names)}" if names else f"{RESULTS.relative_to(ROOT)} is empty"


def _line(page: str, match: re.Match[str]) -> int:
    return page.count("\n", 0, match.start()) + 1


def main(*, check: bool) -> int:
    """Rewrite the pages, or with ``check`` only say which differ; return the exit status."""
    results, told, differ = read(), sentences(), []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        try:
            new = updated(text, results, told.get(page.relative_to(ROOT).as_posix(), ()))
        except FigureError as error:
            raise FigureError(f"{page.relative_to(ROOT)}, {error}") from None
        if new != text:
            differ.append(page.relative_to(ROOT))
            if not check:
                page.write_text(new, encoding="utf-8")
    for path in differ:
        print(f"{'differs' if check else 'written'}: {path}")
    if not check:
        print("Every page shows what benchmarks/results holds. To measure a result again, on an idle machine:")
        for name, result in results.items():
            typed = ", transcribed" if result.get("transcribed") else ""
            print(f"  {name} ({result['date']}{typed}):\n    {result['command']} --json benchmarks/results/{name}.json")
    return 1 if check and differ else 0


if __name__ == "__main__":
    try:
        sys.exit(main(check="--check" in sys.argv[1:]))
    except FigureError as error:
        sys.exit(str(error))
