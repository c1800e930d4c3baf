"""What one model behind several prompts costs: python benchmarks/contexts.py

Steps of generation by one member, and by as many members as there are prompts, which are rows of one batch; then one
prompt of ten passages beside ten members behind a passage each. All are timed in turn, so that ratios hold on a busy
machine, too. Without -m the member has GPT-2 small's shape and random weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import torch
import typer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from report import named, now, show
from softmeet import Ensemble, Member, Passage
from softmeet.hf import EnsembleConfig
from softmeet.members import zoo

_TEXT = "def fibonacci(n):\n    "
_WORDS = "The function returns what the caller asked for, and nothing else, in the order that was given. "


def made(folder: str) -> str:
    """Write a model of GPT-2 small's shape with random weights, and return its folder."""
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(zoo.locate("wide/gpt2")).save_pretrained(folder)
    return folder


def behind(ensemble: Ensemble, member: str, prompts: list[str]) -> Ensemble:
    """Return the ensemble's model once behind each prompt."""
    names = [Member(member, prompt=prompt) for prompt in prompts]
    config = EnsembleConfig(names, rule="logit-mean", vocabulary="tokens")
    return Ensemble(ensemble.model.part([0] * len(prompts), config), ensemble.tokenizer)


def seconds(ensemble: Ensemble, tokens: int) -> float:
    """Return how long it takes to continue the text by so many tokens."""
    start = now()
    ensemble.generate(_TEXT, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, speculate=0)
    return now() - start


def step(ensemble: Ensemble, tokens: int) -> float:
    """Return the seconds of a step of generation, the prompt's left out."""
    return (seconds(ensemble, tokens + 1) - seconds(ensemble, 1)) / tokens


def resident() -> float:
    """Return the process's resident memory in MB."""
    return float(psutil.Process().memory_info().rss) / 1e6


def row(what: str, own: list[float], one: list[float] | None = None) -> dict[str, Any]:
    """Return a line of the table: the median, and that of the ratios to measurements beside."""
    ratio = None if one is None else median(a / b for a, b in zip(own, one, strict=True))
    return {"what": what, "ms": 1000 * median(own), "times the one": ratio}


def main(
    member: Annotated[str | None, typer.Option("--member", "-m", help="A hub id or folder.")] = None,
    counts: Annotated[str, typer.Option(help="Numbers of prompts.")] = "1,4,10",
    words: Annotated[int, typer.Option(help="Repeat a sentence so often in each prompt and passage.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of a measurement.")] = 32,
    repeats: Annotated[int, typer.Option(help="Measurements of each.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Write the rows here, too.")] = None,
) -> None:
    """Print what prompts and passages of one model cost."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        name = member or made(folder)
        alone = Ensemble.from_pretrained([name], "logit-mean")
        weights = sum(p.nbytes for p in alone.model.parameters()) / 1e6
        several = {
            n: behind(alone, name, [f"{k}. {_WORDS * words}" for k in range(n)]) for n in map(int, counts.split(","))
        }
        before, taken = resident(), {n: list[float]() for n in several}
        for _ in range(repeats):
            for n, ensemble in several.items():
                taken[n].append(step(ensemble, tokens))
        rows = [
            row(f"a step, {n} prompt{'s' * (n > 1)}", own, taken[min(taken)] if n > min(taken) else None)
            for n, own in taken.items()
        ]
        added = resident() - before
        passages = [alone.with_passages([Passage(f"{k}. {_WORDS * words}", 0.0) for k in range(10)])]
        passages.append(alone.with_passages([Passage(_WORDS * words * 10, 0.0)]))
        whole: list[list[float]] = [[], []]
        for _ in range(repeats):
            for own, ensemble in zip(whole, passages, strict=True):
                ensemble.model.forget_readers()  # passages are new to the model, as a request's are
                own.append(seconds(ensemble, tokens))
        rows += [
            row(f"{tokens} tokens behind ten passages, read anew", *whole),
            row(f"{tokens} tokens behind one passage as long as the ten", whole[1]),
        ]
    model = named(member) if member else "GPT-2 small's shape"
    rows = [{"model": model} | row for row in rows]
    show("One model behind several prompts", rows, json, weights_mb=round(weights), added_mb=round(added))
    print(f"weights: {weights:.0f} MB; resident memory that all these prompts added: {added:.0f} MB")


if __name__ == "__main__":
    typer.run(main)
