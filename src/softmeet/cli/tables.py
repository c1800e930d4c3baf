"""Tables and sentences on stdout that lose no name and no number, however narrow the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# In a pipe nothing has to fit: no line is broken.
_PIPE = 1000
# A column of texts is readable from so many characters on.
_TEXT = 8
# Names are hardly ever longer.
_NAME = 20


def out() -> Console:
    """Return a console for stdout, as wide as the terminal or ``$COLUMNS``; without either, it breaks no lines."""
    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if fits else _PIPE)


def print_table(
    console: Console,
    columns: Sequence[str],
    sections: Sequence[Sequence[Sequence[str]]],
    *,
    title: str | None = None,
    texts: Sequence[int] = (0,),
    optional: int | None = None,
) -> None:
    """Print a table; if it is too wide, its frame goes first, then texts are broken, and numbers last.

    Args:
        console: prints it.
        columns: the columns' titles, which may be broken at spaces and slashes.
        sections: groups of rows, with a line between groups; each row has a cell for each column.
        title: stands above the table.
        texts: the numbers of the columns that hold texts, from 0; the others hold numbers, which are not broken.
        optional: the number of a column that is left out, with a note, if too little room is left for it.
    """
    framed, widths = _layout(console.width, columns, sections, texts, optional)
    table = Table(title=title, title_justify="left")
    if not framed:
        table.box, table.padding, table.pad_edge = None, (0, 1, 0, 0), False
    for k, width in widths.items():
        name = columns[k] if (width or 0) >= len(columns[k]) else columns[k].replace("/", "/\n")
        table.add_column(name, justify="left" if k in texts else "right", width=width, overflow="fold")
    for rows in sections:
        for row in rows:
            table.add_row(*(escape(row[k]) for k in widths))
        table.add_section()
    console.print(table)
    if len(widths) < len(columns):
        console.print(f'A wider terminal, or a pipe, shows one more column: "{columns[optional or 0]}".', markup=False)


def _layout(
    room: int, columns: Sequence[str], sections: Sequence[Sequence[Sequence[str]]], texts: Sequence[int],
    optional: int | None,
) -> tuple[bool, dict[int, int | None]]:  # fmt: skip
    """Return whether a table has a frame in so much room, and the widths of its columns; None for a number to break."""
    needed = [_needed(k, name, sections, k in texts) for k, name in enumerate(columns)]
    # The frame goes before names are broken; long texts may be broken within a frame.
    whole = [min(_longest(k, "", sections), _NAME) if k in texts else 0 for k in range(len(columns))]
    framed = sum(map(max, needed, whole)) + 3 * len(columns) + 1 <= room
    kept = [k for k in range(len(columns)) if k != optional or sum(needed) + len(columns) <= room]
    if sum(needed[k] + 1 for k in kept) > room:  # titles may be broken within a word, too
        needed = [_needed(k, "", sections, k in texts) for k in range(len(columns))]
    room -= sum(needed[k] for k in kept) + (3 * len(kept) + 1 if framed else len(kept))
    widths: dict[int, int | None] = dict.fromkeys(kept)
    for k in sorted(kept if room >= 0 else (), key=lambda k: k not in texts):  # texts get what room is left, first
        more = min(room, max(_longest(k, columns[k], sections) - needed[k], 0))
        widths[k], room = needed[k] + more, room - more
    return framed, widths


def _needed(k: int, title: str, sections: Sequence[Sequence[Sequence[str]]], text: bool) -> int:
    """Return how many characters column ``k`` needs at the least: a number's are not broken, a text's may be."""
    longest = _longest(k, "", sections)
    return max(min(longest, _TEXT) if text else longest, *map(len, title.replace("/", "/ ").split() or [""]))


def _longest(k: int, title: str, sections: Sequence[Sequence[Sequence[str]]]) -> int:
    """Return the length of the longest of a title and the cells of column ``k``."""
    return max([len(title), *(len(row[k]) for rows in sections for row in rows)])
