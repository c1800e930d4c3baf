"""What a long command has found so far: one file for each finished piece, so that it goes on where it was stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from softmeet import __version__
from softmeet.evaluation.files import claim, write_atomically
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine

Found = dict[str, Tensor]

# Bytes of the checksum at the end of each file.
_DIGEST = 32


class Kept:
    """Pieces in a folder; nothing is kept without one.

    Args:
        folder: made if there is none.
        settings: all that the pieces depend on.

    Raises:
        InvalidInputError: the folder holds pieces of other settings.
    """

    def __init__(self, folder: Path | None = None, settings: dict[str, Any] | None = None) -> None:
        self._folder = folder
        if folder is not None:
            claim(folder, "pieces of a command", {"version": __version__, **(settings or {})})

    def one(self, name: str, find: Callable[[], Found]) -> Found:
        """The piece of that name: as it is kept, or else as ``find`` finds it now."""
        found = self._read(name)
        if found is None:
            found = find()
            self._write(name, found)
        return found

    def map(
        self,
        engine: Engine | None,
        stage: str,
        function: Callable[..., Found],
        count: int,
        item: Callable[[int], tuple[Any, ...]],
        on_done: Callable[[int], None] = lambda k: None,
    ) -> list[Found]:
        """``function(*item(k))`` for k below ``count``, in order; those that are kept are not found again.

        Args:
            engine: where to; None for here.
            stage: a name for these pieces.
            function, item: as ``engine.map`` has them.
            on_done: called with each k.
        """
        found = {k: piece for k in range(count) if (piece := self._read(f"{stage}-{k:06d}")) is not None}
        for k in found:
            on_done(k)
        missing = [k for k in range(count) if k not in found]
        for place, piece in (engine or LocalEngine()).map(function, (item(k) for k in missing)):
            k = missing[place]
            found[k] = piece
            self._write(f"{stage}-{k:06d}", piece)
            on_done(k)
        return [found[k] for k in range(count)]

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name.replace(' ', '-')}.safetensors"

    def _read(self, name: str) -> Found | None:
        path = self._path(name)
        if path is None or not path.exists():
            return None
        data = path.read_bytes()
        data, digest = data[:-_DIGEST], data[-_DIGEST:]
        # A damaged piece is found again.
        return safetensors.torch.load(data) if hashlib.sha256(data).digest() == digest else None

    def _write(self, name: str, found: Found) -> None:
        if (path := self._path(name)) is not None:
            data = safetensors.torch.save({key: value.contiguous() for key, value in found.items()})
            write_atomically(path, lambda file: file.write(data + hashlib.sha256(data).digest()))
