"""Where indexes of files are kept: a folder for each, with what was read of which file, and the arrays of one version.

A version's arrays are named after what they are of, and written before the list that names them, so that whoever is
killed or short of space at any moment leaves the former version. Each file has its size, its time and its hash, so that
none is used in part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from softmeet.errors import InvalidInputError, nearest


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


_log = logging.getLogger("softmeet")

Symbols = npt.NDArray[np.int32]
# To be raised when other things are kept of the same files.
_FORM = 2
_LIST, _LOCK = "files.json", "lock"
ARRAYS = ("symbols", "order")
# Seconds to wait for another process that makes the same index, before it is made beside that one: 2 GB take a while.
_PATIENCE = 3600.0
# The bytes of an array up to which its hash is looked at, at each start, though its size and time are still the same.
_QUICK = 1 << 25


class KeptArray(NamedTuple):
    """What was written as a file: its SHA-256, in hexadecimal, its bytes, and the time of its last change."""

    sha256: str
    size: int
    modified: int


@dataclass(frozen=True)
class KeptIndex:
    """An index on the disk.

    Attributes:
        name: the one by which it is dropped.
        paths, include: what it was asked for; no paths if its list is not there yet, damaged, or another version's.
        files, symbols: how many it has.
        bytes: how many it takes.
        time: when it was made, in seconds since 1970.
    """

    name: str
    paths: tuple[str, ...]
    include: str | None
    files: int
    symbols: int
    bytes: int
    time: float


class Former:
    """What a list says: what was read of each file, and the arrays made of it."""

    def __init__(self, folder: Path, said: dict[str, Any]) -> None:
        self.said = said
        self.version: str = said["version"]
        self.entries = tuple(Entry(*entry) for entry in said["entries"])
        self._folder = folder

    def array(self, name: str) -> Symbols | None:
        """Return ``symbols`` or ``order``, mapped from the disk; None if it is damaged or gone."""
        file = self._folder / f"{self.version}.{name}.npy"
        try:
            return _mapped(file, KeptArray(*self.said["arrays"][name]))
        except (OSError, ValueError) as error:
            _log.debug("%s is made anew: %s", file, error)
            return None


@dataclass(frozen=True)
class Shelf:
    """Where one index is kept.

    Attributes:
        folder: its own.
        what: what it is of: the key of its tokenizer, paths, and the glob of their files.
    """

    folder: Path
    what: tuple[str, tuple[str, ...], str | None]

    @classmethod
    def of(cls, folder: Path, key: str, paths: tuple[str, ...], include: str | None) -> Shelf:
        """Return where, among all indexes of a folder, the one of some paths is."""
        name = hashlib.sha256(json.dumps([_FORM, key, paths, include]).encode()).hexdigest()[:16]
        return cls(folder / name, (key, paths, include))

    @contextmanager
    def alone(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Keep other processes from making the same index meanwhile, where the disk lets us.

        Args:
            on_wait: called if another process makes it.
        """
        lock = FileLock(self.folder / _LOCK)
        with suppress(OSError):
            self.made()
            try:
                lock.acquire(timeout=0)
            except Timeout:
                on_wait()
                lock.acquire(timeout=_PATIENCE)
        try:
            yield
        finally:
            lock.release()

    def made(self) -> Path:
        """Return the folder, which is made if it is not there.

        Raises:
            OSError: if it cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what it holds are texts of the user's
        return self.folder

    def former(self) -> Former | None:
        """Return what is kept; None if nothing is, or its list is damaged."""
        return _read(self.folder)

    def version(self, version: str, former: Former | None) -> Version:
        """Return what a version of the index is put into.

        Args:
            version: the hash of what its arrays are of.
            former: what is kept.
        """
        written = former.said["arrays"] if former is not None and former.version == version else {}
        return Version(self, version, former, dict(written))


@dataclass
class Version:
    """A version of an index that is being made.

    Attributes:
        shelf, version, former: where it is kept, its name, and what was kept before.
        written: what was written of each array.
        error: why it cannot be kept; None if it can.
    """

    shelf: Shelf
    version: str
    former: Former | None
    written: dict[str, KeptArray]
    error: Exception | None = None

    def put(self, name: str, array: Symbols) -> Symbols:
        """Write an array, and return it mapped from the disk; as it is, where the disk does not take it."""
        try:
            if self.error is None:
                file = f"{self.version}.{name}.npy"
                self.written[name] = self._write(file, partial(_save, array))
                return _mapped(self.shelf.folder / file, self.written[name])
        except (OSError, ValueError) as error:
            self.error = error
        return array

    def keep(self, entries: tuple[Entry, ...]) -> None:
        """Keep the version in place of the former one, which stays where the disk did not take this one.

        Args:
            entries: what was read of each file.
        """
        (key, paths, include), stays = self.shelf.what, self.version
        said = {"form": _FORM, "key": key, "paths": list(paths), "include": include, "version": self.version}
        said["arrays"] = {name: list(one) for name, one in self.written.items()}
        try:
            if self.error is not None:
                raise self.error
            former = self.former
            if former is None or former.entries != entries or former.said | said != former.said:
                text = json.dumps({**said, "time": time.time(), "entries": entries}).encode()
                self._write(_LIST, lambda file: file.writelines((_hash(text), b"\n", text)))
        except (OSError, ValueError) as error:
            _log.warning("the index of %s is not kept for the next time: %s", ", ".join(paths), error)
            stays = self.former.version if self.former is not None else "none"
        names = {_LIST, _LOCK, *(f"{stays}.{name}.npy" for name in ARRAYS)}
        with suppress(OSError):
            for file in self.shelf.folder.iterdir():
                if file.name not in names:
                    with suppress(OSError):  # on Windows, while somebody reads it
                        file.unlink()

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> KeptArray:
        """Write a file of the index under its name, once all of it is on the disk."""
        mine = self.shelf.made() / f"{name}.{secrets.token_hex(8)}"
        try:
            with mine.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            found = KeptArray(_sum(mine), (state := mine.stat()).st_size, state.st_mtime_ns)
            mine.replace(self.shelf.folder / name)
        finally:
            with suppress(OSError):
                mine.unlink()
        return found


def indexes(folder: Path) -> list[KeptIndex]:
    """Return the indexes that a folder keeps, sorted by their paths."""
    found = []
    try:
        every = list(folder.iterdir())
    except OSError:  # there is none, or none that we may read
        return []
    for own in every:
        with suppress(OSError):  # one that is dropped meanwhile, or somebody else's
            sizes, made, former = [file.stat().st_size for file in own.iterdir()], own.stat().st_mtime, _read(own)
            said: dict[str, Any] = {"paths": (), "include": None, "time": made} if former is None else former.said
            counts = [entry.symbols for entry in former.entries if entry.symbols >= 0] if former is not None else []
            about = tuple(said["paths"]), said["include"], len(counts), sum(counts)
            if sum(sizes):  # else the disk took nothing
                found.append(KeptIndex(own.name, *about, bytes=sum(sizes), time=said["time"]))
    return sorted(found, key=lambda one: (one.paths, one.name))


def drop(folder: Path, which: str) -> None:
    """Remove an index from a folder; who reads it goes on.

    Args:
        folder: where indexes are kept.
        which: its name.

    Raises:
        InvalidInputError: if there is none of this name, or the disk does not let us.
    """
    known = [one.name for one in indexes(folder)]
    if which not in known:
        there = f"{nearest(which, known)}expected one of {', '.join(known)}" if known else "none is kept"
        raise InvalidInputError(f"no index is named {which!r}: {there}")
    try:
        shutil.rmtree(folder / which)
    except OSError as error:
        raise InvalidInputError(f"the index {which} could not be removed: {error}") from error


def _read(folder: Path) -> Former | None:
    """Return what the list of an index says; None if it is not there, damaged, or of another version's form."""
    try:
        written, _, text = (folder / _LIST).read_bytes().partition(b"\n")
    except OSError:
        return None
    if written != _hash(text) or (said := json.loads(text)).get("form") != _FORM:
        return None
    return Former(folder, said)


def _hash(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _save(array: Symbols, file: BinaryIO) -> None:
    """Write an array as numpy does, whose own errors do not say that a disk is full."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)


def _mapped(file: Path, written: KeptArray) -> Symbols:
    """Map an array from the disk, if it is still what was written.

    Of a large one the hash is looked at where its time is another, as it takes a second for each GB; if it is the same,
    as a copy's, so is its time from then on.

    Raises:
        OSError, ValueError: if it is gone, or damaged.
    """
    state = file.stat()
    timely = state.st_mtime_ns == written.modified
    if state.st_size != written.size or not ((timely and written.size > _QUICK) or _sum(file) == written.sha256):
        raise ValueError("it is not what was written")
    if not timely:
        with suppress(OSError):
            os.utime(file, ns=(state.st_atime_ns, written.modified))
    return np.asarray(np.load(file, mmap_mode="r"))
