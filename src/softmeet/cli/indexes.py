"""The indexes of files that are kept on this machine: what ``softmeet models`` lists below the models, and drops."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from softmeet.cli.tables import counted, print_table
from softmeet.cli.terminal import PlainConsole
from softmeet.derived import file_of
from softmeet.members.files import spelled


def index_rows() -> list[dict[str, Any]]:
    """Return a row for each index, with the keys that models' rows have, too, and ``model`` None."""
    from softmeet.readers.files.index import indexes

    where = file_of("files")
    return [
        {
            "model": None, "from": "softmeet", "kind": "index", "bytes": one.bytes, "tokens": "", "context": None,
            "chat": False, "path": str(where / one.name), "name": one.name,
            "paths": [*map(spelled, one.paths)],
            "include": one.include, "files": one.files, "symbols": one.symbols,
            "time": datetime.fromtimestamp(one.time).astimezone().isoformat(timespec="seconds"),
        }
        for one in indexes(where)
    ]  # fmt: skip


def print_indexes(console: PlainConsole, rows: list[dict[str, Any]]) -> None:
    """Print the rows of indexes as a table, and how one is dropped; nothing if there are none."""
    if not rows:
        return
    cells = [
        [row["name"], " ".join(row["paths"]) or "(unfinished, damaged or of another version)", row["include"] or "",
         f"{row['files']:,}", f"{row['symbols']:,}", f"{row['bytes'] / 1e6:,.1f}", row["time"][:16].replace("T", " ")]
        for row in rows
    ]  # fmt: skip
    columns = ("index", "files:", "include", "files", "symbols", "MB", "made")
    print_table(console, columns, [cells], texts=(0, 1, 2, 6))
    console.print(
        f"softmeet models --drop {rows[0]['name']} removes an index; where it is asked for, it is made anew.",
        soft_wrap=True,
    )


def drop_index(console: PlainConsole, name: str) -> None:
    """Remove an index, and say of what it was.

    Raises:
        InvalidInputError: if there is none of this name, or the disk does not let us.
    """
    from softmeet.readers.files.index import drop

    row = next((row for row in index_rows() if row["name"] == name), None)
    drop(file_of("files"), name)
    if row is not None:
        of = " ".join(row["paths"]) or "files that are not known any more"
        console.print(
            f"Dropped the index of {of} ({counted(row['files'], 'file')}, {row['bytes'] / 1e6:,.1f} MB).",
            soft_wrap=True,
        )
