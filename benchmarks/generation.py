"""What members and ensembles write: python benchmarks/generation.py -m A -m B -e 'A B prob-mean:weights=0.3/0.7'

Every member alone, and every ensemble, answers the questions of benchmarks/tasks, greedily, through the
lm-evaluation-harness, in a process of its own, one after another. Rates have Wilson's 95 % intervals. An ensemble is
set against the best of its members, question by question, with the interval of Bonett and Price for paired proportions
(Statistics in Medicine 31, 2012). FUNCTIONS THAT MODELS WRITE ARE RUN, with the limits of softmeet/answers/sandbox.py.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from cells import Json, Run
from report import now, show
from softmeet.answers.rates import Rate, difference, rate
from softmeet.errors import InvalidInputError
from softmeet.evaluation.files import as_json
from softmeet.hf.checkpoint import member_names, saved_config
from softmeet.members.member import short, titles
from softmeet.rules.settings import parse_rule

TASKS = Path(__file__).parent / "tasks"
KINDS = ("functions", "copying", "arithmetic", "extraction")


class Subject(NamedTuple):
    """What answers: members and a rule, or the name of what was saved with its own."""

    name: str
    members: list[str]
    rule: str | None = None
    saved: str | None = None

    def settings(self, batch: int, limit: int | None) -> Json:
        """Everything that its answers depend on."""
        config = saved_config(self.saved)
        kinds = (".jsonl", ".yaml", "")
        files = [path.read_bytes() for path in sorted(TASKS.iterdir()) if path.is_file() and path.suffix in kinds]
        return {
            **self._asdict(), "config": config and config.to_json_string(), "batch": batch, "limit": limit,
            "tasks": hashlib.sha256(b"\0".join(files)).hexdigest(),
        }  # fmt: skip


def subjects(members: Sequence[str], ensembles: Sequence[str]) -> list[Subject]:
    """The members of which anything is asked, each alone, and the ensembles.

    Raises:
        InvalidInputError: if an ensemble has no rule, or one that is unknown.
    """
    lines, found = list(dict.fromkeys(members)), []
    for text in ensembles:
        *words, last = shlex.split(text) or [""]
        if words:
            parse_rule(last)
            own = [_line(word, lines) for word in words]
            found.append(Subject(f"{' + '.join(map(_brief, own))}, {last}", own, last))
        else:
            own = member_names(last)
            if len(own) < 2:
                raise InvalidInputError(f"expected members and a rule, or a saved ensemble, got {text!r}")
            found.append(Subject(short(last), own, saved=last))
        lines += [line for line in own if line not in lines]
    alone = [Subject(title, [line], "logit-mean") for title, line in zip(titles(lines), lines, strict=True)]
    return alone + found


def _brief(line: str) -> str:
    return short(line).rpartition("/")[2]


def _line(word: str, lines: Sequence[str]) -> str:
    """The member that a word means: one of ``lines`` by its name, or that of its last folder, or another."""
    return next((line for line in lines if word in (line, short(line), _brief(line))), word)


def asked(lm: Any, kind: str, limit: int | None) -> Json:
    """Ask a model of the harness the questions of a kind; its answers, which of them are right, and seconds."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    task, taken, write = f"softmeet_{kind}", list[float](), lm.generate_until

    def timed(requests: Any, **options: Any) -> Any:
        started = now()
        found = write(requests, **options)
        taken.append(now() - started)
        return found

    size = len((TASKS / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines())
    count = min(size, limit or size)
    lm.generate_until = timed
    try:
        found = simple_evaluate(
            model=lm, tasks=[task], task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            samples={task: [k * size // count for k in range(count)]}, bootstrap_iters=0, confirm_run_unsafe_code=True,
        )  # fmt: skip
    finally:
        lm.generate_until = write
    samples = sorted(found["samples"][task], key=lambda sample: int(sample["doc_id"]))
    return {
        "seconds": sum(taken), "ids": [sample["doc"]["id"] for sample in samples],
        "answers": [sample["resps"][0][0] for sample in samples], "passed": [sample["passed"] for sample in samples],
    }  # fmt: skip


def store(subject: Subject, kept: Path, batch: int, limit: int | None) -> Run:
    """The store of a subject's answers, in a folder that is named after all that they depend on."""
    settings = subject.settings(batch, limit)
    return Run(kept / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12], settings)


def answer(subject: Subject, kept: Path, batch: int, limit: int | None) -> None:
    """Load a subject, and ask it what it has not answered."""
    from softmeet import Ensemble
    from softmeet.evaluation.harness import harness_model

    lm = harness_model(Ensemble.from_pretrained(subject.saved or subject.members, subject.rule), batch_size=batch)
    store(subject, kept, batch, limit).each({kind: partial(asked, lm, kind, limit) for kind in KINDS})


def answers(subject: Subject, kept: Path, batch: int, limit: int | None, threads: int) -> dict[str, Json] | None:
    """What a subject has answered, by kind, after a process that asks it the rest; None if that fails."""
    if set(KINDS) - set(store(subject, kept, batch, limit).done):
        print(f"{subject.name}:", flush=True)
        more = [f"--kept={kept}", f"--batch={batch}", f"--threads={threads}", *([f"--limit={limit}"] if limit else [])]
        command = [sys.executable, __file__, f"--one={json.dumps(subject)}", *more]
        if subprocess.run(command, check=False).returncode:
            return None
    done = store(subject, kept, batch, limit).done
    return {kind: done[kind] for kind in KINDS}


def passed(found: dict[str, Json]) -> dict[str, list[float]]:
    """Which questions were answered rightly, by kind and in all."""
    own = {kind: found[kind]["passed"] for kind in KINDS}
    return own | {"all": [one for kind in KINDS for one in own[kind]]}


def figures(every: list[Subject], found: dict[str, dict[str, Json]]) -> list[dict[str, Any]]:
    """The figures of each subject that has answered; those of ensembles with the best member that has, if all have."""
    alone, rows = {one.members[0]: one.name for one in every if len(one.members) == 1}, []
    for one in (subject for subject in every if subject.name in found):
        own, questions = passed(found[one.name]), sum(len(found[one.name][kind]["ids"]) for kind in KINDS)
        seconds = sum(found[one.name][kind]["seconds"] for kind in KINDS) / questions
        row = {"name": one.name, "seconds": seconds, "rates": {kind: rate(values) for kind, values in own.items()}}
        names = [alone[line] for line in one.members]
        if len(names) > 1 and all(name in found for name in names):
            best = max(dict.fromkeys(names), key=lambda name: sum(passed(found[name])["all"]))
            theirs = passed(found[best])
            row |= {"best": best, "difference": {kind: difference(own[kind], theirs[kind]) for kind in own}}
        rows.append(row)
    return rows


def _percent(found: Rate, sign: str = "") -> str:
    mean, low, high = (f"{100 * part:{sign}.0f}" for part in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def main(
    member: Annotated[list[str] | None, typer.Option("--member", "-m", help="Hub ids, folders or GGUF files.")] = None,
    ensemble: Annotated[
        list[str] | None,
        typer.Option("--ensemble", "-e", help="Members (or the last folders of those of -m) and a rule; or one saved."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Questions that are answered at once.")] = 16,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each kind, evenly spread; all without.", min=1)
    ] = None,
    threads: Annotated[int, typer.Option()] = 1,
    kept: Annotated[Path | None, typer.Option(help="A folder for answers, where the same command goes on.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    if one:
        assert kept is not None
        answer(Subject(*json.loads(one)), kept, batch, limit)
        return
    every = subjects(member or [], ensemble or [])
    with tempfile.TemporaryDirectory() as folder:
        tried = {subject.name: answers(subject, kept or Path(folder), batch, limit, threads) for subject in every}
    found = {name: own for name, own in tried.items() if own is not None}
    rows = figures(every, found)
    table = [
        {
            "member or ensemble": row["name"],
            **{f"{kind}, %": _percent(own) for kind, own in row["rates"].items()},
            "against the best member": _percent(row["difference"]["all"], "+") if "best" in row else "",
            "s/question": row["seconds"],
        }
        for row in rows
    ]
    if table:
        show("right answers with 95 % intervals", table, json_, figures=json.loads(as_json(rows)))
    if failed := [name for name, own in tried.items() if own is None]:
        print(f"without an answer: {', '.join(failed)}; the same command tries again")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
