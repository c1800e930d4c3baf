"""What `generate(reproducible=True)` costs beside a batch, side by side: python benchmarks/reproducible.py

The bundled wide family by averages and by ``meet`` with its default gate, over prompts of different lengths, none of
which ends early.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from report import median, seconds, show
from servers import PROMPTS
from softmeet import Ensemble
from softmeet.members.zoo import expand


def main(
    family: Annotated[str, typer.Option()] = "wide",
    tokens: Annotated[int, typer.Option(help="Of each prompt.")] = 32,
    repeats: Annotated[int, typer.Option()] = 3,
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print a line for each rule and number of prompts; milliseconds a token are of the processor."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for rule in ("logit-mean", "prob-mean", "meet"):
        ensemble = Ensemble.from_pretrained(family, rule, weights=[1] * len(expand(family)))
        for number in (2, 8, 32):
            prompts = [PROMPTS[k % len(PROMPTS)] for k in range(number)]
            given = {"seed": 1, "max_new_tokens": tokens, "eos_token_id": None}
            ways = [partial(ensemble.generate, prompts, **given, reproducible=alone) for alone in (False, True)]
            batch, alone = (1000 * median(seconds(way, repeats)) / (tokens * number) for way in ways)
            rows.append(
                {"rule": rule, "prompts": number, "batch, ms": batch, "alone, ms": alone, "times": alone / batch}
            )
    show(f"{family}: a token in a batch, and reproducible", rows, json_to)


if __name__ == "__main__":
    typer.run(main)
