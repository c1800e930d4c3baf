"""What was read of each file of an index."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Entry(NamedTuple):
    """What was read of a file.

    Attributes:
        path: the file, absolute.
        size: in bytes.
        modified, changed: the times of its last change, and of that of what the disk keeps of it (which no program can
            set back), in nanoseconds; the first is -1 if it may have changed since then.
        sha256: of its bytes, in hexadecimal.
        symbols: how many it has; -1 of what is no text.
    """

    path: str
    size: int
    modified: int
    changed: int
    sha256: str
    symbols: int

    def is_as(self, state: os.stat_result) -> bool:
        """Return whether the file's size and times are still the same."""
        return (self.size, self.modified, self.changed) == (state.st_size, state.st_mtime_ns, state.st_ctime_ns)


class Entries:
    """The entries of many files in a fifth of the memory that tuples take: a folder may have a million files.

    Example:
        >>> found = Entries([Entry("/a.txt", 3, 1, 1, "ab" * 32, 3), Entry("/b.bin", 9, 1, 1, "cd" * 32, -1)])
        >>> len(found), found[1].path, found.symbols.tolist()
        (2, '/b.bin', [3, -1])
        >>> found.find("/b.bin") == found[1], found.find("/c.txt")
        (True, None)
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        paths = [os.fsencode(entry.path) for entry in entries]
        self._ends = np.cumsum([0, *map(len, paths)])
        self._paths, self._hashes = b"".join(paths), b"".join(bytes.fromhex(entry.sha256) for entry in entries)
        numbers = [(entry.size, entry.modified, entry.changed, entry.symbols) for entry in entries]
        self._numbers = np.array(numbers, np.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, k: int) -> Entry:
        k = range(len(self))[k]
        path, sha256 = self._paths[self._ends[k] : self._ends[k + 1]], self._hashes[32 * k : 32 * k + 32]
        size, modified, changed, symbols = self._numbers[k].tolist()
        return Entry(os.fsdecode(path), size, modified, changed, sha256.hex(), symbols)

    def __iter__(self) -> Iterator[Entry]:
        return map(self.__getitem__, range(len(self)))

    def find(self, path: str) -> Entry | None:
        """Return the entry of a file, if there is one; they are sorted by path."""
        k = bisect_left(range(len(self)), path, key=lambda one: self[one].path)
        return self[k] if k < len(self) and self[k].path == path else None

    @property
    def symbols(self) -> npt.NDArray[np.int64]:
        """(files,) int64, how many symbols each file has; -1 of what is no text."""
        return self._numbers[:, 3]
