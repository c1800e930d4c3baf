"""``softmeet answer``: who answers how many questions rightly, members alone and ensembles of them."""

from __future__ import annotations

import hashlib
import json as writing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmeet import __version__
from softmeet.answers.questions import HOW, LIKELIHOODS, Form, Question, read_questions, require_fit, usual
from softmeet.cli import options
from softmeet.cli.flags import Flags, argument, at_least_one, flag, flags, optional, switch
from softmeet.cli.messages import say
from softmeet.cli.progress import progress, working
from softmeet.cli.tables import out, print_table
from softmeet.cli.texts import ResultFlags, require_places
from softmeet.errors import InvalidInputError
from softmeet.evaluation.record import Record
from softmeet.extras import require_extra
from softmeet.rules.frozen import unknown

if TYPE_CHECKING:
    from softmeet.answers.asking import Answered, Asker, Writing
    from softmeet.answers.subjects import Subject

# The most new tokens of an answer, where nothing else is asked for.
_TOKENS = {"number": 320, "choice": 32, "match": 32, "code": 384}
# The temperature of answers that are voted on (Wang et al., Self-consistency, arXiv:2203.11171).
_VOTING = 0.7
# How far apart the seeds of votes are, of which each batch of questions has one.
_APART = 1_000_003
# The fewest and the most votes, where nobody says how many.
_FEWEST, _MOST = 3, 64


class FormFlags(Flags, panel="Text"):
    """Flags for how questions are put, and what is before them."""

    how: str | None = optional(
        "How questions are answered. By likelihood of: option (the sum over its text), option-byte (a byte), "
        "option-unconditional (less that without the question), letter. In words: number, choice (a letter), match, "
        "code.",
        shown="option-byte with choices, code with tests, number if all answers are, else match",
    )
    shots: Path | None = optional("A file of questions from which examples are taken, first those of the same subject.")
    count: int = flag(4, "With --shots, how many examples stand before each question.", min=0)
    limit: int | None = at_least_one("Ask so many of the questions, evenly spread.", shown="all")

    def read(self, path: Path) -> tuple[list[Question], Form]:
        """Read the questions, and return them with how they are put.

        Raises:
            InvalidInputError: if they cannot be answered so, or a file is none of questions.
            OSError: if a file cannot be read.
        """
        every, examples = read_questions(path), read_questions(self.shots) if self.shots else []
        how = self.how or usual(every)
        if how not in HOW:
            raise unknown(f"unknown way to answer {how!r}", how, list(HOW))
        require_fit([*every, *examples], how)
        size = len(every)
        chosen = every if self.limit is None else [every[k * size // self.limit] for k in range(min(size, self.limit))]
        return chosen, Form(how, tuple(examples), self.count if examples else 0)


class WritingFlags(Flags, panel="Sampling"):
    """Flags for answers in words, and how many are asked for at once."""

    batch: int = flag(8, "How many questions are asked at once.", min=1)
    max_new_tokens: int | None = at_least_one(
        "The most tokens of an answer in words.", shown="320 for number, 384 for code, else 32"
    )
    temperature: float = flag(0.0, "The temperature of answers in words; 0 takes the likeliest tokens.", min=0)
    seed: int = flag(0, "The seed of draws.", min=0)
    chat: bool = switch("Put questions, for answers in words, by each member's chat template.")
    votes: int | None = optional(
        "Beside ensembles, also ask the best member so many times at temperature 0.7 and take what most answers say; 0 "
        "leaves that out.",
        shown="as many as take the time of the dearest ensemble, from 3 to 64",
        min=0,
    )
    run_code: bool = switch("Run the code that members write for --how code, with limits that are no prison.")


@flags()
def answer(
    *,
    questions: Path | None = argument(
        "A file with a question in each line, JSON: id, question, answer, maybe choices."
    ),
    members: options.Members = None,
    ensembles: list[str] | None = optional(
        "An ensemble: NAME=A B RULE, members by their names or the last part of those of -m, and maybe "
        "vocabulary=union, gate=safe or decoder=agreement; or NAME=SAVED. It can be repeated.",
        "--ensemble",
        "-e",
        panel="Members",
    ),
    instead: list[str] | None = optional(
        "A single model that you could run in place of the members, such as the next larger one: it is asked, too, but "
        "is no member. It can be repeated.",
        "--instead",
        metavar="NAME",
        panel="Members",
    ),
    form: FormFlags,
    words: WritingFlags,
    answers: Path | None = optional("Write all answers to this file, in lines of JSON.", panel="Output"),
    result: ResultFlags,
) -> None:
    """Ask members and ensembles questions, and say how many they answer rightly, with 95 % intervals.

    Every member is asked alone, too, and each row is set against the best of them, question by question (McNemar's
    exact test). A last row has the questions that any member answers rightly.

    Example: softmeet answer questions.jsonl -m A -m B -e 'both=A B logit-mean' --shots train.jsonl
    """
    record = Record()
    if questions is None:
        raise InvalidInputError("expected a file of questions: softmeet answer questions.jsonl -m A -m B")
    result.require(None, answers)
    require_places(answers)
    if answers is not None and answers.resolve() in (questions.resolve(), result.as_json and result.as_json.resolve()):
        raise InvalidInputError(f"expected a file of its own for --answers, got {answers}, which is another's")
    asked, put = form.read(questions)
    if put.how == "code" and not words.run_code:
        raise InvalidInputError("answers by code are judged by running what members write: allow that by --run-code")
    require_extra("answer", "eval", "scipy")
    from softmeet.answers.subjects import subjects

    who = subjects(options.named(members), ensembles or [], instead or [])
    _require_likelihoods(who, put)
    from softmeet.answers.asking import Writing
    from softmeet.answers.results import figures, lines
    from softmeet.answers.votes import VOTED

    how = Writing(
        words.max_new_tokens or _TOKENS.get(put.how, 0), words.temperature, words.seed, words.chat, words.batch
    )
    told = {"form": [put.how, put.count], "writing": asdict(how), "questions": _hash([*asked, *put.shots])}
    with result.stoppable(), progress() as begin:
        room = _Room(asked, put, told, result.resume, begin, {})
        found = {one.name: room.ask(one, how, one.name) for one in who}
        if words.votes != 0 and put.how in VOTED and any(len(one.members) > 1 for one in who):
            found |= room.voted(who, found, how, words.votes)
    run = {"softmeet": __version__, **told, **record.facts([how.seed] if how.temperature else [])}
    facts = figures(who, found) | {"how": put.how, "run": run}
    result.report(facts, show)
    if answers is not None:
        answers.write_text("".join(f"{writing.dumps(one, ensure_ascii=False)}\n" for one in lines(found)), "utf-8")
        say(f"answers are in {answers}")


@dataclass(frozen=True)
class _Room:
    """Where everybody is asked the same questions.

    Attributes:
        asked: the questions.
        put: how they are put.
        told: what all answers depend on, as JSON has it.
        resume: the folder in which they are kept; None for none.
        begin: begins a piece of work on the terminal.
        loaded: members that were loaded.
    """

    asked: Sequence[Question]
    put: Form
    told: dict[str, Any]
    resume: Path | None
    begin: Callable[[str, int, int | None], Callable[[int], None]]
    loaded: dict[Any, Any]

    def ask(self, one: Subject, way: Writing, title: str) -> list[Answered]:
        """Have one subject answer, in this way."""
        from softmeet.answers.asking import Asker, ask_all
        from softmeet.answers.kept import Kept

        kept = Kept(self.resume, {**self.told, "writing": asdict(way), "subject": one.facts()})
        advance = self.begin(title, len(kept.answers), len(self.asked))

        def keep(batch: Sequence[Answered]) -> None:
            kept.keep(batch)
            advance(len(batch))

        def asker() -> Asker:
            return Asker(_loaded(one, self.loaded), self.put, way, dict(one.writing))

        return ask_all(asker, self.asked, way.batch, kept.answers, keep)

    def voted(
        self, who: Sequence[Subject], found: Mapping[str, Sequence[Answered]], how: Writing, count: int | None
    ) -> dict[str, list[Answered]]:
        """Have the best member answer several times, and return what most of its answers say, by a name."""
        from softmeet.answers.results import figures
        from softmeet.answers.votes import majority

        name = figures(who, found)["best_member"]
        best = next(one for one in who if one.name == name)
        dearest = max(_seconds(found[one.name]) for one in who if len(one.members) > 1)
        rounds: list[list[Answered]] = []
        spent = 0.0
        while len(rounds) < (count or _FEWEST) or (count is None and spent < dearest and len(rounds) < _MOST):
            way = replace(how, temperature=_VOTING, seed=how.seed + _APART * (len(rounds) + 1))
            rounds.append(self.ask(best, way, f"{name}, vote {len(rounds) + 1}"))
            spent += _seconds(rounds[-1])
        return {f"{name}, {len(rounds)} votes": majority(self.put.how, self.asked, rounds)}


def _seconds(answers: Sequence[Answered]) -> float:
    return sum(one.seconds for one in answers)


def _require_likelihoods(who: Sequence[Subject], form: Form) -> None:
    """Check, before anything is loaded, that everybody can be asked so."""
    if form.how not in LIKELIHOODS:
        return
    for one in who:
        if one.loading.get("vocabulary", "").startswith("union") or one.writing:
            raise InvalidInputError(
                f"answers by {form.how} need the likelihood of a text, and {one.name} gives none: say --how choice"
            )


def _loaded(one: Subject, loaded: dict[Any, Any]) -> Any:
    with working(f"loading {one.name}"):
        from softmeet.ensemble import Ensemble

        given: dict[str, Any] = {**one.loading, "loaded": loaded}
        return Ensemble.from_pretrained(one.saved or list(one.members), one.rule, **given)


def _hash(questions: Sequence[Question]) -> str:
    return hashlib.sha256(writing.dumps([asdict(one) for one in questions]).encode()).hexdigest()


def show(facts: dict[str, Any]) -> None:
    """Print the figures of :func:`softmeet.answers.results.figures`."""
    console = out()
    rows = [
        (
            _shown(row), _percent(row["right"], row["ci95"]),
            _percent(row["against"]["delta"], row["against"]["ci95"], "+") if "against" in row else "the best member",
            f"{row['against']['p']:.2g}" if "against" in row else "",
            f"{row['seconds']:.2f}" if "seconds" in row else "", f"{row['tokens']:.0f}" if "tokens" in row else "",
        )
        for row in facts["rows"]
    ]  # fmt: skip
    columns = ("", "right, %", "against the best member, %", "p", "s a question", "tokens a question")
    print_table(console, columns, [rows], title=f"{facts['questions']:,} questions, answered by {facts['how']}")
    console.print(
        "Shares have Wilson's 95 % intervals, differences at the same questions Bonett's and Price's, and p is that of "
        "McNemar's exact test. The best member is the best on these very questions."
    )
    doubts = [row for row in facts["rows"] if row.get("doubt")]
    if doubts:
        names = list(dict.fromkeys(name for row in doubts for name in row["doubt"]))
        cells = [[_shown(row), *(_area(row["doubt"].get(name)) for name in names)] for row in doubts]
        print_table(console, ["", *names], [cells], title="How well doubt tells wrong answers from right ones (AUROC)")


def _shown(row: dict[str, Any]) -> str:
    return options.short(row["name"]) if "/" in row["name"] else str(row["name"])


def _area(found: dict[str, Any] | None) -> str:
    return "" if found is None else "{:.2f} [{:.2f}, {:.2f}]".format(found["auroc"], *found["ci95"])


def _percent(share: float, interval: Sequence[float], sign: str = "") -> str:
    mean, low, high = (f"{100 * x:{sign}.0f}" for x in (share, *interval))
    return f"{mean} [{low}, {high}]"
