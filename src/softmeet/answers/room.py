"""Where everybody is asked the same questions, once, and the best member maybe several times."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from softmeet import __version__
from softmeet.answers import extract
from softmeet.answers.asking import Answered, Answering, Writing, ask_all
from softmeet.answers.questions import Question
from softmeet.answers.results import figures
from softmeet.evaluation.files import room_for, turn_at, write_atomically, write_text

if TYPE_CHECKING:
    from softmeet.answers.subjects import Subject

# The temperature of answers that are voted on (Wang et al., Self-consistency, arXiv:2203.11171).
_VOTING = 0.7
# How far apart the seeds of votes are, of which each batch of questions has one.
_APART = 1_000_003
# The fewest and the most votes, where nobody says how many.
_FEWEST, _MOST = 3, 64
_ANSWER = TypeAdapter(Answered)
# Ways to answer of which several answers can say the same.
VOTED = ("number", "choice", "match")


def said(how: str, text: str, question: Question) -> str | None:
    """Return what an answer in words says, in one form for all that say the same; None if it says nothing.

    Example:
        >>> said("number", "so it is 15.0", Question("1", "?", ("15",)))
        '15'
    """
    if how == "number":
        found = extract.number(text)
        return None if found is None else f"{found.normalize():f}"
    if how == "choice":
        return extract.letter(text, len(question.choices))
    return extract.tidy(text.strip().partition("\n")[0]) or None


def majority(how: str, questions: Sequence[Question], rounds: Sequence[Sequence[Answered]]) -> list[Answered]:
    """Return for each question the first of those answers that say what most of them say.

    Answers that say nothing have no vote; of equals what was said first wins. Seconds and tokens are those of all.

    Args:
        how: the way to answer, one of ``VOTED``.
        questions: the questions.
        rounds: in each round an answer to each question.
    """
    found = list[Answered]()
    for question, *answers in zip(questions, *rounds, strict=True):
        each = [said(how, one.answer, question) for one in answers]
        votes = Counter(word for word in each if word is not None)
        chosen = each.index(votes.most_common(1)[0][0]) if votes else 0
        one = answers[chosen]
        seconds, tokens = sum(own.seconds for own in answers), sum(own.tokens for own in answers)
        found.append(Answered(one.id, one.answer, one.right, seconds, tokens))
    return found


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


@dataclass(frozen=True)
class Room:
    """Where everybody is asked the same questions.

    Attributes:
        asked: the questions, each with an ``id``.
        told: what all answers depend on, as JSON has it.
        answering: loads a subject, and returns it as one who answers in a way of writing.
        resume: the folder in which answers are kept; None for none.
        begin: begins a piece of work on the terminal.
    """

    asked: Sequence[Any]
    told: dict[str, Any]
    answering: Callable[[Subject, Writing], Answering]
    resume: Path | None
    begin: Callable[[str, int, int | None], Callable[[int], None]]

    def ask(self, one: Subject, way: Writing, title: str) -> list[Answered]:
        """Have one subject answer, in this way; ``title`` is shown meanwhile."""
        kept = Kept(self.resume, {**self.told, "writing": asdict(way), "subject": one.facts()})
        advance = self.begin(title, len(kept.answers), len(self.asked))

        def keep(batch: Sequence[Answered]) -> None:
            kept.keep(batch)
            advance(len(batch))

        return ask_all(lambda: self.answering(one, way), self.asked, way.batch, kept.answers, keep)

    def voted(
        self,
        who: Sequence[Subject],
        found: Mapping[str, Sequence[Answered]],
        way: Writing,
        how: str,
        count: int | None,
    ) -> dict[str, list[Answered]]:
        """Have the best member answer several times, and return what most of its answers say, by a name.

        Args:
            who: everybody who was asked.
            found: what they answered, by name.
            way: the way in which they wrote.
            how: the way to answer, one of ``VOTED``.
            count: how many votes; None for as many as take the time of the dearest ensemble.
        """
        name = figures([one.name for one in who if one.is_member], found)["best_member"]
        best = next(one for one in who if one.name == name)
        dearest = max(_seconds(found[one.name]) for one in who if len(one.members) > 1)
        rounds: list[list[Answered]] = []
        spent = 0.0
        while len(rounds) < (count or _FEWEST) or (count is None and spent < dearest and len(rounds) < _MOST):
            other = replace(way, temperature=_VOTING, seed=way.seed + _APART * (len(rounds) + 1))
            rounds.append(self.ask(best, other, f"{name}, vote {len(rounds) + 1}"))
            spent += _seconds(rounds[-1])
        return {f"{name}, {len(rounds)} votes": majority(how, self.asked, rounds)}


def _seconds(answers: Sequence[Answered]) -> float:
    return sum(one.seconds for one in answers)
