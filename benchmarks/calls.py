"""How long a token's path is: calls of softmeet's own functions a token, by rule, on a bundled family, greedy.

A generation of six tokens less one of one, over five. Counted are calls of Python functions in softmeet's files, each
comprehension and each turn of a generator expression included; compiled loops are not, nor what torch and transformers
call. The number does not depend on the machine.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer

import softmeet
from report import show
from softmeet.members.zoo import expand

FOLDER = str(Path(softmeet.__file__).parent)
PROMPT = "And the king said"


def counted(ensemble: softmeet.Ensemble, tokens: int) -> Counter[str]:
    """Calls by function while so many tokens are generated."""
    found: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(FOLDER):
            found[f"{code.co_filename.removeprefix(FOLDER)}:{code.co_qualname}"] += 1

    sys.setprofile(note)
    try:
        ensemble.generate(PROMPT, max_new_tokens=tokens, do_sample=False, speculate=0)
    finally:
        sys.setprofile(None)
    return found


def calls_a_token(family: str, rule: str) -> dict[str, float]:
    """Calls a token of each function, the most frequent first."""
    ensemble = softmeet.Ensemble.from_pretrained(family, rule, weights=[1] * len(expand(family)))
    counted(ensemble, 2)  # what is made once is made
    one, six = counted(ensemble, 1), counted(ensemble, 6)
    six.subtract(one)
    return {name: count / 5 for name, count in six.most_common() if count}


def main(
    rules: Annotated[list[str] | None, typer.Option("--rule", help="Repeat it.")] = None,
    family: Annotated[str, typer.Option(help="A bundled family.")] = "narrow",
    functions: Annotated[int, typer.Option(help="List so many functions of each rule.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print a line for each rule."""
    torch.set_num_threads(1)
    rows = []
    for rule in rules or ["logit-mean", "prob-mean", "meet"]:
        found = calls_a_token(family, rule)
        files = {name.partition(":")[0] for name in found}
        rows.append({"rule": rule, "calls a token": sum(found.values()), "functions": len(found), "files": len(files)})
        for name, count in list(found.items())[:functions]:
            typer.echo(f"{count:7.1f}  {name}")
    show(f"calls of own functions a token, {family} family, greedy", rows, json)


if __name__ == "__main__":
    typer.run(main)
