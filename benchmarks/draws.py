"""What drawing a token costs, by noise and by torch.multinomial: python benchmarks/draws.py --threads 2

Both get a batch's scores and return its tokens, torch.multinomial from their softmax, as transformers' loop does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from report import seconds, show
from softmeet.engine.draw import Noise, choose

# The vocabularies of GPT-2 and of Qwen2.5.
SIZES = 50_257, 151_936


def by_noise(noise: Noise, positions: Iterator[int], scores: torch.Tensor) -> None:
    """Draw as every road does, each time at another position."""
    choose(scores, noise.at(next(positions)))


def by_multinomial(scores: torch.Tensor) -> None:
    """Draw as transformers does."""
    torch.multinomial(scores.softmax(-1), num_samples=1)


def main(
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measurements of each.")] = 41,
    json: Annotated[Path | None, typer.Option(help="Write the rows here, too.")] = None,
) -> None:
    """Print milliseconds of a draw for a batch of one sequence and of eight."""
    torch.set_num_threads(threads)
    rows = []
    for v in SIZES:
        for batch in (1, 8):
            scores = 3 * torch.randn(batch, v)
            noise, other = (
                1000 * median(seconds(draw, repeats))
                for draw in (
                    partial(by_noise, Noise.unseeded(batch), count(), scores),
                    partial(by_multinomial, scores),
                )
            )
            row = {"tokens": v, "batch": batch, "noise": noise, "torch.multinomial": other}
            rows.append({**row, "ratio": other / noise})
    show("Milliseconds of a draw", rows, json)


if __name__ == "__main__":
    typer.run(main)
