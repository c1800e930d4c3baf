"""A store of the results of a study's cells so far: lines of JSON, of which a last one that was cut off is dropped."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from softmeet import __version__
from softmeet.evaluation.files import claim, write_text
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine

Json = dict[str, Any]
Cells = Mapping[str, Callable[[], Json]]


class Run:
    """A store of the results of one study's cells, in a folder.

    Args:
        folder: made if there is none.
        settings: everything that the results depend on, as JSON allows it; softmeet's version is added to it.

    Attributes:
        done: the results of all cells that are finished, by the cell's key.

    Raises:
        InvalidInputError: if the folder holds another study, or the same one with other settings or by another version.
    """

    def __init__(self, folder: Path, settings: Json) -> None:
        self.folder, self.settings = folder, {"version": __version__, **settings}
        claim(folder, "a study", self.settings)
        self._lines = folder / "cells.jsonl"
        self.done = self._read()

    def each(
        self, cells: Cells, engine: Engine | None = None, on_done: Callable[[str], None] = lambda key: None
    ) -> dict[str, Json]:
        """Return the results of a study's cells by key; cells that an earlier run finished are not run again.

        Each new result is written to the folder as soon as it is there.

        Args:
            cells: for each cell, a part of the study's work, by a key that is unique in the study, a function without
                arguments that returns its result as JSON; picklable, for engines with other processes. Results are
                returned in this order.
            engine: runs the functions; None for this process.
            on_done: called in this process, once with each cell's key: at once if an earlier run finished the cell,
                else after its result has been written.

        Raises:
            Exception: if a cell's function raised one: that exception; results written before stay.
        """
        for key in filter(self.done.__contains__, cells):
            on_done(key)
        todo = [key for key in cells if key not in self.done]
        with self._lines.open("a", encoding="utf-8") as out:
            for k, result in (engine or LocalEngine()).map(operator.call, ((cells[key],) for key in todo)):
                self.done[todo[k]] = result
                out.write(json.dumps({"key": todo[k], "result": result}) + "\n")
                out.flush()
                os.fsync(out.fileno())
                on_done(todo[k])
        return {key: self.done[key] for key in cells}

    def finish(self, result: Json) -> None:
        """Write ``result``, of the whole study, with the settings to ``result.json``, which marks a complete run.

        Raises:
            TraceError: if the disk is full.
        """
        write_text(self.folder / "result.json", json.dumps({"settings": self.settings, **result}, indent=1) + "\n")

    def _read(self) -> dict[str, Json]:
        if not self._lines.exists():
            return {}
        lines = self._lines.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            write_text(self._lines, "".join(whole))
        return {entry["key"]: entry["result"] for entry in map(json.loads, whole)}
