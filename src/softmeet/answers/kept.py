"""Answers that are kept in a folder, line by line, so that the same command goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from softmeet import __version__
from softmeet.answers.asking import Answered
from softmeet.evaluation.files import room_for, turn_at, write_atomically, write_text

_ANSWER = TypeAdapter(Answered)


class Kept:
    """The answers of one subject.

    Args:
        folder: the folder of all; None to keep nothing.
        settings: everything that the answers depend on, as JSON has it; softmeet's version is added to it.

    Attributes:
        answers: those of earlier runs, by the question's id.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.answers, self._file = dict[str, Answered](), None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        told = json.dumps({"version": __version__, **settings}, sort_keys=True)
        self._file = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.jsonl"
        with turn_at(folder):
            if not self._file.exists():
                write_text(self._file, json.dumps({"settings": json.loads(told)}) + "\n")
            # A last line that was cut off is dropped. Texts may have what str.splitlines takes for the end of a line.
            whole, end, cut_off = self._file.read_bytes().rpartition(b"\n")
            if cut_off:
                write_atomically(self._file, lambda file: file.write(whole + end))
        for line in whole.split(b"\n")[1:]:
            with suppress(ValueError):  # damaged: the question is asked again
                one = _ANSWER.validate_json(line)
                self.answers[one.id] = one

    def keep(self, answers: Sequence[Answered]) -> None:
        """Write answers behind those that are kept, and wait until they are on the disk.

        Raises:
            TraceError: if the disk is full.
        """
        if self._file is None:
            return
        with turn_at(self._file.parent), room_for(self._file), self._file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in answers)
            out.flush()
            os.fsync(out.fileno())
