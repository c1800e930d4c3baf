"""Read the text to evaluate on, from files, stdin and saved datasets, as documents.

Intervals are clustered by document, and no window crosses a document's end. A file is one document unless a separator
splits it; each row of a dataset is one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

from softmeet.errors import InvalidInputError
from softmeet.extras import install_line


@dataclass(frozen=True)
class Document:
    """A named text, on which members are evaluated.

    Attributes:
        name: of a file its path, followed by ``#k`` for part k (from 0) of a file that is split; of a dataset's row k
            ``FOLDER[k]``.
        text: its contents.
    """

    name: str
    text: str


def read_documents(
    sources: Sequence[str | Path], *, separator: str | None = None, column: str = "text"
) -> list[Document]:
    """Read the documents of all sources, in order.

    Args:
        sources: UTF-8 files, patterns such as ``books/*.txt``, ``-`` for stdin, or folders written by
            ``datasets.save_to_disk``.
        separator: the string between documents in a file, such as ``---``; parts without text are left out. None if
            each file is one document.
        column: the column of a dataset that holds the text.

    Raises:
        InvalidInputError: if there is no source, or a source is empty, is not UTF-8, is a pattern without files, or is
            a folder but not an intact dataset with a string in every row of ``column``, not all of them blank (blank
            ones are left out); or if the package ``datasets``, which reads folders, is not installed.
        OSError: if a file cannot be read.
    """
    found: list[Document] = []
    for source in (each for pattern in sources for each in _matching(pattern)):
        path = Path(source)
        if str(source) == "-":
            found += _split("stdin", sys.stdin.buffer.read(), separator)
        elif path.is_dir():
            found += _dataset(path, column)
        else:
            found += _split(str(source), path.read_bytes(), separator)
    if not found:
        raise InvalidInputError("expected a text: name a file, - for stdin, or a saved dataset")
    return found


def _matching(pattern: str | Path) -> list[str | Path]:
    """Return the files that a pattern in a file name matches, sorted; else the source itself, in a list."""
    path = Path(pattern)
    if path.exists() or not has_magic(path.name):
        return [pattern]
    if not (files := sorted(path.parent.glob(path.name))):
        raise InvalidInputError(f"expected files that fit {str(pattern)!r}, found none")
    return [*files]


def decode_utf8(name: str, data: bytes) -> str:
    """Decode UTF-8, without a byte order mark; ``name`` says in the error where the bytes are from.

    Raises:
        InvalidInputError: if the bytes are not UTF-8; it says where.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidInputError(
            f"expected UTF-8 in {name}, but byte {error.start} (line {line}) is not: convert it first, for "
            "instance with iconv -f latin1 -t utf-8"
        ) from None


def _split(name: str, data: bytes, separator: str | None) -> list[Document]:
    """Return the documents of a file with the contents ``data``."""
    if not data.strip():
        raise InvalidInputError(f"expected text in {name}, but it is empty")
    text = decode_utf8(name, data)
    parts = [part for part in text.split(separator) if part.strip()] if separator else []
    return [Document(f"{name}#{k}", part) for k, part in enumerate(parts)] if len(parts) > 1 else [Document(name, text)]


def _load_dataset(folder: Path) -> Any:
    try:
        from datasets import DatasetDict, load_from_disk
        from pyarrow import ArrowInvalid
    except ImportError:
        raise InvalidInputError(
            f"{folder} is a folder, which is read as a dataset: name the files in it, or install the package datasets: "
            f"{install_line('eval')}"
        ) from None
    try:
        data = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        if isinstance(error, ArrowInvalid) or not isinstance(error, FileNotFoundError | ValueError):
            raise InvalidInputError(f"the dataset in {folder} is damaged ({error}): save it again") from None
        raise InvalidInputError(
            f"expected a file, or a dataset written by datasets.save_to_disk, got the folder {folder}: name its files, "
            f"as in '{folder}/*.txt'"
        ) from None
    if isinstance(data, DatasetDict):
        raise InvalidInputError(f"{folder} holds several splits: name one of {', '.join(map(str, data))} inside it")
    return data


def _dataset(folder: Path, column: str) -> list[Document]:
    data, rows = _load_dataset(folder), []
    if column not in data.column_names:
        raise InvalidInputError(
            f"{folder} has no column {column!r}: expected one of {', '.join(data.column_names)} (--column)"
        )
    for k, text in enumerate(data[column]):
        if not isinstance(text, str):
            raise InvalidInputError(
                f"expected text in every row of {column!r} in {folder}, but row {k} holds {text!r:.40}: leave such "
                "rows out, for instance with datasets' filter"
            )
        if text.strip():
            rows.append(Document(f"{folder.name}[{k}]", text))
    if not rows:
        raise InvalidInputError(f"expected text in {folder}, but every row of {column!r} is empty")
    return rows
