"""Tables and sentences on stdout that lose no name and no number, however narrow the terminal."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from softmeet.cli.terminal import PlainConsole, harmless
from softmeet.members.member import short
from softmeet.rules.settings import rule_of

# In a pipe nothing has to fit: no line is broken.
_PIPE = 1000
# Names are hardly ever longer; a longer text may be broken.
_NAME = 20


def out() -> PlainConsole:
    """Return a console for stdout, as wide as the terminal or ``$COLUMNS``; without either, it breaks no lines.

    It prints brackets as they are, since names and texts may hold some.
    """
    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    return PlainConsole(width=None if fits else _PIPE)


def print_table(
    console: Console,
    columns: Sequence[str],
    sections: Sequence[Sequence[Sequence[str]]],
    *,
    title: str | None = None,
    texts: Sequence[int] = (0,),
    optional: int | None = None,
) -> None:
    """Print a table; without a frame where there is no room for it, and line by line where a name would be broken.

    Args:
        console: prints it.
        columns: the columns' titles, which may be broken at spaces and slashes.
        sections: groups of rows, with a line between groups; each row has a cell for each column.
        title: stands above the table.
        texts: the numbers of the columns that hold texts, from 0; the others hold numbers, which are not broken.
        optional: the number of a column that is left out, with a note, if too little room is left for it.
    """
    sections = [[[harmless(cell) for cell in row] for row in rows] for rows in sections]
    needed = [_needed(k, name, sections, k in texts) for k, name in enumerate(columns)]
    kept = [k for k in range(len(columns)) if k != optional or sum(needed) + len(columns) <= console.width]
    if sum(needed[k] + 1 for k in kept) > console.width:
        _print_lines(console, columns, sections, title)
        return
    framed = sum(needed) + 3 * len(columns) + 1 <= console.width
    table = Table(title=title, title_justify="left")
    if not framed:
        table.box, table.padding, table.pad_edge = None, (0, 1, 0, 0), False
    room = console.width - sum(needed[k] for k in kept) - (3 * len(kept) + 1 if framed else len(kept))
    more = {}
    for k in sorted(kept, key=lambda k: k not in texts):  # texts get what room is left, first
        more[k] = min(room, max(_longest(k, columns[k], sections) - needed[k], 0))
        room -= more[k]
    for k in kept:
        width = needed[k] + more[k]
        name = columns[k] if width >= len(columns[k]) else columns[k].replace("/", "/\n")
        table.add_column(name, justify="left" if k in texts else "right", width=width, overflow="fold")
    for rows in sections:
        for row in rows:
            table.add_row(*(Text(row[k]) for k in kept))
        table.add_section()
    console.print(table)
    if len(kept) < len(columns):
        console.print(f'A wider terminal, or a pipe, shows one more column: "{columns[optional or 0]}".')


def _print_lines(
    console: Console, columns: Sequence[str], sections: Sequence[Sequence[Sequence[str]]], title: str | None
) -> None:
    """Print each row as its first cell, and below it a line with title and cell for every other column."""
    if title:
        console.print(title, style="italic")
    for row in (row for rows in sections for row in rows):
        console.print(row[0], style="bold", highlight=False, soft_wrap=True)
        for name, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                console.print(f"  {name}: {cell}", highlight=False)


def _needed(k: int, title: str, sections: Sequence[Sequence[Sequence[str]]], text: bool) -> int:
    """Return how many characters column ``k`` needs at the least: numbers and names are not broken, long texts are."""
    longest = _longest(k, "", sections)
    return max(min(longest, _NAME) if text else longest, *map(len, title.replace("/", "/ ").split() or [""]))


def _longest(k: int, title: str, sections: Sequence[Sequence[Sequence[str]]]) -> int:
    """Return the length of the longest of a title and the cells of column ``k``."""
    return max([len(title), *(len(row[k]) for rows in sections for row in rows)])


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 sequence`` or ``64 sequences``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def number(x: float, form: str) -> str:
    """Return a number in a format such as ``.4f``, with ∞ for infinity."""
    return format(x, form).replace("inf", "∞")


def difference(mean: float, interval: Sequence[float]) -> str:
    """Return a difference with half its interval, as a cell; by itself if the interval has no bounds."""
    low, high = interval
    return number(mean, "+.4f") + (f" ± {(high - low) / 2:.4f}" if math.isfinite(high - low) else "")


def candidate(name: str, facts: Mapping[str, Any], *figures: str) -> tuple[str, ...]:
    """Return the row of what was fitted: its name, figures, weights, trusts if its rule has them, and temperature."""
    weights, trust = (" ".join(f"{x:.2f}" for x in facts[key]) for key in ("weights", "trust"))
    shown = short(name) if "/" in name else name
    return (
        shown,
        *figures,
        weights,
        trust if rule_of(facts["rule"]).uses_trust else "",
        f"{facts['rule_temperature']:.2f}",
    )
