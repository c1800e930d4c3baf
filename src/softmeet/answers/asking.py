"""Asking: what somebody answers to questions, batch by batch, and whether it is right."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from softmeet.answers import extract
from softmeet.answers.doubt import Doubt, Watch, of_options
from softmeet.answers.questions import LIKELIHOODS, Form, Question
from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.likelihoods import Likelihood, likelihoods

# What ends an answer in words.
_STOPS = {
    "number": ("\n\n", "\nQuestion:"), "choice": ("\n",), "match": ("\n",),
    "code": ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```"),
}  # fmt: skip


def text_likelihoods(ensemble: Ensemble, prompt: str, options: Sequence[str]) -> list[Likelihood]:
    """Return the likelihood of each of some texts behind a prompt, which every member reads once.

    A text's tokens are those that prompt and text have together, behind as many as the prompt has by itself, and spaces
    at the prompt's end belong to the text, as in the lm-evaluation-harness. Over bytes they are the text's bytes.

    Args:
        ensemble: over tokens or bytes; its own settings hold.
        prompt: a text.
        options: texts, none of them empty.

    Raises:
        InvalidInputError: if prompt and text together exceed a member's context, or it is over a union of tokens.

    Example:
        >>> ensemble = Ensemble.from_pretrained("wide", "logit-mean")
        >>> likely, unlikely = text_likelihoods(ensemble, "And the king", [" said", " fox"])
        >>> likely.log_prob > unlikely.log_prob, len(likely.members)
        (True, 3)
    """
    ensemble.model.require_likelihood("an answer by likelihood")
    pairs = [_symbols(ensemble, prompt, option) for option in options]
    # Where a text changes how the prompt's end is cut, it has a prompt of its own: those with one prompt go together.
    order = sorted(range(len(pairs)), key=lambda k: pairs[k][0])
    found = dict(zip(order, likelihoods(ensemble.model, (pairs[k] for k in order)), strict=True))
    return [found[k] for k in range(len(pairs))]


def _symbols(ensemble: Ensemble, prompt: str, option: str) -> tuple[list[int], list[int]]:
    model, kept = ensemble.model, prompt.rstrip(" ")
    whole, before = kept + prompt[len(kept) :] + option, kept or prompt
    if model.begin is not None:
        return [model.begin, *before.encode()], list(whole[len(before) :].encode())
    ids, own = (list(ensemble.tokenizer(text, verbose=False)["input_ids"]) for text in (whole, before))
    return ids[: len(own)], ids[len(own) :]


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
        seconds: how long it took, its share of a batch; 0 if nobody knows.
        tokens: how many tokens were read or written for it, as the first member has them; 0 if nobody knows.
        scores: of each option, what they are compared by; empty of an answer in words.
        doubt: how sure it is; None of what a decoder writes.
    """

    id: str
    answer: str
    right: bool
    seconds: float = 0.0
    tokens: int = 0
    scores: tuple[float, ...] = ()
    doubt: Doubt | None = None


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
        if self.form.how in LIKELIHOODS:
            found = [self._chosen(one) for one in questions]
        else:
            found = self._written(questions, number)
        return [replace(one, seconds=(time.perf_counter() - start) / len(questions)) for one in found]

    def _chosen(self, question: Question) -> Answered:
        prompt, options = self.form.prompt(question), self.form.options(question)
        # Of the ensemble, and of each member: the log-probability of each option.
        with _naming([question]):
            likely = _table(text_likelihoods(self.ensemble, prompt, options))
            if self.form.how == "option-unconditional":
                likely -= _table(text_likelihoods(self.ensemble, "Answer:", options))
        if self.form.how == "option-byte":
            likely /= torch.tensor([len(option.strip().encode()) for option in options])
        # -inf less -inf: no option has a probability.
        ours, *members = likely.nan_to_num(-math.inf, math.inf, -math.inf).tolist()
        count = count_tokens(self.ensemble, prompt + "".join(options))
        if max(ours) == -math.inf:
            return Answered(question.id, "", False, 0.0, count, tuple(ours))
        best = ascii_uppercase[ours.index(max(ours))]
        return Answered(question.id, best, best == question.answer[0], 0.0, count, tuple(ours),
                        of_options(ours, members))  # fmt: skip

    def _written(self, questions: Sequence[Question], number: int) -> list[Answered]:
        prompts = [self.form.prompt(one) for one in questions]
        told: list[Any] = [[{"role": "user", "content": p}] for p in prompts] if self.writing.chat else list(prompts)
        stops = () if self.writing.chat else _STOPS[self.form.how]
        watch = None if "decoder" in self.more else Watch()
        given = self._drawn(watch, stops, number) if watch else self._decoded(number)
        with _naming(questions):
            texts = self.ensemble.generate(told, **given)
        doubts: list[Doubt | None] = [*watch.doubts()] if watch else [None] * len(texts)
        for stop in stops:
            texts = [text.partition(stop)[0] for text in texts]
        return [
            Answered(
                one.id, text, _is_right(self.form.how, text, one), 0.0, count_tokens(self.ensemble, text), (), doubt
            )
            for one, text, doubt in zip(questions, texts, doubts, strict=True)
        ]

    def _drawn(self, watch: Watch, stops: Sequence[str], number: int) -> dict[str, Any]:
        """Return the options of ``generate`` for texts that are written token by token."""
        writing, ends = self.writing, [watch.tokens]
        ends += [_Stops(self.ensemble.tokenizer, stops)] if stops else []
        chosen = {"temperature": writing.temperature, "seed": writing.seed + number}
        return {
            **self.more, "max_new_tokens": writing.tokens, "recorder": watch,
            "logits_processor": LogitsProcessorList([watch.scores]), "stopping_criteria": StoppingCriteriaList(ends),
            **(chosen if writing.temperature else {"do_sample": False}),
        }  # fmt: skip

    def _decoded(self, number: int) -> dict[str, Any]:
        """Return the options of ``generate`` for texts that a decoder writes."""
        model = self.ensemble.model
        own = model.limit_of_symbols
        count = self.writing.tokens * (1 if own == "max_new_tokens" else model.symbols_of_token)
        return {**self.more, own: count, "seed": self.writing.seed + number}


@contextmanager
def _naming(questions: Sequence[Question]) -> Iterator[None]:
    """Enter a context in which errors say which questions were asked."""
    try:
        yield
    except InvalidInputError as error:
        those = ", ".join(one.id for one in questions)
        raise InvalidInputError(f"{error} ({'the question' if len(questions) == 1 else 'among'} {those})") from error


def count_tokens(ensemble: Ensemble, text: str) -> int:
    """Return how many tokens a text has, as the first member has them, without those that begin every text."""
    own = ensemble.model.own_tokens
    return len(own(text)[0]) - len(own("")[0])


def _table(found: Sequence[Likelihood]) -> Float[Tensor, "n options"]:
    return torch.tensor([[one.log_prob, *one.members] for one in found], dtype=torch.float64).T


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


class Asked(Protocol):
    """Whatever can be asked: it has an id of its own."""

    @property
    def id(self) -> str:
        """Its name, which nothing else that is asked has."""


class Answering(Protocol):
    """One member or an ensemble that is asked: questions of a file in some form, or those of a task."""

    def ask(self, questions: Sequence[Any], number: int) -> list[Answered]:
        """Answer a batch of questions, the one of this number."""


def ask_all(
    asker: Callable[[], Answering],
    questions: Sequence[Asked],
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
