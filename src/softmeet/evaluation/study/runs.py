"""A study's folder: its settings, one line for every finished cell, and what is made of them at the end.

A cell is the smallest piece that is worth redoing: it has a key, a seed of its own, and a JSON result. A run that was
killed goes on where it stopped; a torn last line is dropped.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmeet import __version__
from softmeet.evaluation.files import claim, write_text
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine

Json = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A piece of a study: a key that is unique in the study, and a call that gives its result."""

    key: str
    work: Callable[[], Json]


class Run:
    """Stores the results of one study's cells in a folder.

    Args:
        folder: made if there is none.
        settings: what the results depend on; a folder with others is refused.

    Raises:
        InvalidInputError: the folder holds another study, or the same one with other settings.
    """

    def __init__(self, folder: Path, settings: Json) -> None:
        self.folder, self.settings = folder, {"version": __version__, **settings}
        claim(folder, "a study", self.settings)
        self._lines = folder / "cells.jsonl"
        self.done = self._read()

    def each(
        self, cells: Sequence[Cell], engine: Engine | None = None, on_done: Callable[[str], None] = lambda key: None
    ) -> dict[str, Json]:
        """Return the results of ``cells`` by key; those that an earlier run finished are not run again.

        Args:
            cells: in the order of the results.
            engine: where they run; None for this process.
            on_done: called with each key.
        """
        todo = [cell for cell in cells if cell.key not in self.done]
        for cell in cells:
            if cell.key in self.done:
                on_done(cell.key)
        with self._lines.open("a", encoding="utf-8") as out:
            for k, result in (engine or LocalEngine()).map(operator.call, ((cell.work,) for cell in todo)):
                key = todo[k].key
                self.done[key] = result
                out.write(json.dumps({"key": key, "result": result}) + "\n")
                out.flush()
                os.fsync(out.fileno())
                on_done(key)
        return {cell.key: self.done[cell.key] for cell in cells}

    def finish(self, result: Json) -> None:
        """Write ``result.json``, with which a run is complete."""
        write_text(self.folder / "result.json", json.dumps({"settings": self.settings, **result}, indent=1) + "\n")

    def _read(self) -> dict[str, Json]:
        if not self._lines.exists():
            return {}
        lines = self._lines.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            write_text(self._lines, "".join(whole))
        return {entry["key"]: entry["result"] for entry in map(json.loads, whole)}
