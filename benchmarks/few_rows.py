"""Products of a few rows with large matrices, in both forms: python benchmarks/few_rows.py --threads 2"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from report import seconds, show

# (rows of W, columns): a feed-forward block's two shapes, and the heads of GPT-2 small and of Qwen2.5 0.5B.
SHAPES = [(4864, 896), (896, 4864), (50257, 768), (151936, 896)]


def _turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight @ x.T).T.contiguous()


def main(
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measurements of each.")] = 7,
    json: Annotated[Path | None, typer.Option(help="Write the rows here, too.")] = None,
) -> None:
    """Print milliseconds of x Wᵀ and (W xᵀ)ᵀ in fp32 for one to eight rows."""
    torch.set_num_threads(threads)
    rows = []
    for v, d in SHAPES:
        weight = torch.randn(v, d)
        row = {"W": f"{v:,} × {d:,}"}
        for count in (1, 2, 3, 4, 8):
            x = torch.randn(count, d)
            plain = median(seconds(partial(torch.matmul, x, weight.T), repeats))
            other = median(seconds(partial(_turned, x, weight), repeats))
            row[f"{count} row{'s' * (count > 1)}"] = f"{1000 * plain:.1f}, {1000 * other:.1f}"
        rows.append(row)
    show("Milliseconds of x Wᵀ, and of (W xᵀ)ᵀ", rows, json)


if __name__ == "__main__":
    typer.run(main)
