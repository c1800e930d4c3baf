"""``softmeet answer``: who answers how many questions rightly, members alone and ensembles of them."""

from __future__ import annotations

import hashlib
import json as writing
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmeet import __version__
from softmeet.answers.questions import (
    HOW,
    LIKELIHOODS,
    TOKENS,
    Form,
    Question,
    read_questions,
    require_fit,
    spread,
    usual,
)
from softmeet.cli import options
from softmeet.cli.answer_tables import show
from softmeet.cli.flags import Flags, argument, at_least_one, flag, flags, optional, switch
from softmeet.cli.messages import say
from softmeet.cli.progress import progress, working
from softmeet.cli.texts import ResultFlags, require_places
from softmeet.errors import InvalidInputError
from softmeet.evaluation.record import Record
from softmeet.extras import require_extra
from softmeet.members.files import is_files
from softmeet.members.member import Member
from softmeet.members.names import require_there
from softmeet.rules.frozen import unknown

if TYPE_CHECKING:
    from softmeet.answers.asking import Answered, Answering, Asked, Writing
    from softmeet.answers.subjects import Subject

# How many examples stand before a question of a file.
_SHOTS = 4


class FormFlags(Flags, panel="Text"):
    """Flags for how questions are put, and what is before them."""

    how: str | None = optional(
        "How questions are answered. Without it: option-byte with choices, code with tests, number if all answers are, "
        "else match. By likelihood of: option (the sum over its text), option-byte (a byte), "
        "option-unconditional (less that without the question), letter. In words: number, choice (a letter), match, "
        "code.",
        shown="by what the file has",
    )
    shots: Path | None = optional(
        "A file of questions with answers, as examples. First those of the same subject are taken."
    )
    count: int | None = optional(
        "With --shots, or in a task, how many examples stand before each question.",
        shown="4; of a task its own number",
        min=0,
    )
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
        count = _SHOTS if self.count is None else self.count
        return spread(every, self.limit), Form(how, tuple(examples), count if examples else 0)


class HarnessFlags(Flags, panel="Text"):
    """Flags for tasks of the lm-evaluation-harness, and for what it has written."""

    task: str | None = optional(
        "Ask a task of the lm-evaluation-harness, or all tasks of a group, by its name: one that comes with the "
        "harness, or of the folder of tasks in YAML that stands in place of QUESTIONS."
    )
    metric: str | None = optional(
        "By which metric, of values 0 and 1, answers to a task are right: NAME or NAME,FILTER.",
        shown="the first of acc_norm, acc and exact_match, else another",
    )
    from_lm_eval: list[Path] | None = optional(
        "Ask nobody, but compare what lm_eval --log_samples --output_path OUT has written: OUT, a model's folder in "
        "it, or a file samples_TASK_DATE.jsonl. It can be repeated."
    )


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
        "A file with a question in each line, JSON: id, question, answer, maybe choices. Or a folder of tasks of the "
        "lm-evaluation-harness."
    ),
    members: options.Members = None,
    ensembles: list[str] | None = optional(
        "An ensemble: NAME=A B RULE, members by their names or the last part of those of -m, and maybe files:PATH, "
        "vocabulary=union, gate=safe or decoder=agreement; or NAME=SAVED. An average goes by size unless it names "
        "weights, as logit-mean:weights=1/1 does. It can be repeated.",
        "--ensemble",
        "-e",
        panel="Models",
    ),
    instead: list[str] | None = optional(
        "A single model that you could run in place of the members, such as the next larger one: it is asked, too, but "
        "is no member. It can be repeated.",
        "--instead",
        metavar="NAME",
        panel="Models",
    ),
    form: FormFlags,
    harness: HarnessFlags,
    words: WritingFlags,
    answers: Path | None = optional("Write all answers to this file, in lines of JSON.", panel="Output"),
    result: ResultFlags,
) -> None:
    """Ask models questions, alone and together, and count right answers, with margins of error.

    Every member is asked alone, too, and each row is set against the best of them, question by question (McNemar's
    exact test). A last row has the questions that any member answers rightly. With -m files:PATH everybody is asked
    once more beside these files.

    Example: softmeet answer questions.jsonl -m A -m B -e 'both=A B logit-mean' --shots train.jsonl
    """
    record = Record()
    result.require(None, answers)
    require_places(answers)
    if answers is not None and answers.resolve() in [path.resolve() for path in (questions, result.as_json) if path]:
        raise InvalidInputError(f"expected a file of its own for --answers, got {answers}, which is another's")
    who = partial(_who, members, ensembles, instead)
    if harness.from_lm_eval:
        _require_none("--from-lm-eval, which asks nobody", {"-m": members, "-e": ensembles, "--instead": instead})
        found = _compared(questions, harness, form, words, result)
    else:
        is_task = harness.task or (questions is not None and questions.is_dir())
        asked = _task if is_task else _file
        found = _asked(asked(questions, form, harness, words, who), words.votes, result)
    figures = found.facts | {"run": {"softmeet": __version__, **found.told, **record.facts(found.seeds)}}
    result.report(figures, show)
    if answers is not None:
        from pydantic_core import to_jsonable_python

        from softmeet.answers.results import lines
        from softmeet.evaluation.files import write_text

        told = to_jsonable_python(lines(found.answers), inf_nan_mode="null")
        write_text(answers, "".join(f"{writing.dumps(one, ensure_ascii=False)}\n" for one in told))
        say(f"answers are in {answers}")


def _who(members: list[str] | None, ensembles: list[str] | None, instead: list[str] | None) -> list[Subject]:
    named = members or [] if ensembles else options.named(members)
    require_there([*(line for line in named if not (ensembles and is_files(line))), *(instead or ())])
    from softmeet.answers.subjects import subjects

    found = subjects(named, ensembles or [], instead or [])
    require_there(dict.fromkeys(line for one in found for line in (*one.members, *one.beside)))
    return found


def _require_none(what: str, given: Mapping[str, Any]) -> None:
    if stray := next((name for name, value in given.items() if value), None):
        raise InvalidInputError(f"{stray} does not go with {what}: leave it out")


@dataclass(frozen=True)
class _Work:
    """What is asked of whom, and how.

    Attributes:
        asked: the questions.
        who: everybody who is asked.
        way: how answers are written.
        told: what answers depend on beside these two, as JSON has it.
        facts: what a table's reader has to know of it, as JSON has it.
        answering: returns a loaded ensemble as one who answers.
        voting: the way to answer, if there are votes on it.
    """

    asked: Sequence[Asked]
    who: Sequence[Subject]
    way: Writing
    told: dict[str, Any]
    facts: dict[str, Any]
    answering: Callable[[Any, Writing, Subject], Answering]
    voting: str | None = None


@dataclass(frozen=True)
class _Found:
    """What has come of it: figures and answers, what they depend on, and seeds."""

    facts: dict[str, Any]
    answers: Mapping[str, Sequence[Answered]]
    told: dict[str, Any]
    seeds: list[int]


def _file(
    questions: Path | None,
    form: FormFlags,
    harness: HarnessFlags,
    words: WritingFlags,
    who: Callable[[], list[Subject]],
) -> _Work:
    """Read a file of questions."""
    if questions is None:
        raise InvalidInputError("expected a file of questions: softmeet answer questions.jsonl -m A -m B")
    _require_none("a file of questions", {"--metric": harness.metric})
    asked, put = form.read(questions)
    if put.how == "code" and not words.run_code:
        raise InvalidInputError("answers by code are judged by running what members write: allow that by --run-code")
    require_extra("answer", "eval", "scipy")
    if put.how in LIKELIHOODS:
        written = {"--max-new-tokens": words.max_new_tokens, "--temperature": words.temperature, "--chat": words.chat}
        _require_none(f"answers by {put.how}, which are not written", written | {"--votes": words.votes})
    subjects = who()
    _require_likelihoods(subjects, f"answers by {put.how} need", put.how in LIKELIHOODS)
    from softmeet.answers.asking import Asker, Writing
    from softmeet.answers.room import VOTED

    way = Writing(
        words.max_new_tokens or TOKENS.get(put.how, 0), words.temperature, words.seed, words.chat, words.batch
    )
    told = {"form": [put.how, put.count], "questions": _hash([*asked, *put.shots])}

    def answering(ensemble: Any, way: Writing, one: Subject) -> Asker:
        return Asker(ensemble, put, way, dict(one.writing))

    return _Work(asked, subjects, way, told, {"how": put.how}, answering, put.how if put.how in VOTED else None)


def _task(
    folder: Path | None, form: FormFlags, harness: HarnessFlags, words: WritingFlags, who: Callable[[], list[Subject]]
) -> _Work:
    """Find a task of the harness, and its data."""
    if folder is not None and not folder.is_dir():
        raise InvalidInputError(f"expected a file of questions or --task, got both: {folder} is no folder of tasks")
    own = {"--max-new-tokens": words.max_new_tokens, "--temperature": words.temperature, "--votes": words.votes}
    _require_none("a task, which says itself how it is asked", {"--how": form.how, "--shots": form.shots, **own})
    require_extra("answer", "eval", "scipy")
    require_extra("a task", "lm-eval", "lm_eval")
    subjects = who()
    _require_likelihoods(subjects, "tasks of the lm-evaluation-harness need")
    with working("reading the task"):
        from softmeet.answers.asking import Writing
        from softmeet.answers.harness import TaskAsker, find_tasks, require_one_template

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        tasks = find_tasks(harness.task, folder, count=form.count, metric=harness.metric, run_code=words.run_code)
        for one in subjects if words.chat else ():
            require_one_template(one.members)
    asked = tasks.questions(form.limit)
    told = {"metrics": tasks.written(), "questions": tasks.hash(asked)}
    way = Writing(0, 0.0, words.seed, words.chat, words.batch)

    def answering(ensemble: Any, way: Writing, one: Subject) -> TaskAsker:
        return TaskAsker(ensemble, tasks, way)

    return _Work(asked, subjects, way, told, {"how": "lm-eval", "metrics": tasks.written()}, answering)


def _asked(work: _Work, votes: int | None, result: ResultFlags) -> _Found:
    """Ask everybody."""
    from softmeet.answers.results import figures
    from softmeet.answers.room import Room

    told, loaded = {**work.told, "writing": asdict(work.way)}, dict[Any, Any]()

    def answering(one: Subject, way: Writing) -> Answering:
        return work.answering(_loaded(one, loaded), way, one)

    with result.stoppable(), progress() as begin:
        room = Room(work.asked, told, answering, result.resume, begin)
        found = {one.name: room.ask(one, work.way, one.name) for one in work.who}
        if votes != 0 and work.voting and any(len(one.members) > 1 for one in work.who):
            found |= room.voted(work.who, found, work.way, work.voting, votes)
    facts = figures([one.name for one in work.who if one.is_member], found) | work.facts
    drawn = work.way.temperature or (work.voting is None and "metrics" in work.facts)
    from softmeet.members.native import with_engine

    lines = dict.fromkeys(str(with_engine(Member.of(line))) for one in work.who for line in one.members)
    files = dict.fromkeys(line for one in work.who for line in one.beside)
    told |= {"members": [*lines], **({"files": [*files]} if files else {})}
    return _Found(facts, found, told, [work.way.seed] if drawn else [])


def _compared(
    questions: Path | None, harness: HarnessFlags, form: FormFlags, words: WritingFlags, result: ResultFlags
) -> _Found:
    """Read what the harness has written."""
    asked = {"QUESTIONS": questions, "--task": harness.task, "--how": form.how, "--shots": form.shots}
    later = {"--count": form.count, "--chat": words.chat, "--votes": words.votes, "--resume": result.resume}
    _require_none("--from-lm-eval, which asks nobody", asked | later)
    require_extra("answer", "eval", "scipy")
    from softmeet.answers.results import figures
    from softmeet.answers.samples import compare

    paths = harness.from_lm_eval or []
    found = compare(paths, harness.metric, form.limit)
    if found.left_out:
        say(f"questions that not all were asked are left out: {found.left_out:,}")
    if found.reworded:
        say(
            "questions that were put to some in other words, as where examples or chat templates differ: "
            f"{found.reworded:,}"
        )
    facts = {"how": "lm-eval", "metrics": found.metrics, "left_out": found.left_out, "reworded": found.reworded}
    return _Found(figures(list(found.answers), found.answers) | facts, found.answers, {"paths": [*map(str, paths)]}, [])


def _require_likelihoods(who: Sequence[Subject], what: str, needed: bool = True) -> None:
    """Check, before anything is loaded, that everybody can be asked so."""
    for one in who if needed else ():
        if one.loading.get("vocabulary", "").startswith("union") or one.writing:
            raise InvalidInputError(
                f"{what} the likelihood of a text, and {one.name} gives none: ask a file of questions, by --how choice"
            )


def _loaded(one: Subject, loaded: dict[Any, Any]) -> Any:
    with working(f"loading {one.name}"):
        from softmeet.ensemble import Ensemble
        from softmeet.hf.by_size import untold

        given: dict[str, Any] = {**one.loading, "loaded": loaded}
        with untold():
            return Ensemble.from_pretrained(one.named, one.rule, **given)


def _hash(questions: Sequence[Question]) -> str:
    return hashlib.sha256(writing.dumps([asdict(one) for one in questions]).encode()).hexdigest()
