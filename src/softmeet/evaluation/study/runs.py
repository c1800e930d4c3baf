"""A study's folder: its settings, one line for every finished cell, and what is made of them at the end.

A cell is the smallest piece that is worth redoing: it has a key, a seed of its own, and a JSON result. A run that was
killed goes on where it stopped; a torn last line is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmeet import __version__
from softmeet.errors import InvalidInputError

Json = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A piece of a study: its key, unique in the study, and how to find its result."""

    key: str
    work: Callable[[], Json]


class Run:
    """The folder of one study.

    Args:
        folder: made if there is none.
        settings: what the results depend on; a folder with others is refused.

    Raises:
        InvalidInputError: the folder holds another study, or the same one with other settings.
    """

    def __init__(self, folder: Path, settings: Json) -> None:
        self.folder, self.settings = folder, {"version": __version__, **settings}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            _refuse_others(folder, before, json.loads(json.dumps(self.settings)))
        else:
            _write(path, self.settings)
        self._lines = folder / "cells.jsonl"
        self.done = self._read()

    def each(
        self, cells: Sequence[Cell], jobs: int = 1, on_done: Callable[[str], None] = lambda key: None
    ) -> dict[str, Json]:
        """The results of ``cells`` by key; those that an earlier run finished are not run again.

        Args:
            cells: in the order of the results.
            jobs: threads, each on one core: products release the interpreter.
            on_done: called with each key.
        """
        todo = [cell for cell in cells if cell.key not in self.done]
        for cell in cells:
            if cell.key in self.done:
                on_done(cell.key)
        with self._lines.open("a", encoding="utf-8") as out, ThreadPoolExecutor(jobs) as pool:
            running = {pool.submit(cell.work): cell.key for cell in todo}
            try:
                for future in as_completed(running):
                    key = running[future]
                    self.done[key] = future.result()
                    out.write(json.dumps({"key": key, "result": self.done[key]}) + "\n")
                    out.flush()
                    os.fsync(out.fileno())
                    on_done(key)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return {cell.key: self.done[cell.key] for cell in cells}

    def finish(self, result: Json) -> None:
        """Write ``result.json``."""
        _write(self.folder / "result.json", {"settings": self.settings, **result})

    def _read(self) -> dict[str, Json]:
        if not self._lines.exists():
            return {}
        lines = self._lines.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            _replace(self._lines, "".join(whole))
        return {entry["key"]: entry["result"] for entry in map(json.loads, whole)}


def _refuse_others(folder: Path, before: Json, now: Json) -> None:
    differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differ:
        shown = ", ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in differ)
        raise InvalidInputError(f"{folder} holds a study with other settings ({shown}): choose another folder")


def _write(path: Path, content: Json) -> None:
    _replace(path, json.dumps(content, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
