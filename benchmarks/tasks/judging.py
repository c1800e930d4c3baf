"""What the tasks of generation take from Python: their items, and whether an answer is right.

A function that a model has written is run, with the limits of :mod:`softmeet.answers.sandbox`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from softmeet.answers.sandbox import PATIENCE as PATIENCE
from softmeet.answers.sandbox import passes

HERE = Path(__file__).resolve().parent


def dataset(kind: str, **ignored: Any) -> Any:
    """The items of a kind, as the harness takes them; ``ignored`` is what it has to say of models."""
    import datasets

    lines = (HERE / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def judged_line(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer's first line is the item's."""
    return {"passed": float(_tidy(results[0]) == _tidy(doc["answer"]))}


def judged_function(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the function passes its tests, with the answer's first line as what it returns."""
    return {"passed": float(passes(doc["prompt"] + results[0].partition("\n")[0], doc["tests"]))}


def _tidy(answer: str) -> str:
    return answer.partition("\n")[0].strip().removesuffix(".").strip('"')
