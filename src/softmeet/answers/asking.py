"""Asking: what somebody answers to questions, batch by batch, and whether it is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from softmeet.answers import extract
from softmeet.answers.likelihoods import log_likelihoods
from softmeet.answers.questions import LIKELIHOODS, Form, Question
from softmeet.ensemble import Ensemble

# What ends an answer in words.
_STOPS = {
    "number": ("\n\n", "\nQuestion:"), "choice": ("\n",), "match": ("\n",),
    "code": ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```"),
}  # fmt: skip


@dataclass(frozen=True)
class Writing:
    """How answers are written.

    Attributes:
        tokens: the most tokens of one, as the first member has them.
        temperature: that of draws; 0 for the likeliest tokens.
        seed: of draws.
        chat: whether a question is told by each member's chat template.
        batch: how many questions are asked at once.
    """

    tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False
    batch: int = 8


@dataclass(frozen=True)
class Answered:
    """An answer.

    Attributes:
        id: of the question.
        answer: what was chosen or written.
        right: whether it is right.
        seconds: how long it took, its share of a batch.
        tokens: how many tokens were read or written for it, as the first member has them.
        scores: of each option, what they are compared by; empty of an answer in words.
    """

    id: str
    answer: str
    right: bool
    seconds: float
    tokens: int
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Asker:
    """Somebody who is asked.

    Attributes:
        ensemble: the members, or one.
        form: how questions are put.
        writing: how answers are written.
        more: further options of ``generate``.
    """

    ensemble: Ensemble
    form: Form
    writing: Writing
    more: dict[str, Any] = field(default_factory=dict)

    def ask(self, questions: Sequence[Question], number: int) -> list[Answered]:
        """Answer a batch of questions, the one of this number."""
        start = time.perf_counter()
        chosen = self.form.how in LIKELIHOODS
        found = list(self._chosen(questions) if chosen else self._written(questions, number))
        seconds = (time.perf_counter() - start) / len(questions)
        return [
            Answered(one.id, answer, right, seconds, tokens, scores)
            for one, (answer, right, tokens, scores) in zip(questions, found, strict=True)
        ]

    def _chosen(self, questions: Sequence[Question]) -> Iterator[tuple[str, bool, int, tuple[float, ...]]]:
        for one in questions:
            prompt, options = self.form.prompt(one), self.form.options(one)
            likely = log_likelihoods(self.ensemble, prompt, options)
            if self.form.how == "option-unconditional":
                alone = log_likelihoods(self.ensemble, "Answer:", options)
                likely = [own - less for own, less in zip(likely, alone, strict=True)]
            sizes = [len(option.strip().encode()) if self.form.how == "option-byte" else 1 for option in options]
            scores = tuple(own / size for own, size in zip(likely, sizes, strict=True))
            best = ascii_uppercase[max(range(len(scores)), key=scores.__getitem__)]
            yield best, best == one.answer[0], self._count(prompt + "".join(options)), scores

    def _written(
        self, questions: Sequence[Question], number: int
    ) -> Iterator[tuple[str, bool, int, tuple[float, ...]]]:
        model, prompts = self.ensemble.model, [self.form.prompt(one) for one in questions]
        told: list[Any] = [[{"role": "user", "content": p}] for p in prompts] if self.writing.chat else list(prompts)
        stops = () if self.writing.chat else _STOPS[self.form.how]
        options: dict[str, Any] = dict(self.more)
        if "decoder" in options:
            own = model.limit_of_symbols
            options[own] = self.writing.tokens * (1 if own == "max_new_tokens" else model.symbols_of_token)
            options["seed"] = self.writing.seed + number
        else:
            options["max_new_tokens"] = self.writing.tokens
            if stops:
                options["stopping_criteria"] = StoppingCriteriaList([_Stops(self.ensemble.tokenizer, stops)])
            if self.writing.temperature:
                options |= {"temperature": self.writing.temperature, "seed": self.writing.seed + number}
            else:
                options["do_sample"] = False
        for one, text in zip(questions, self.ensemble.generate(told, **options), strict=True):
            for stop in stops:
                text = text.partition(stop)[0]
            yield text, _is_right(self.form.how, text, one), self._count(text), ()

    def _count(self, text: str) -> int:
        return len(self.ensemble.model.own_tokens(text)[0])


class _Stops(StoppingCriteria):  # type: ignore[misc]
    """Ends a text once one of some strings is in it.

    Args:
        tokenizer: the ensemble's.
        stops: the strings.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, stops, -1

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Any, **kwargs: Any) -> Bool[Tensor, " B"]:
        """Return which rows have ended; the first call is behind the first token."""
        if self._start < 0:
            self._start = input_ids.shape[1] - 1
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _is_right(how: str, text: str, question: Question) -> bool:
    if how == "number":
        return extract.is_number(text, question.answer[0])
    if how == "choice":
        return extract.letter(text, len(question.choices)) == question.answer[0]
    if how == "code":
        # Its limits are those of Linux, and other answers are judged anywhere.
        from softmeet.answers.sandbox import passes

        return passes(f"{question.question}{text}\n{question.test}", [f"check({question.entry_point}) is None"])
    return extract.matches(text, question.answer)


def ask_all(
    asker: Callable[[], Asker],
    questions: Sequence[Question],
    size: int,
    known: dict[str, Answered],
    keep: Callable[[Sequence[Answered]], None],
) -> list[Answered]:
    """Ask whatever was not answered before, in the batches of all questions.

    Args:
        asker: returns who is asked; not called if everything was answered.
        questions: all of them.
        size: how many are asked at once.
        known: answers of an earlier run, by the question's id; those of a batch that was not finished are asked again.
        keep: is called with the answers of each batch.
    """
    found, one = dict(known), None
    for number, start in enumerate(range(0, len(questions), size)):
        batch = questions[start : start + size]
        if all(question.id in known for question in batch):
            continue
        one = one or asker()
        told = one.ask(batch, number)
        found |= {answer.id: answer for answer in told}
        keep(told)
    return [found[question.id] for question in questions]
