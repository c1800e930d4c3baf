"""Files that appear under their names only when they are complete, and a store of a long command's results so far.

The results of an evaluation or a fit are files of tensors, one for each piece of work, in a folder that also holds the
settings they depend on, so that a command that was stopped can continue. Several processes may use one folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from pydantic_core import to_jsonable_python
from torch import Tensor

from softmeet import __version__
from softmeet.errors import InvalidInputError, TraceError
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine

P = TypeVar("P")
Tensors = dict[str, Tensor]

# The name of a file's checksum in its metadata.
_DIGEST = "softmeet-sha256"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Seconds after which what nobody has written to, and nobody has finished, is of a process that was killed.
_ABANDONED = 3600.0


@contextmanager
def turn_at(folder: Path) -> Iterator[None]:
    """Enter a context that one process at a time is in, for a folder that exists; the others wait. Not on Windows."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def _unfinished(path: Path) -> Path:
    """Return a path beside ``path`` that no other process has; remove those that processes have left there."""
    for old in path.parent.glob(".*.unfinished"):
        with suppress(OSError):
            if old.name.startswith(f".{path.name}.") and time.time() - old.stat().st_mtime > _ABANDONED:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")


def write_atomically(path: Path, write: Any) -> None:
    """Write a file through ``write``, and let it appear as ``path`` only once all of it is on the disk.

    Args:
        path: the file, in an existing folder; it is replaced if it exists.
        write: a function, called once with a file object that is open for binary writing, to write the contents to;
            its result is ignored.

    Raises:
        TraceError: if the disk is full.
        Exception: any other one that ``write`` raises. After either no partial file is left, and an existing file is
            unchanged.
    """
    unfinished = _unfinished(path)
    try:
        with room_for(path):
            with unfinished.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, all of it or nothing, as :func:`write_atomically` does.

    Raises:
        TraceError: if the disk is full; an existing file stays unchanged.
    """
    write_atomically(path, lambda file: file.write(text.encode()))


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turn an error about a full disk in the context into a TraceError that says how to continue."""
    try:
        yield
    except Exception as error:
        # Tokenizers' errors have no errno, only the words.
        if getattr(error, "errno", None) in _NO_ROOM or os.strerror(errno.ENOSPC) in str(error):
            raise TraceError(
                f"no room on the disk for {path}: what was written before stays and is whole; make room and run the "
                "same command again"
            ) from error
        raise


@contextmanager
def replace_together(folder: Path) -> Iterator[Path]:
    """Yield a new empty folder, and once the context ends without an error, move its files into ``folder``.

    ``folder`` is made if there is none. Files of the same names are replaced; others in ``folder`` stay. After an error
    nothing in ``folder`` has changed, unless the error came while files were moved.

    Raises:
        TraceError: if the disk is full.
    """
    folder = folder.resolve()
    unfinished = _unfinished(folder)
    try:
        with room_for(folder):
            unfinished.mkdir(parents=True)
            yield unfinished
            folder.mkdir(exist_ok=True)
            with turn_at(folder):
                for path in sorted(unfinished.iterdir()):
                    path.replace(folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def as_json(content: Any) -> str:
    """Return content as standard JSON, indented; infinity and NaN become null, since strict parsers refuse them.

    ``content`` may hold all that pydantic turns to JSON: dicts, sequences, strings, numbers, dataclasses, paths.

    >>> print(as_json({"loss": float("inf")}))
    {
      "loss": null
    }
    """
    return json.dumps(to_jsonable_python(content, inf_nan_mode="null"), indent=2, allow_nan=False)


def write_json(path: Path, content: Any) -> None:
    """Write content to a file as :func:`as_json` returns it; an existing file stays until the new one is complete.

    Raises:
        TraceError: if the disk is full.
    """
    text = as_json(content) + "\n"
    if path.exists() and not path.is_file():  # a pipe or a device is not to be replaced
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path, text)


def claim(folder: Path, what: str, settings: dict[str, Any]) -> None:
    """Write ``settings`` to a folder's ``settings.json``, or check that an existing one holds the same settings.

    Args:
        folder: the folder, made if there is none.
        what: what the folder holds, for the message, such as "pieces of a command".
        settings: everything that the folder's contents depend on, as JSON allows it.

    Raises:
        InvalidInputError: if ``settings.json`` is damaged, or holds other settings, which the message names.
        TraceError: if the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, now = folder / "settings.json", json.loads(json.dumps(settings))
    with turn_at(folder):
        if not path.exists():
            write_text(path, json.dumps(settings, indent=1) + "\n")
            return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        there = None
    if not isinstance(there, dict):
        raise InvalidInputError(
            f"{path} is damaged: it holds no settings as softmeet writes them; choose another folder"
        )
    if differ := sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key)):
        shown = ", ".join(f"{key}: {_short(there.get(key))} there, {_short(now.get(key))} here" for key in differ)
        raise InvalidInputError(f"{folder} holds {what} with other settings ({shown}): choose another folder")


def require_ensemble_folder(folder: Path) -> None:
    """Check that an ensemble can be saved in a folder: it is missing, without files, or an ensemble's already.

    Raises:
        InvalidInputError: if the folder holds files without an ensemble's ``config.json``, as a member's checkpoint.
    """
    if not folder.is_dir() or not any(path.is_file() for path in folder.iterdir()):
        return
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("model_type") != "softmeet":
        raise InvalidInputError(
            f"expected an empty folder or an ensemble that softmeet saved, but {folder} holds other files, some of "
            "which would be overwritten: name another folder"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def save_tensors(path: Path, tensors: Tensors, key: str) -> None:
    """Write tensors by name as a safetensors file, all of it or nothing, with a checksum in its metadata.

    Args:
        path: the file, which is replaced if it exists.
        tensors: the tensors, on the CPU.
        key: which file it is, and of what settings; :func:`load_tensors` asks for it.

    Raises:
        TraceError: if the disk is full.
    """
    tensors = {name: one.contiguous() for name, one in tensors.items()}
    data = safetensors.torch.save(tensors, metadata={_DIGEST: _digest(tensors, key)})
    write_atomically(path, lambda file: file.write(data))


def load_tensors(path: Path, key: str) -> Tensors | None:
    """Return what :func:`save_tensors` wrote; None if the file is missing, damaged, or of another ``key``."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return None
    return tensors if (metadata or {}).get(_DIGEST) == _digest(tensors, key) else None


def _digest(tensors: Tensors, key: str) -> str:
    """Compute the SHA-256 of a key and of all tensors' names, forms and numbers, in hexadecimal."""
    digest = hashlib.sha256(key.encode())
    for name, one in sorted(tensors.items()):
        digest.update(repr((name, one.dtype, one.shape)).encode())
        digest.update(one.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def join_tensors(pieces: Sequence[Tensors]) -> Tensors:
    """Concatenate the tensors of each name in one piece or more, in order, along their first dimension.

    >>> join_tensors([{"x": torch.zeros(1)}, {"x": torch.ones(2)}])
    {'x': tensor([0., 1., 1.])}
    """
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


class PieceCache:
    """A store of the results of finished pieces of work, tensors by name, as one file each in a folder.

    A file that was copied or renamed from another piece's, or is of other settings, counts as missing.

    Args:
        folder: made if there is none; None to store nothing.
        settings: everything that the pieces depend on, as JSON allows it; softmeet's version is added to it.

    Raises:
        InvalidInputError: if the folder holds pieces of other settings, or of another version.
    """

    def __init__(self, folder: Path | None = None, settings: dict[str, Any] | None = None) -> None:
        self._folder, own = folder, {"version": __version__, **(settings or {})}
        self._key = json.dumps(own, sort_keys=True)
        if folder is not None:
            claim(folder, "pieces of a command", own)

    def get(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """Return the stored piece ``name``; if it is missing or damaged, compute and store it.

        Args:
            name: the piece's name, from which that of its file is made.
            compute: a function without arguments that returns the piece, tensors by name; called in this process, at
                most once, before this method returns.

        Raises:
            TraceError: if the disk is full.
        """
        found = self._read(name)
        if found is None:
            found = compute()
            self._write(name, found)
        return found

    def evaluation(self, name: str, evaluate: Callable[[], Sequence[float | Tensor]]) -> tuple[Any, ...]:
        """Return a loss with its derivatives: the stored piece ``name`` or, if that is missing, a new evaluation.

        Args:
            name: the piece's name, as of :meth:`get`.
            evaluate: a function without arguments that returns the loss, its gradient and maybe its Fisher information,
                fp64; called as :meth:`get` calls its own.

        Raises:
            TraceError: if the disk is full.
        """
        names = ("loss", "gradient", "information")

        def compute() -> Tensors:
            return {key: torch.as_tensor(x, dtype=torch.float64) for key, x in zip(names, evaluate(), strict=False)}

        found = self.get(name, compute)
        loss, *derivatives = (found[key] for key in names if key in found)
        return loss.item(), *derivatives

    def map(
        self,
        engine: Engine | None,
        stage: str,
        function: Callable[..., Tensors],
        pieces: Sequence[P],
        arguments: Callable[[P], tuple[Any, ...]],
        on_done: Callable[[Sequence[P]], None] = lambda pieces: None,
    ) -> list[Tensors]:
        """Return ``function(*arguments(piece))`` for every piece, in order; stored results are not computed again.

        Args:
            engine: runs the calls; None for this process.
            stage: the beginning of the names under which these results are stored; the piece's number follows.
            function: defined at the top level of a module, so that other processes find it; returns tensors by name.
            pieces: the pieces of the work, in every run the same ones in the same order.
            arguments: a function, called in this process with a piece whose result is not stored, that returns the
                tuple of arguments of its call; these have to be picklable if the engine uses other processes.
            on_done: called in this process with pieces that are done: first with those whose results are stored,
                perhaps none, all at once, so that no speed is taken from them; then with each other one after its
                result has been stored, in the order in which they finish.

        Raises:
            TraceError: if the disk is full.
            Exception: if ``function`` raised one: that exception.
        """
        names = [f"{stage}-{k:06d}" for k in range(len(pieces))]
        found = {k: stored for k, name in enumerate(names) if (stored := self._read(name)) is not None}
        on_done([pieces[k] for k in found])
        missing = [k for k in range(len(pieces)) if k not in found]
        for place, made in (engine or LocalEngine()).map(function, (arguments(pieces[k]) for k in missing)):
            k = missing[place]
            found[k] = made
            self._write(names[k], made)
            on_done([pieces[k]])
        return [found[k] for k in range(len(pieces))]

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name.replace(' ', '-')}.safetensors"

    def _read(self, name: str) -> Tensors | None:
        path = self._path(name)
        return None if path is None else load_tensors(path, f"{self._key} {name}")

    def _write(self, name: str, found: Tensors) -> None:
        if (path := self._path(name)) is not None:
            save_tensors(path, found, f"{self._key} {name}")
