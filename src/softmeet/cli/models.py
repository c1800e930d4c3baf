"""``softmeet models``: the GGUF files on this machine, which of them have the same tokens, and indexes of files."""

from __future__ import annotations

import json as writing
import shlex
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softmeet.cli.progress import working
from softmeet.cli.tables import counted, out, print_table
from softmeet.cli.terminal import PlainConsole, harmless
from softmeet.derived import file_of
from softmeet.errors import SoftmeetError
from softmeet.members.files import spelled
from softmeet.members.local_names import FETCH, located
from softmeet.members.member import Member

if TYPE_CHECKING:
    from softmeet.members.local_names import LocalFile


def models(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="FOLDER...", help="Look in these folders, or at these files, too.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    drop: Annotated[str | None, typer.Option(metavar="NAME", help="Remove the index of this name instead.")] = None,
) -> None:
    """List GGUF files on this machine: those of ollama, LM Studio, llama.cpp and Hugging Face's cache.

    All commands take a name of the column "model" for the file; of folders that you name, take the paths below. Files
    with the same letter in the column "tokens" have the same tokens, and are mixed by tokens; others by bytes. Those
    for chat have a template for it. Below are the indexes of files that were named as files:PATH.

    Example: softmeet models
    """
    console = out()
    if drop is not None:
        _drop_index(console, drop)
        return
    with working("looking for GGUF files"):
        from softmeet.members.local_names import local_files

        found = local_files(folders)
    rows: list[dict[str, Any]] = [
        {
            "model": one.name, "from": one.source, "kind": one.said.architecture if one.said else "broken",
            "bytes": one.said.size if one.said else one.path.stat().st_size, "tokens": one.tokens,
            "context": one.said.context if one.said else None, "chat": bool(one.said and one.said.template),
            "path": str(one.path),
        }
        for one in found
    ]  # fmt: skip
    kept = _index_rows()
    if json:
        typer.echo(writing.dumps([*rows, *kept], indent=1))
        return
    if rows:
        _print_models(console, rows, found)
    else:
        console.print(f"No GGUF file was found: {FETCH}; or name a folder, as in softmeet models ~/models")
    _print_indexes(console, kept)


def _print_models(console: PlainConsole, rows: list[dict[str, Any]], found: list[LocalFile]) -> None:
    """Print the rows of files as a table, where each is, and a pair that is mixed by tokens."""
    cells = [
        [row["model"], row["from"], row["kind"], f"{row['bytes'] / 1e6:,.0f}", str(row["context"] or ""),
         "chat" if row["chat"] else "", row["tokens"]]
        for row in rows
    ]  # fmt: skip
    print_table(console, ("model", "from", "kind", "MB", "context", "for", "tokens"), [cells], texts=(0, 1, 2, 5, 6))
    for row, one in zip(rows, found, strict=True):
        typer.echo(harmless(f"{row['model']}: {row['path'] if one.said else one.why}"))
    letters = [one.tokens for one in found if one.said]
    first = next((one for one in found if letters.count(one.tokens) > 1), None)
    pair = [_typed(one) for one in found if one.said and (first is None or one.tokens == first.tokens)][:2]
    if len(pair) == 2:
        console.print("Models of one letter are mixed by tokens, others by bytes, as in:")
        typer.echo(harmless(f"softmeet chat {shlex.join(pair)}"))


def _typed(one: LocalFile) -> str:
    """Return what a file can be called as a member: its name, or its path where the name does not lead to it."""
    with suppress(SoftmeetError):
        if Path(located(Member.of(one.name)).source) == one.path:
            return one.name
    return str(one.path)


def _index_rows() -> list[dict[str, Any]]:
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


def _print_indexes(console: PlainConsole, rows: list[dict[str, Any]]) -> None:
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


def _drop_index(console: PlainConsole, name: str) -> None:
    """Remove an index, and say of what it was.

    Raises:
        InvalidInputError: if there is none of this name, or the disk does not let us.
    """
    from softmeet.readers.files.index import drop

    row = next((row for row in _index_rows() if row["name"] == name), None)
    drop(file_of("files"), name)
    if row is not None:
        of = " ".join(row["paths"]) or "files that are not known any more"
        console.print(
            f"Dropped the index of {of} ({counted(row['files'], 'file')}, {row['bytes'] / 1e6:,.1f} MB).",
            soft_wrap=True,
        )
