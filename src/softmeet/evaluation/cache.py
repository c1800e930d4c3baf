"""What a long command has found so far: one file for each finished piece, so that it goes on where it was stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from torch import Tensor

from softmeet import __version__
from softmeet.evaluation.files import claim, write_atomically
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine

P = TypeVar("P")
Tensors = dict[str, Tensor]

# Bytes of the checksum at the end of each file.
_DIGEST = 32


class PieceCache:
    """Stores tensors of finished pieces of work in a folder; without a folder it stores nothing.

    Args:
        folder: made if there is none.
        settings: all that the pieces depend on, as JSON has it.

    Raises:
        InvalidInputError: the folder holds pieces of other settings.
    """

    def __init__(self, folder: Path | None = None, settings: dict[str, Any] | None = None) -> None:
        self._folder = folder
        if folder is not None:
            claim(folder, "pieces of a command", {"version": __version__, **(settings or {})})

    def get(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """Return the piece of that name; ``compute`` makes it if it is not stored, or damaged."""
        found = self._read(name)
        if found is None:
            found = compute()
            self._write(name, found)
        return found

    def map(
        self,
        engine: Engine | None,
        stage: str,
        function: Callable[..., Tensors],
        pieces: Sequence[P],
        arguments: Callable[[P], tuple[Any, ...]],
        on_done: Callable[[P], None] = lambda piece: None,
    ) -> list[Tensors]:
        """Return ``function(*arguments(piece))`` for every piece, in order; stored ones are not computed again.

        Args:
            engine: where calls run; None for this process.
            stage: what names of stored pieces begin with.
            function: as ``engine.map`` has it.
            pieces: of the work, always the same ones in the same order.
            arguments: of the call for a piece.
            on_done: called with each piece that is there.
        """
        names = [f"{stage}-{k:06d}" for k in range(len(pieces))]
        found = {k: stored for k, name in enumerate(names) if (stored := self._read(name)) is not None}
        for k in found:
            on_done(pieces[k])
        missing = [k for k in range(len(pieces)) if k not in found]
        for place, made in (engine or LocalEngine()).map(function, (arguments(pieces[k]) for k in missing)):
            k = missing[place]
            found[k] = made
            self._write(names[k], made)
            on_done(pieces[k])
        return [found[k] for k in range(len(pieces))]

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name.replace(' ', '-')}.safetensors"

    def _read(self, name: str) -> Tensors | None:
        path = self._path(name)
        if path is None or not path.exists():
            return None
        data = path.read_bytes()
        data, digest = data[:-_DIGEST], data[-_DIGEST:]
        return safetensors.torch.load(data) if hashlib.sha256(data).digest() == digest else None

    def _write(self, name: str, found: Tensors) -> None:
        if (path := self._path(name)) is not None:
            data = safetensors.torch.save({key: value.contiguous() for key, value in found.items()})
            write_atomically(path, lambda file: file.write(data + hashlib.sha256(data).digest()))
