"""Tasks of the lm-evaluation-harness: finding them, and asking their questions batch by batch."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lm_eval
import torch
import tqdm
from lm_eval.api.metrics import mean
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from softmeet.answers.asking import Answered, Writing, count_tokens
from softmeet.answers.questions import spread
from softmeet.answers.samples import Metric, Sample, answered, choose, choose_by, written
from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.harness import harness_model
from softmeet.members.huggingface import load_tokenizers
from softmeet.rules.frozen import unknown


@dataclass(frozen=True)
class TaskQuestion:
    """A question of a task.

    Attributes:
        task: the task's name.
        number: the question's number among those of the task, the harness's ``doc_id``.
    """

    task: str
    number: int

    @property
    def id(self) -> str:
        """Its name, which no other question has."""
        return f"{self.task}/{self.number}"


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data are there.

    Attributes:
        tasks: the harness's tasks, by name.
        docs: the documents of each, of which each is a question.
        metrics: of each that by which answers are right.
    """

    tasks: Mapping[str, Any]
    docs: Mapping[str, Sequence[Any]]
    metrics: Mapping[str, Metric]

    def questions(self, limit: int | None = None) -> list[TaskQuestion]:
        """Return all questions, task by task, or so many of them, evenly spread."""
        every = [TaskQuestion(name, number) for name, docs in self.docs.items() for number in range(len(docs))]
        return spread(every, limit)

    def written(self) -> dict[str, str]:
        """Return by the task's name how the harness writes its metric."""
        return {name: written(metric) for name, metric in self.metrics.items()}

    def hash(self, questions: Sequence[TaskQuestion]) -> str:
        """Return a hash of questions, of the tasks' settings, and of the documents that examples are drawn from."""
        found = hashlib.sha256(lm_eval.__version__.encode())
        shown = [task for task in self.tasks.values() if task.config.num_fewshot and hasattr(task, "sampler")]
        examples = [list(task.sampler.df) for task in shown]
        settings = [task.dump_config() for task in self.tasks.values()]
        for one in (settings, examples, ([one.id, self.docs[one.task][one.number]] for one in questions)):
            for part in one:
                found.update(json.dumps(part, sort_keys=True, default=_plain).encode())
        return found.hexdigest()


def _plain(value: Any) -> str:
    return value.__qualname__ if callable(value) else str(value)


def find_tasks(
    name: str | None,
    folder: Path | None = None,
    *,
    count: int | None = None,
    metric: str | None = None,
    run_code: bool = False,
) -> Tasks:
    """Return a task, or all tasks of a group, with their data.

    Args:
        name: of a task or a group; None for the only one in ``folder``.
        folder: a folder of tasks in YAML; None for those that come with the harness.
        count: how many examples stand before each question; None for the tasks' own number.
        metric: by which answers are right: ``NAME`` or ``NAME,FILTER``; None for the first of acc_norm, acc and
            exact_match, or else the first that is averaged.
        run_code: whether tasks may run the code that members write.

    Raises:
        InvalidInputError: if there is no such task or metric, or its data are not there, or it asks for what members
            cannot do.
    """
    manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
    name = name or _only(manager, folder)
    if name not in manager.all_tasks:
        raise _unknown(name, manager.all_tasks, folder)
    try:
        found = manager.load([name])["tasks"]
    except Exception as error:  # whatever is wrong with a task or its data
        raise InvalidInputError(
            f"the task {name} cannot be loaded: {type(error).__name__}: {error}. If its data are not on this machine "
            "yet, say the same once without HF_HUB_OFFLINE=1 and with a network: they are kept in the cache of datasets"
        ) from error
    for key, task in found.items():
        _require_able(key, task, run_code)
        _set_count(key, task, count)
    docs = {key: task.eval_docs for key, task in found.items()}
    for key, task in found.items():
        # Else the harness goes through all documents for each batch.
        task.doc_iterator = partial(_chosen, docs[key])
    return Tasks(found, docs, {key: _metric(key, task, metric) for key, task in found.items()})


def _only(manager: TaskManager, folder: Path | None) -> str:
    listed = manager.all_subtasks
    if len(listed) != 1:
        raise InvalidInputError(
            f"expected one task in {folder}, got {', '.join(listed)}: say which by --task"
            if listed
            else f"expected tasks of the lm-evaluation-harness in {folder}, files of YAML with task, but there are none"
        )
    return str(listed[0])


def _unknown(name: str, known: list[str], folder: Path | None) -> InvalidInputError:
    if folder is not None:
        return unknown(f"unknown task {name!r} in {folder}", name, known)
    near = get_close_matches(name, known)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return InvalidInputError(
        f"unknown task {name!r}: {meant}The harness has {len(known):,}: lm_eval ls tasks lists them; for your own name "
        "their folder, too: softmeet answer FOLDER --task NAME"
    )


def _require_able(name: str, task: Any, run_code: bool) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise InvalidInputError(f"expected a task of texts, but {name} has pictures or sounds")
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise InvalidInputError(f"{name} has no right answers, only likelihoods: softmeet evaluate measures those")
    if getattr(task, "UNSAFE_CODE", False) and not run_code:
        raise InvalidInputError(f"{name} judges answers by running what members write: allow that by --run-code")


def _set_count(name: str, task: Any, count: int | None) -> None:
    own = task.config.num_fewshot
    if own == 0 and count:
        raise InvalidInputError(f"{name} is asked without examples, by its own settings: leave --count {count} out")
    task.set_config("num_fewshot", (own or 0) if count is None else count)


def _chosen(docs: Sequence[Any], *, samples: Sequence[int], **_: Any) -> Iterator[tuple[int, Any]]:
    return enumerate(docs[number] for number in samples)


def _metric(name: str, task: Any, asked: str | None) -> Metric:
    """Return the metric of a task, as far as it is known before questions are asked."""
    filters = [one["name"] for one in task.config.filter_list or [{"name": "none"}]]
    own = task.aggregation()
    every = [(metric, kind) for kind in filters for metric in own]
    if asked is None:
        return choose(name, every, [one for one in every if own[one[0]] is mean], None)
    known = not callable(task.config.process_results)
    metric, _, kind = asked.partition(",")
    return choose(name, every, every if known else [*every, (metric, kind or filters[0])], asked)


def require_one_template(members: Sequence[str]) -> None:
    """Check that members have one chat template, since the harness tells all of them the same text.

    Raises:
        InvalidInputError: if they have none, or several.
    """
    found = {own.chat_template for own in load_tokenizers(members)}
    if len(found) > 1 or not all(found):
        raise InvalidInputError(
            f"--chat with a task tells all members the same text, and {', '.join(members)} have "
            f"{'different chat templates' if all(found) else 'no chat template'}: leave --chat out"
        )


@dataclass(frozen=True)
class TaskAsker:
    """Somebody who is asked tasks.

    Attributes:
        ensemble: the members, or one; its own settings hold.
        tasks: the tasks.
        writing: of it the seed, the number of questions at once, and whether the chat template is used.
    """

    ensemble: Ensemble
    tasks: Tasks
    writing: Writing

    @cached_property
    def _model(self) -> Any:
        return harness_model(self.ensemble, batch_size=self.writing.batch)

    def ask(self, questions: Sequence[TaskQuestion], number: int) -> list[Answered]:
        """Answer a batch of questions, the one of this number, on which alone draws depend."""
        start = time.perf_counter()
        chosen = dict[str, list[int]]()
        for one in questions:
            chosen.setdefault(one.task, []).append(one.number)
        try:
            told = self._told(chosen, self.writing.seed + number)
        except InvalidInputError as error:
            those = ", ".join(one.id for one in questions)
            raise InvalidInputError(f"{error} (among the questions {those})") from error
        found = [answer for task in chosen for answer in self._answers(task, told[task])]
        seconds = (time.perf_counter() - start) / len(questions)
        return [replace(one, seconds=seconds) for one in found]

    def _told(self, chosen: dict[str, list[int]], seed: int) -> dict[str, list[Sample]]:
        asked = {name: self.tasks.tasks[name] for name in chosen}
        for task in asked.values():
            task.set_fewshot_seed(seed)
        with _without_bars(), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            found: dict[str, list[Sample]] = evaluate(
                self._model,
                asked,
                samples=chosen,
                bootstrap_iters=0,
                apply_chat_template=self.writing.chat,
                fewshot_as_multiturn=self.writing.chat,
                confirm_run_unsafe_code=True,
            )["samples"]
        return found

    def _answers(self, task: str, samples: Sequence[Sample]) -> list[Answered]:
        metric = self.tasks.metrics[task]
        own = [one for one in samples if one["filter"] == metric[1]]
        if not own:
            choose_by(task, samples, written(metric))
        return [replace(answered(task, one, metric), tokens=self._count(one)) for one in own]

    def _count(self, sample: Sample) -> int:
        """Return how many tokens were read for options, or written."""
        (prompt, behind), *others = sample["arguments"]
        if isinstance(behind, str):
            return count_tokens(self.ensemble, prompt + behind + "".join(end for _, end in others))
        return sum(count_tokens(self.ensemble, text) for text in sample["resps"][0])


@contextmanager
def _without_bars() -> Iterator[None]:
    """Have the harness show no bar for each batch while the context lasts."""
    shown = tqdm.tqdm.__init__

    def hidden(self: Any, *given: Any, **options: Any) -> None:
        shown(self, *given, **{**options, "disable": True})

    tqdm.tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = shown
