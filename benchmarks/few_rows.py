"""Products of a few rows with large matrices, in both forms: python benchmarks/few_rows.py --threads 2

Shapes from *Wᵀ* on are GPT-2's, whose layers hold Wᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from report import seconds, show
from softmeet.members.trunk import product_in_parts

# (rows of W, columns): a feed-forward block's two shapes, and the heads of GPT-2 small and of Qwen2.5 0.5B.
SHAPES = [(4864, 896), (896, 4864), (50257, 768), (151936, 896)]
# Wᵀ of GPT-2 small: a feed-forward block's two, and attention's.
TRANSPOSED = [(768, 3072), (3072, 768), (768, 2304)]


Form = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _each(form: Form, x: torch.Tensor, matrices: list[torch.Tensor]) -> None:
    for matrix in matrices:
        form(x, matrix)


def _plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


def _turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight @ x.T).T.contiguous()


def main(
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measurements of each.")] = 7,
    json: Annotated[Path | None, typer.Option(help="Write the rows here, too.")] = None,
) -> None:
    """Print milliseconds of x Wᵀ in fp32 for one to eight rows, in torch's form and the other one."""
    torch.set_num_threads(threads)
    rows = []
    for shape in SHAPES + TRANSPOSED:
        # As many as a model has, so that they come from memory.
        held = [torch.randn(shape) for _ in range(1 + (1 << 25) // (shape[0] * shape[1]))]
        transposed = shape in TRANSPOSED
        row = {"W": f"{'Wᵀ ' * transposed}{shape[0]:,} × {shape[1]:,}"}
        for count in (1, 2, 3, 4, 8):
            x = torch.randn(count, shape[0] if transposed else shape[1])
            taken = [
                1000 * median(seconds(partial(_each, form, x, held), repeats)) / len(held)
                for form in ((torch.matmul, product_in_parts) if transposed else (_plain, _turned))
            ]
            row[f"{count} row{'s' * (count > 1)}"] = ", ".join(f"{one:.1f}" for one in taken)
        rows.append(row)
    show("Milliseconds of x Wᵀ, and of the other form", rows, json)


if __name__ == "__main__":
    typer.run(main)
