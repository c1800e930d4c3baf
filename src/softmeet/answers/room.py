"""Where everybody is asked the same questions, once, and the best member maybe several times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmeet.answers.asking import Answered, Answering, Writing, ask_all
from softmeet.answers.kept import Kept
from softmeet.answers.results import figures
from softmeet.answers.votes import majority

if TYPE_CHECKING:
    from softmeet.answers.subjects import Subject

# The temperature of answers that are voted on (Wang et al., Self-consistency, arXiv:2203.11171).
_VOTING = 0.7
# How far apart the seeds of votes are, of which each batch of questions has one.
_APART = 1_000_003
# The fewest and the most votes, where nobody says how many.
_FEWEST, _MOST = 3, 64


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
            how: the way to answer, one of ``votes.VOTED``.
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
