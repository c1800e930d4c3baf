"""Questions in lines of JSON, and the prompts that are made of them."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from softmeet.errors import InvalidInputError

T = TypeVar("T")
# Answers by the likelihood of options, and answers that are written.
LIKELIHOODS = ("option", "option-byte", "option-unconditional", "letter")
WRITTEN = ("number", "choice", "match", "code")
HOW = (*LIKELIHOODS, *WRITTEN)
# The most new tokens of an answer in words, where nothing else is asked for.
TOKENS = {"number": 320, "choice": 32, "match": 32, "code": 384}


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        id: its name in its file, which no other question has.
        question: its words.
        answer: the right answers: a letter, a number, or texts of which each is right.
        choices: the texts of options, in order; empty if it has none.
        solution: how the answer is found, as examples show it; empty if that is unknown.
        subject: what it is about; empty if that is not said.
        test, entry_point: of a question that is the beginning of a function in Python, code that defines ``check``, and
            the name of the function that it is given; else empty.
    """

    id: str
    question: str
    answer: tuple[str, ...]
    choices: tuple[str, ...] = ()
    solution: str = ""
    subject: str = ""
    test: str = ""
    entry_point: str = ""


def read_questions(path: Path) -> list[Question]:
    """Read questions from lines of JSON with ``id``, ``question`` and ``answer``, and maybe ``choices`` and so on.

    Raises:
        InvalidInputError: if a line is no such question, or two have one id; the message says which.
        OSError: if the file cannot be read.
    """
    found, lines = dict[str, Question](), path.read_text(encoding="utf-8").split("\n")
    for k, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = _question(json.loads(line), k)
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(
                f"expected a question in line {k} of {path}, JSON with id, question and answer, but {error!r}"
            ) from None
        if one.id in found:
            raise InvalidInputError(f"expected each id once in {path}, got {one.id!r} again in line {k}")
        found[one.id] = one
    if not found:
        raise InvalidInputError(f"expected questions in {path}, but it is empty")
    return list(found.values())


def _question(given: dict[str, Any], line: int) -> Question:
    answer = given["answer"]
    answers = tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)
    listed = given.get("choices") or []
    choices = tuple(map(str, listed))
    if not isinstance(listed, list) or len(choices) == 1 or not all(map(str.strip, choices)):
        raise ValueError(f"the choices are {listed!r}, no list of two texts or more")
    if not str(given["question"]).strip() or not answers or not all(map(str.strip, answers)):
        raise ValueError("the question or its answer is empty")
    if choices and (len(answers) > 1 or answers[0] not in string.ascii_uppercase[: len(choices)]):
        raise ValueError(f"the answer is {answers}, no letter of {len(choices)} choices")
    return Question(
        str(given.get("id", line)), str(given["question"]), answers, choices, str(given.get("solution") or ""),
        str(given.get("subject") or ""), str(given.get("test") or ""), str(given.get("entry_point") or ""),
    )  # fmt: skip


def spread(every: Sequence[T], limit: int | None) -> list[T]:
    """Return so many of some things, evenly spread; all of them if ``limit`` is None or more than there are.

    Example:
        >>> spread("abcdef", 3), spread("ab", 5)
        (['a', 'c', 'e'], ['a', 'b'])
    """
    size = len(every)
    count = size if limit is None else min(size, limit)
    return [every[k * size // count] for k in range(count)]


def usual(questions: Sequence[Question]) -> str:
    """Return how questions are usually answered: by the likelihood of options, as code, numbers, or short texts."""
    if all(one.test for one in questions):
        return "code"
    if all(one.choices for one in questions):
        return "option-byte"
    numbers = all(len(one.answer) == 1 and one.answer[0].lstrip("-").replace(".", "").isdecimal() for one in questions)
    return "number" if numbers else "match"


def require_fit(questions: Sequence[Question], how: str) -> None:
    """Raise InvalidInputError if questions cannot be answered so."""
    if how == "code" and (without := next((one for one in questions if not (one.test and one.entry_point)), None)):
        raise InvalidInputError(f"answers by code need questions with test and entry_point, and {without.id} has none")
    if how in ("number", "match") and (listed := next((one for one in questions if one.choices), None)):
        raise InvalidInputError(
            f"answers by {how} are for questions without choices, whose answer is no letter, and {listed.id} has some: "
            "say another --how, or ask them apart"
        )
    needs = how in LIKELIHOODS or how == "choice"
    if needs and (without := next((one for one in questions if not one.choices), None)):
        raise InvalidInputError(
            f"answers by {how} need questions with choices, and {without.id} has none: say --how number or match"
        )


@dataclass(frozen=True)
class Form:
    """How questions are put: a way to answer, and examples before them.

    Attributes:
        how: one of ``HOW``.
        shots: examples with their answers; those of a question's own subject are taken where any are.
        count: how many of them stand before a question.
    """

    how: str
    shots: Sequence[Question] = ()
    count: int = 0

    def prompt(self, question: Question) -> str:
        """Return the words to which the answer is written, or an option is put."""
        if self.how == "code":
            return question.question
        others = [one for one in self.shots if one.question != question.question]
        examples = ([one for one in others if one.subject == question.subject] or others)[: self.count]
        return "\n\n".join([*map(self.with_answer, examples), self._asked(question)])

    def with_answer(self, question: Question) -> str:
        """Return a question with its right answer, as examples show it."""
        return (
            question.question + question.answer[0]
            if self.how == "code"
            else (f"{self._asked(question)}{self._shown(question)}")
        )

    def _asked(self, question: Question) -> str:
        listed = self.how in ("letter", "choice")
        options = zip(string.ascii_uppercase, question.choices, strict=False) if listed else ()
        lines = [f"Question: {question.question}", *(f"{letter}. {text}" for letter, text in options), "Answer:"]
        return "\n".join(lines)

    def _shown(self, question: Question) -> str:
        if self.how == "number":
            return f" {question.solution or question.answer[0]}"
        if self.how in ("letter", "choice", "match"):
            return f" {question.answer[0]}"
        return f" {question.choices[string.ascii_uppercase.index(question.answer[0])]}"

    def options(self, question: Question) -> list[str]:
        """Return the texts whose likelihoods behind the prompt are compared."""
        if self.how == "letter":
            return [f" {letter}" for letter in string.ascii_uppercase[: len(question.choices)]]
        return [f" {text}" for text in question.choices]
