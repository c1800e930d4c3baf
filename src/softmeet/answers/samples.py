"""What the lm-evaluation-harness keeps of each question it asked, its samples, as answers; and its files of them."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from softmeet.answers.asking import Answered
from softmeet.answers.doubt import of_options
from softmeet.answers.questions import spread
from softmeet.errors import InvalidInputError

# A sample as the harness has it, of one question behind one filter.
Sample = Mapping[str, Any]
# A metric and a filter, and how the harness writes both.
Metric = tuple[str, str]
# What is right, where nobody says it: the first of these that a task has.
_USUAL = ("acc_norm", "acc", "exact_match")
_FILE = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[^_]+)\.jsonl")
# By these it is seen whether two samples are of one question.
_SAME = ("doc_hash", "target_hash")


def written(metric: Metric) -> str:
    """Return a metric as the harness writes it: ``acc,none``."""
    return ",".join(metric)


def choose(task: str, every: Sequence[Metric], fit: Sequence[Metric], asked: str | None) -> Metric:
    """Return the metric by which a task's answers are right.

    Args:
        task: the task's name, for the message.
        every: all its metrics, in order.
        fit: those whose values are 0 or 1.
        asked: ``NAME`` or ``NAME,FILTER``; None for the first of acc_norm, acc and exact_match, or else any.

    Raises:
        InvalidInputError: if there is none, or it has other values.

    Example:
        >>> every = [("f1", "none"), ("acc", "none"), ("acc_norm", "none")]
        >>> choose("arc", every, every[1:], None), choose("arc", every, every[1:], "acc")
        (('acc_norm', 'none'), ('acc', 'none'))
    """
    name, _, kind = (asked or "").partition(",")
    able = [one for one in fit if name in ("", one[0]) and kind in ("", one[1])]
    if not able:
        others = ", ".join(written(one) for one in every if one not in fit)
        raise InvalidInputError(
            f"expected --metric as a metric of {task} whose values are 0 and 1, such as "
            f"{', '.join(map(written, fit)) or 'acc'}, got {asked or 'none'}"
            + (f"; of other values, or unknown before it is asked: {others}" if others else "")
        )
    return min(able, key=lambda one: _USUAL.index(one[0]) if one[0] in _USUAL else len(_USUAL))


def choose_by(task: str, samples: Sequence[Sample], asked: str | None) -> Metric:
    """Return the metric by which a task's answers are right, of those that have 0 or 1 in all of its samples."""
    values = defaultdict[Metric, list[Any]](list)
    for one in samples:
        for name in one.get("metrics") or [name for name in _USUAL if name in one]:
            values[name, _filter(one)].append(one[name])
    sizes = Counter(map(_filter, samples))
    fit = [one for one, own in values.items() if len(own) == sizes[one[1]] and all(map(_is_truth, own))]
    return choose(task, list(values), fit, asked)


def _filter(sample: Sample) -> str:
    return str(sample.get("filter", "none"))


def _is_truth(value: Any) -> bool:
    return isinstance(value, Real | np.bool_) and value in (0, 1)


def answered(task: str, sample: Sample, metric: Metric) -> Answered:
    """Return a sample as an answer; what it took is not known.

    Its text is the response that the filter left; of options the letter, or behind Z the number from 0, of the
    likeliest one.

    Raises:
        InvalidInputError: if the sample's value of the metric is not 0 or 1.
    """
    if not _is_truth(sample.get(metric[0])):
        choose_by(task, [sample], written(metric))
    responses, name = sample["filtered_resps"], f"{task}/{sample['doc_id']}"
    right, scores = bool(sample[metric[0]]), _scores(sample)
    if len(scores) < 2:
        text = responses[0][1] if scores else responses[0]
        return Answered(name, str(text), right, scores=scores)
    best = max(range(len(scores)), key=scores.__getitem__)
    text = ascii_uppercase[best] if len(scores) <= len(ascii_uppercase) else str(best)
    return Answered(name, text, right, scores=scores, doubt=of_options(scores, [scores]))


def _scores(sample: Sample) -> tuple[float, ...]:
    """Return the log-likelihoods of options, as numbers or the texts that files have; none of a written answer."""
    responses = sample["filtered_resps"]
    pairs = [one for one in responses if isinstance(one, list | tuple) and len(one) == 2]
    if len(pairs) < len(responses) or any(str(one[1]) not in ("True", "False") for one in pairs):
        return ()
    found = tuple(float(one[0]) for one in pairs)
    # Behind them the same options have those without the question.
    return found[: len(found) // 2] if "acc_mutual_info" in sample.get("metrics", ()) else found


@dataclass(frozen=True)
class Compared:
    """The answers of several models to the questions that all of them were asked.

    Attributes:
        answers: by the model's name, in the same order of questions.
        metrics: by the task's name how the harness writes the metric by which answers are right.
        left_out: how many questions only some were asked.
        reworded: how many questions were not put to all in the same words.
    """

    answers: dict[str, list[Answered]]
    metrics: dict[str, str]
    left_out: int
    reworded: int


def compare(paths: Sequence[Path], metric: str | None = None, limit: int | None = None) -> Compared:
    """Read samples that the lm-evaluation-harness wrote, and pair them by question.

    Args:
        paths: files ``samples_TASK_DATE.jsonl``, folders of them, each of which is a model's, and folders of such
            folders. Of a folder's files of one task the newest is read.
        metric: by which answers are right: ``NAME`` or ``NAME,FILTER``; None as :func:`choose` has it.
        limit: so many of the questions, evenly spread; None for all.

    Raises:
        InvalidInputError: if there are no samples, or they are damaged, or no question is all models', or two have
            different questions under one id, or there is no such metric.
    """
    models = {name: _read(files) for name, files in _named(_files(paths)).items()}
    shared = set.intersection(*(set(own) for own in models.values()))
    common = [key for key in next(iter(models.values())) if key in shared]
    if not common:
        raise InvalidInputError(f"expected questions that all of {', '.join(models)} were asked, but there are none")
    every = set().union(*models.values())
    _require_same(models, common)
    chosen, metrics = spread(common, limit), dict[str, Metric]()
    for task in dict.fromkeys(task for task, _ in common):
        keys = [key for key in common if key[0] == task]
        metrics[task] = choose_by(task, [one for own in models.values() for key in keys for one in own[key]], metric)
    answers = {name: [_right(own[key], key[0], metrics[key[0]]) for key in chosen] for name, own in models.items()}
    told = {task: written(one) for task, one in metrics.items() if any(key[0] == task for key in chosen)}
    reworded = sum(_differ(models, key, "prompt_hash") for key in chosen)
    return Compared(answers, told, len(every) - len(common), reworded)


Key = tuple[str, int]


def _right(samples: Sequence[Sample], task: str, metric: Metric) -> Answered:
    found = next((one for one in samples if _filter(one) == metric[1]), None)
    if found is None:
        raise InvalidInputError(f"{task}/{samples[0]['doc_id']} has no filter {metric[1]}: say another --metric")
    return answered(task, found, metric)


def _differ(models: Mapping[str, Mapping[Key, Sequence[Sample]]], key: Key, of: str) -> bool:
    return len({one[of] for own in models.values() for one in own[key] if of in one}) > 1


def _require_same(models: Mapping[str, Mapping[Key, Sequence[Sample]]], common: Iterable[Key]) -> None:
    for key in common:
        if any(_differ(models, key, of) for of in _SAME):
            raise InvalidInputError(
                f"expected one question with the id {key[0]}/{key[1]}, but not all of {', '.join(models)} were asked "
                "the same: their data, or the versions of the task, differ"
            )


def _files(paths: Sequence[Path]) -> dict[Path, dict[str, Path]]:
    """Return by a model's folder and a task the file of samples."""
    found = defaultdict[Path, dict[str, Path]](dict)
    for path in paths:
        listed = [path] if path.is_file() else sorted([*path.glob("samples_*.jsonl"), *path.glob("*/samples_*.jsonl")])
        own = [(file, match) for file in listed if (match := _FILE.fullmatch(file.name))]
        if not own:
            raise InvalidInputError(
                f"expected samples_TASK_DATE.jsonl, or a folder of such files, as lm_eval --log_samples --output_path "
                f"OUT writes them into OUT/MODEL, got {path}" + ("" if path.exists() else ", which is not there")
            )
        for file, match in sorted(own, key=lambda one: (one[0].parent, one[1]["date"])):
            found[file.resolve().parent][match["task"]] = file
    return found


def _named(folders: Mapping[Path, dict[str, Path]]) -> dict[str, dict[str, Path]]:
    """Return the same by a name for each folder: its own, or with that above it where several have one name."""
    counts = Counter(folder.name for folder in folders)
    names = [folder.name if counts[folder.name] == 1 else "/".join(folder.parts[-2:]) for folder in folders]
    if len(set(names)) < len(names):
        raise InvalidInputError(f"expected folders with names of their own, got {', '.join(map(str, folders))}")
    return dict(zip(names, folders.values(), strict=True))


def _read(files: Mapping[str, Path]) -> dict[Key, list[Sample]]:
    """Return by task and number the samples of a question, one for each filter."""
    found = defaultdict[Key, list[Sample]](list)
    for task, file in sorted(files.items()):
        with file.open(encoding="utf-8") as lines:
            own = [_sample(line, file, k) for k, line in enumerate(lines, 1) if line.strip()]
        for one in sorted(own, key=lambda one: int(one["doc_id"])):
            found[task, one["doc_id"]].append(one)
    return found


def _sample(line: str, file: Path, number: int) -> Sample:
    try:
        one = json.loads(line)
        # Prompts and documents, which are most of a file, are not needed.
        kept = ["doc_id", "filter", "metrics", "filtered_resps", "prompt_hash", *_SAME, *_USUAL]
        found = {key: one[key] for key in (*kept, *one.get("metrics", ())) if key in one}
        return {**found, "doc_id": int(one["doc_id"]), "filtered_resps": list(one["filtered_resps"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"expected a sample of lm_eval in line {number} of {file}, but {error!r}") from None
