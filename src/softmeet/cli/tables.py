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
_TEXT = 12


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
    table = _table(columns, sections, texts)
    if console.measure(table, options=console.options.update(max_width=_PIPE)).maximum > console.width:
        titles = [name.replace(" ", "\n").replace("/", "/\n") for name in columns]
        needed = [_needed(k, titles[k], sections, k in texts) + 1 for k in range(len(columns))]
        kept = [k for k in range(len(columns)) if k != optional or sum(needed) <= console.width]
        table = _table(
            [titles[k] for k in kept],
            [[[row[k] for k in kept] for row in rows] for rows in sections],
            [place for place, k in enumerate(kept) if k in texts],
            unbroken=sum(needed[k] for k in kept) <= console.width,
        )
        table.box, table.padding, table.pad_edge = None, (0, 1, 0, 0), False
        if len(kept) < len(columns):
            table.caption = f"a wider terminal, or a pipe, shows one more column: {columns[optional or 0]}"
            table.caption_justify = "left"
    table.title, table.title_justify = title, "left"
    console.print(table)


def _table(
    columns: Sequence[str], sections: Sequence[Sequence[Sequence[str]]], texts: Sequence[int], *, unbroken: bool = True
) -> Table:
    table = Table()
    for k, name in enumerate(columns):
        number = k not in texts
        table.add_column(name, overflow="fold", no_wrap=number and unbroken, justify="right" if number else "left")
    for rows in sections:
        for row in rows:
            table.add_row(*map(escape, row))
        table.add_section()
    return table


def _needed(k: int, title: str, sections: Sequence[Sequence[Sequence[str]]], text: bool) -> int:
    """Return how many characters column ``k`` needs: of a text at most twelve, which is then broken."""
    longest = max((len(row[k]) for rows in sections for row in rows), default=0)
    return max(min(longest, _TEXT) if text else longest, *map(len, title.split("\n")))
