"""``softmeet advise``: say, from a text, whether members are worth combining, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from softmeet.answers.questions import Form
from softmeet.cli import answer_tables, options, texts
from softmeet.cli.answer import FormFlags
from softmeet.cli.flags import Flags, argument, at_least_one, flag, flags, optional, switch
from softmeet.cli.messages import say
from softmeet.cli.progress import progress, working
from softmeet.cli.tables import candidate, counted, difference, out, print_table
from softmeet.errors import InvalidInputError
from softmeet.extras import require_extra
from softmeet.members.files import is_files
from softmeet.members.member import Member
from softmeet.members.names import require_there
from softmeet.members.registered import refuse_servers


class AdvisedTextFlags(texts.DocumentFlags):
    """Flags for which text is read, and how much of it, or how much the members write in its place."""

    bos: bool = switch("Begin each document with the token for the beginning of a text (BOS).")
    most: int | None = at_least_one(
        "The most bytes of the text to read, spread over its documents; more make the answer surer, and take longer.",
        "--bytes",
        shown="as many as take minutes: at most 80,000",
    )
    tokens: int = flag(
        1000,
        "Without --text and files: the tokens (over bytes: bytes) that the members write themselves, for a less "
        "certain answer.",
        min=100,
    )
    questions: Path | None = optional(
        "A file of questions with their answers, as softmeet answer takes it: right answers are then told beside bits, "
        "and without --text the questions with their answers are the text.",
    )


class FindingFlags(Flags, panel="Finding weights"):
    """Flags for what members are compared with, and by how many parts of the text."""

    instead: list[str] | None = optional(
        "A single model that you could run in place of them; what the same compute buys in it is measured. It "
        "can be repeated.",
        "--instead",
        metavar="NAME",
    )
    folds: int = flag(
        5,
        "The number of parts (folds) of the text; what is fitted without one is judged on it.",
        min=2,
    )


class AdviceFlags(texts.ResultFlags):
    """Flags for where what is advised is written."""

    saved: Path | None = optional("Save the mix that is advised in this folder.", "--save")
    html: Path | None = optional("Write a self-contained HTML page with plots to this path.")


@flags()
def advise(
    *,
    named: list[str] | None = argument(
        "Two models or more, as -m takes them; or one and more, beside files:PATH.", metavar="MODEL..."
    ),
    members: options.Members = None,
    source: AdvisedTextFlags,
    form: FormFlags,
    finding: FindingFlags,
    result: AdviceFlags,
    loading: options.LoadingFlags,
    running: options.EngineFlags,
) -> None:
    """Say, from a text of yours, whether models are worth combining, how, and what it costs.

    It fits averages, and meet where it differs from them, on some of the documents and judges them on the others, and
    measures what each member and the ensemble cost. Give text like that which you will use them on, and on which no
    member was trained. With files:PATH it says whether these are worth having beside them; without text, on some of
    these files themselves, each read without itself.

    Example: softmeet advise wide/gpt2 wide/llama --text 'books/*.txt' --save my-ensemble
    """
    questions, instead, saved, html = source.questions, finding.instead, result.saved, result.html
    every = options.named([*(named or ()), *(members or ())])
    require_there([*every, *(instead or ())])
    from softmeet.evaluation.files import PieceCache, require_ensemble_folder

    require_extra("advise", "eval", "psutil", "scipy", *["matplotlib"] * bool(html))
    if saved is not None:
        require_ensemble_folder(saved)
        refuse_servers(Member.of(line) for line in every if not is_files(line))
    result.require(saved, html, saved and saved / "config.json")
    documents = source.documents() if source.text else None
    asked, put = form.read(questions) if questions else ([], Form(""))
    if put.how == "code":
        raise InvalidInputError("advise runs no code that members write: ask such questions by softmeet answer")
    ensemble = loading.ensemble(every)
    from softmeet.answers.advised import documents_of, right_answers
    from softmeet.evaluation import advise as advising
    from softmeet.evaluation.own_files import hold_out
    from softmeet.evaluation.positions import observe_text
    from softmeet.evaluation.verdict import figures

    documents, cut = documents_of(asked, put) if asked and documents is None else documents, dict[str, int]()
    with working("reading files") as reading_files:
        text = hold_out(ensemble, documents, reading_files)
    held_out, documents = documents is None and text is not None, text
    with result.stoppable(), running.start(ensemble) as engine, progress() as begin:
        if documents is None:
            found = advising.own_documents(ensemble, source.tokens, begin)
            cut["max_per_document"] = math.ceil(source.tokens / len(found))
        else:
            found = advising.within_budget(ensemble, documents, source.most)
        settings = {"bos": source.bos, "folds": finding.folds, "threads": running.threads, **cut}
        kept = PieceCache(result.resume, texts.pinned(ensemble, found) | settings)
        reading = partial(begin, f"reading the text, in {ensemble.model.config.vocabulary}", 0)
        positions = observe_text(ensemble, found, bos=source.bos, engine=engine, cache=kept, begin=reading, **cut)
        where: dict[str, Any] = {"engine": engine, "cache": kept}
        advice = advising.advise(
            ensemble, found, positions, held_out=held_out, folds=finding.folds, begin=begin, **where
        )
        for name in instead or ():
            advice.alternatives.append(advising.alternative(name, found, loading.arguments(), begin, bos=source.bos))
        right = right_answers(advice, asked, put, {**loading.arguments(), "vocabulary": None}, begin) if asked else None
    facts = figures(advice) | {"own_text": documents is None, "answers": right}
    result.report(facts, show)
    if html is not None:
        _write_page(advice, facts, html)
    if saved is not None:
        _save(advice, facts, saved)


def _write_page(advice: Any, facts: dict[str, Any], path: Path) -> None:
    """Write figures and plots as a page."""
    from softmeet.evaluation.files import write_text
    from softmeet.evaluation.page import page

    says = f"{facts['plainly']} {facts['says']}" if facts["files"] else facts["says"]
    write_text(path, page(advice.judged, says, tables(facts), cautions(facts), differences(facts)))
    say(f"written to {path}")


def _save(advice: Any, facts: dict[str, Any], folder: Path) -> None:
    """Save the ensemble that is advised, unless a model that is no member is."""
    from softmeet.evaluation.save import save

    if facts["rule"] is None:
        say(f"nothing is saved in {folder}: what is advised is a single model")
        return
    save(advice.ensemble, advice.fitted, folder, facts["says"])
    alone, worth_it = facts["verdict"] == "single", facts["worth_it"]
    say(f"saved in {folder}: {'the model alone' if alone else 'the mix' if worth_it else 'the mix all the same'}")


def show(facts: dict[str, Any]) -> None:
    """Print the figures of ``softmeet advise`` on stdout: what to do, tables of members and candidates, and how.

    Args:
        facts: the figures, as :func:`softmeet.evaluation.verdict.figures` returns them.
    """
    console = out()
    console.print(facts["plainly"], style="bold")
    console.print(_MEANT)
    for (title, columns, rows), wide in zip(tables(facts), ((0,), (0, 3, 4), (0,)), strict=False):
        print_table(console, columns, [rows], title=title, texts=wide)
    console.print(differences(facts))
    for caution in cautions(facts):
        console.print(caution, style="yellow", highlight=False)
    rather = facts["worth_it"] or facts["verdict"] == "single"
    console.print(facts["says"] if rather else f"To combine them all the same: {facts['says']}")
    if facts["answers"]:
        answer_tables.show(facts["answers"])


_MEANT = (
    "Bits say how hard each byte of the text was to predict: fewer are better. A gain is bits saved, ± a 95 % "
    "interval: one that is wider than the gain itself may be chance. Weights say how much each model counts, in the "
    "models' order. All this is of predicting the text; who answers questions better is counted by softmeet answer."
)


def tables(facts: dict[str, Any]) -> list[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    """Return (title, columns, rows) of the table of models alone and of that of fitted candidates."""
    many = counted(facts["documents"], "document")
    unit = "" if facts["vocabulary"] == "bytes" else f"{facts['tokens']:,} tokens, "
    spread = f"{facts['clusters']['count']} {facts['clusters']['kind']}"
    alone = [(m, options.short(m["name"]), f"{m['knows_better']:.0%}", "") for m in facts["members"]]
    shown = 5 if facts["alternatives"] else 4
    alone += [(m, f"instead: {options.short(m['name'])}", "", _gain(m)) for m in facts["alternatives"]]
    candidates = facts["candidates"].items()
    fitted = [candidate(name, own, f"{own['bits_per_byte']:.4f}", _gain(own)) for name, own in candidates]
    beside = [_of_files(facts["files"])] if facts["files"] else []
    return [
        (
            f"{unit}{facts['bytes']:,} bytes of {many}",
            ("model alone", "bits a byte", "ms a byte", "knows better", "gain over what is advised")[:shown],
            [(name, f"{m['bits_per_byte']:.4f}", f"{m['ms_per_byte']:.3g}", *rest)[:shown] for m, name, *rest in alone],
        ),
        (
            f"Fitted on {facts['folds'] - 1} of {facts['folds']} folds, judged on the other; intervals by {spread}",
            ("fitted", "bits a byte", "gain over the best alone", "weights", "trust", "temperature"),
            fitted,
        ),
        *beside,
    ]


def _of_files(files: dict[str, Any]) -> tuple[str, Sequence[str], Sequence[Sequence[str]]]:
    """Return the table of what files add to what is advised."""
    parts = [("whole", files), *([("behind the first 600 bytes", late)] if (late := files["behind_header"]) else [])]
    rows = [(name, f"{own['alone']:.4f}", f"{own['beside']:.4f}", _gain(own)) for name, own in parts]
    names = ", ".join(files["names"])
    return f"What is advised, and {names} beside it", ("", "bits a byte", "with files", "gain"), rows


def cautions(facts: dict[str, Any]) -> list[str]:
    """Return sentences on what may make the verdict mislead; none if there is nothing to say."""
    return [*facts["cautions"], *[_OWN_TEXT] * facts["own_text"]]


_OWN_TEXT = (
    "The members wrote this text themselves, each as much, so gains are those of members that are right equally often; "
    "on other text they are lower as a rule. Give --text for an answer to rely on."
)


def differences(facts: dict[str, Any]) -> str:
    """Return sentences on how far the members, and ``meet`` and its average, differ."""
    said = [f"The members disagree by {facts['disagreement']:.3f} nats a {facts['vocabulary'][:-1]} (Jensen-Shannon)."]
    if facts["movement"]:
        said.append(f"At trust 0.3 {facts['movement']['says']}")
    if facts["meet"]:
        how = "fitted" if facts["meet"]["fitted"] else f"at trust 0.3, on {facts['movement']['positions']} tokens"
        said.append(f"Gain of meet over averages, {how}: {_gain(facts['meet'])} bits a byte.")
    if facts["gate"]:
        said.append(f"With gate {facts['gate']['gate']} one member answers {facts['gate']['alone']:.0%} alone.")
    return " ".join(said)


def _gain(own: dict[str, Any]) -> str:
    """Return a gain with half its 95 % interval, as a table's cell."""
    return difference(own["gain"], own["interval"])
