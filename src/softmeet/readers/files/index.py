"""The index of files: their symbols, and the places of these sorted by the text that ends there."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from softmeet.extras import require_extra
from softmeet.readers.files.corpus import Texts

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
Progress = Callable[[str, int, int], None]
Symbols = npt.NDArray[np.int32]


class Entry(NamedTuple):
    """A file as it was read: its path, bytes, time of change in ns, SHA-256 and symbols (-1 of what is no text)."""

    path: str
    size: int
    modified: int
    sha256: str
    symbols: int


def _silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, eq=False)
class Index:
    """The index of files.

    Attributes:
        symbols: (n,) int32, the files' symbols one file behind the other, each followed by the separator ``size``.
        order: (n,) int32, the positions of ``symbols`` sorted by the text that ends there, read backwards. So all
            places where one context ends are one interval, and that of a longer context lies within it.
        entries: each file that was read, sorted by path.
        left_out: how many files were left out, by the reason.
    """

    symbols: Symbols
    order: Symbols
    entries: tuple[Entry, ...]
    left_out: dict[str, int]

    @classmethod
    def of(
        cls,
        texts: Texts,
        encode: Encode,
        size: int,
        key: str,
        folder: Path | None,
        on_progress: Progress = _silent,
    ) -> Index:
        """Return the index of some files: as it is kept, or made anew where a file has changed.

        Args:
            texts: the files.
            encode: turns several texts into their symbols, each from 0 to ``size - 1``.
            size: the number of symbols.
            key: names what encodes, such that the indexes of two tokenizers are two.
            folder: where indexes are kept; None to keep this one in memory alone.
            on_progress: called with what is done (``"reading"``, ``"sorting"``), how much, and of how much.
        """
        require_extra("an index of files", "files", "pydivsufsort")
        entries, symbols = [], array("i")
        for path in texts.files:
            content, state = path.read_bytes(), path.stat()
            own = list(encode([content.decode()])[0])
            symbols.extend([*own, size])
            with path.open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
            entries.append(Entry(str(path), state.st_size, state.st_mtime_ns, digest, len(own)))
        found = np.frombuffer(symbols, np.int32) if symbols else np.empty(0, np.int32)
        return cls(found, in_order(found), tuple(entries), texts.left_out)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The path of each file that is a text."""
        return tuple(Path(entry.path) for entry in self.entries if entry.symbols >= 0)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """(files,) int64, the position of each file's first symbol (of its separator, if it is empty)."""
        lengths = [entry.symbols + 1 for entry in self.entries if entry.symbols >= 0]
        return np.array([*accumulate(lengths, initial=0)][:-1], np.int64)

    def place(self, position: int) -> tuple[Path, int]:
        """Return the file that a position of ``symbols`` is in, and the position of that file's first symbol."""
        which = int(np.searchsorted(self.starts, position, "right")) - 1
        return self.files[which], int(self.starts[which])

    def line(self, position: int, decode: Callable[[Sequence[int]], bytes]) -> int:
        """Return the line, from 1, in which the symbol at a position begins; ``decode`` makes bytes of symbols."""
        _, start = self.place(position)
        return 1 + decode(self.symbols[start:position].tolist()).count(b"\n")

    def is_stale(self, path: Path) -> bool:
        """Return whether a file is gone, or holds something else than when it was read."""
        raise NotImplementedError


@dataclass(frozen=True)
class Kept:
    """An index on the disk: its name, what it is of, and how large it is.

    Attributes:
        name: by which it is dropped.
        paths, include: what was asked for.
        files, symbols: how many it has.
        bytes: how many it takes of the disk.
        time: when it was made, in seconds since 1970.
    """

    name: str
    paths: tuple[str, ...]
    include: str | None
    files: int
    symbols: int
    bytes: int
    time: float


def indexes(folder: Path) -> list[Kept]:
    """Return the indexes that are kept in a folder, sorted by their paths."""
    raise NotImplementedError


def drop(folder: Path, which: str) -> None:
    """Remove an index from a folder, by its name."""
    raise NotImplementedError


def in_order(symbols: Symbols) -> Symbols:
    """Return the positions of symbols, sorted by the text that ends there, read backwards.

    Example:
        >>> in_order(np.array([1, 0, 1, 2], np.int32)).tolist()
        [1, 0, 2, 3]
    """
    from pydivsufsort import divsufsort

    n = len(symbols)
    if not n:
        return np.empty(0, np.int32)
    present = np.zeros(int(symbols.max()) + 1, np.uint32)
    present[symbols] = 1
    # What sorts sorts bytes: each symbol is its rank among those that occur, in as few bytes as will do.
    ranks = (np.cumsum(present, dtype=np.uint32) - 1)[symbols[::-1]]
    width = 1 if (count := int(present.sum())) <= 1 << 8 else 2 if count <= 1 << 16 else 3
    spelt = np.empty((n, width), np.uint8)
    for k in range(width):
        spelt[:, k] = ranks >> (8 * (width - 1 - k)) & 0xFF
    found, order, done = divsufsort(spelt.ravel()), np.empty(n, np.int32), 0
    for start in range(0, len(found), 1 << 24):
        piece = found[start : start + (1 << 24)]
        whole = piece[piece % width == 0]  # the others begin amid a symbol
        order[done : done + len(whole)] = n - 1 - whole // width
        done += len(whole)
    return order
