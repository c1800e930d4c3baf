"""Code and prose in equal parts, from what is installed anyway: python benchmarks/mixed_texts.py FOLDER

Thirty modules of Python's standard library and thirty books of the King James Version, one file each, named so that
they alternate. Pretrained models have seen both; nothing here says what they do on text that they have not.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Annotated

import typer

from softmeet.evaluation.held_out import kjv_works

COUNT = 30
SHORTEST = 12_000


def mixed_texts(folder: Path) -> list[Path]:
    """Write the files, in order; the largest part of each is never used, so they are cut."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    code = [path for path in modules if path.stat().st_size > SHORTEST]
    books = [work for work in kjv_works() if len(work.text) > SHORTEST]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for k in range(COUNT):
        module, book = code[k * len(code) // COUNT], books[k * len(books) // COUNT]
        for part, text in (("a", module.read_text(encoding="utf-8")), ("b", book.text)):
            name = module.stem if part == "a" else book.name.replace(" ", "-")
            written.append(folder / f"{k:02d}{part}-{name}.txt")
            written[-1].write_text(text[:SHORTEST], encoding="utf-8")
    return written


def main(folder: Annotated[Path, typer.Argument()]) -> None:
    """Write sixty files."""
    print(f"{len(mixed_texts(folder))} files in {folder}")


if __name__ == "__main__":
    typer.run(main)
