"""Where indexes of files are kept: a folder for each, with what was read of which file, and the arrays of one version.

A version's arrays are named after what they are of, and written before the list that names them, so that whoever is
killed or short of space at any moment leaves the former version. Each file has its hash, so that none is used in part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from softmeet.errors import InvalidInputError, nearest

_log = logging.getLogger("softmeet")

Symbols = npt.NDArray[np.int32]
# To be raised when other things are kept of the same files.
_FORM = 1
_LIST, _LOCK = "files.json", "lock"
# Seconds to wait for another process that makes the same index, before it is made beside that one.
_PATIENCE = 600.0


class Entry(NamedTuple):
    """What was read of a file.

    Attributes:
        path: the file, absolute.
        size, modified: in bytes, and the time of its last change in nanoseconds; -1 if it may have changed since then.
        sha256: of its bytes, in hexadecimal.
        symbols: how many it has; -1 of what is no text.
    """

    path: str
    size: int
    modified: int
    sha256: str
    symbols: int

    def is_as(self, state: os.stat_result) -> bool:
        """Return whether the file's size and time are still the same."""
        return (self.size, self.modified) == (state.st_size, state.st_mtime_ns)


@dataclass(frozen=True)
class KeptIndex:
    """An index on the disk.

    Attributes:
        name: the one by which it is dropped.
        paths, include: what it was asked for; no paths if its list is damaged, so that it will be made anew.
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
            return _mapped(file, self.said["sums"][name])
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
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what it holds are texts of the user's
            try:
                lock.acquire(timeout=0)
            except Timeout:
                on_wait()
                lock.acquire(timeout=_PATIENCE)
        try:
            yield
        finally:
            lock.release()

    def former(self) -> Former | None:
        """Return what is kept; None if nothing is, or its list is damaged."""
        return _read(self.folder)

    def keep(
        self, entries: tuple[Entry, ...], version: str, arrays: dict[str, Symbols], former: Former | None
    ) -> dict[str, Symbols]:
        """Keep an index in place of a former one.

        Args:
            entries: what was read of each file.
            version: the hash of what the arrays are of.
            arrays: ``symbols`` and ``order``; those that are mapped from the disk are the former's.
            former: what was kept.

        Returns:
            The arrays, mapped from the disk; as they are, where it does not let us, and then the former stays.
        """
        key, paths, include = self.what
        sums = dict(former.said["sums"]) if former is not None else {}
        try:
            new = [name for name, array in arrays.items() if not isinstance(array.base, np.memmap)]
            for name in new:
                sums[name] = self._write(f"{version}.{name}.npy", partial(np.save, arr=arrays[name]))
            said = {"key": key, "paths": list(paths), "include": include, "version": version, "sums": sums}
            if former is None or former.entries != entries or former.said | said != former.said:
                text = json.dumps({**said, "time": time.time(), "entries": entries}).encode()
                self._write(_LIST, lambda file: file.writelines((_hash(text), b"\n", text)))
            mapped = {name: _mapped(self.folder / f"{version}.{name}.npy", sums[name]) for name in new}
        except (OSError, ValueError) as error:
            _log.warning("the index of %s is not kept for the next time: %s", ", ".join(paths), error)
            mapped, version = {}, former.version if former is not None else "none"
        stays = {_LIST, _LOCK, *(f"{version}.{name}.npy" for name in arrays)}
        with suppress(OSError):
            for file in self.folder.iterdir():
                if file.name not in stays:
                    with suppress(OSError):  # on Windows, while somebody reads it
                        file.unlink()
        return arrays | mapped

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> str:
        """Write a file of the folder under its name once all of it is written, and return its hash."""
        mine = self.folder / f"{name}.{secrets.token_hex(8)}"
        with mine.open("wb") as file:
            write(file)
        found = _sum(mine)
        mine.replace(self.folder / name)
        return found


def indexes(folder: Path) -> list[KeptIndex]:
    """Return the indexes that a folder keeps, sorted by their paths."""
    found = []
    for own in folder.iterdir() if folder.is_dir() else ():
        with suppress(OSError):  # one that is dropped meanwhile, or somebody else's
            sizes, made, former = [file.stat().st_size for file in own.iterdir()], own.stat().st_mtime, _read(own)
            said: dict[str, Any] = {"paths": (), "include": None, "time": made} if former is None else former.said
            counts = [entry.symbols for entry in former.entries if entry.symbols >= 0] if former is not None else []
            about = tuple(said["paths"]), said["include"], len(counts), sum(counts)
            found.append(KeptIndex(own.name, *about, bytes=sum(sizes), time=said["time"]))
    return sorted(found, key=lambda one: (one.paths, one.name))


def drop(folder: Path, which: str) -> None:
    """Remove an index from a folder; who reads it goes on.

    Args:
        folder: where indexes are kept.
        which: its name.

    Raises:
        InvalidInputError: if there is none of this name.
    """
    known = [one.name for one in indexes(folder)]
    if which not in known:
        there = f"{nearest(which, known)}expected one of {', '.join(known)}" if known else "none is kept"
        raise InvalidInputError(f"no index is named {which!r}: {there}")
    shutil.rmtree(folder / which, ignore_errors=True)


def _read(folder: Path) -> Former | None:
    """Return what the list of an index says; None if it is not there, or damaged."""
    try:
        written, _, text = (folder / _LIST).read_bytes().partition(b"\n")
    except OSError:
        return None
    return Former(folder, json.loads(text)) if written == _hash(text) else None


def _hash(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _mapped(file: Path, own: str) -> Symbols:
    """Map an array from the disk, after its hash has been found to be its own.

    Raises:
        OSError, ValueError: if it is gone, or damaged.
    """
    if (found := _sum(file)) != own:
        raise ValueError(f"expected a file with the hash {own}, got {found}")
    return np.asarray(np.load(file, mmap_mode="r"))
