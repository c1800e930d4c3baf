"""What each constant of `meet`'s solver costs at half and at double its value: python benchmarks/tuning.py

Rows shaped after a pretrained pair (benchmarks/problems.py) and rows of the bundled wide family on text that it has not
seen, all by dense steps, as `combine` solves them, with bounds, and as decoding does, on estimates. Counts of head
passes and steps do not depend on the machine; times are medians, as a ratio to that of the constants as they are.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

import softmeet
from problems import Rows, correlated, held_out
from report import median, show
from softmeet.rules.meet import Meet
from softmeet.solvers import tuning

# They choose between the two methods, or belong to the other one: benchmarks/solver.py.
CHOICES = ("HESSIAN", "HESSIAN_WHERE_FINE", "HESSIAN_AS_RESCUE", "FINE", "FAR")


def constants() -> dict[str, float]:
    """The constants by name."""
    return {name: value for name, value in vars(tuning).items() if name.isupper() and name not in CHOICES}


def solve(rows: Rows, trust: float, repeats: int) -> tuple[dict[str, float], float]:
    """Head passes and steps a row with bounds and without, and the median seconds of both together."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        bounded = softmeet.combine(rows.log_probs, rows.heads, trust=trust)
        estimated = softmeet.combine(rows.log_probs, rows.heads, Meet(budget=50), trust=trust)
        taken.append(time.perf_counter() - start)
        for head in rows.heads:
            head.tails.clear()
    return {
        "passes": bounded.num_passes.mean().item(),
        "steps": bounded.num_steps.double().mean().item(),
        "passes, estimated": estimated.num_passes.mean().item(),
    }, median(taken)


def main(
    v: Annotated[int, typer.Option()] = 32768,
    width: Annotated[int, typer.Option()] = 512,
    rows: Annotated[int, typer.Option(help="Of each kind.")] = 8,
    trust: Annotated[float, typer.Option()] = 1.0,
    repeats: Annotated[int, typer.Option()] = 3,
    name: Annotated[list[str] | None, typer.Option(help="Constants to measure; all by default.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table for each kind of rows."""
    torch.set_num_threads(1)
    kinds = {
        f"two members of {v} x {width}": correlated(v, (width, width), rows),
        "the wide family": held_out("wide", rows),
    }
    for kind, instance in kinds.items():
        table: list[dict[str, Any]] = []
        with mock.patch.multiple(tuning, HESSIAN=0, HESSIAN_WHERE_FINE=0):
            figures, usual = solve(instance, trust, repeats)
            table.append({"constant": "as they are", "value": "", **figures, "time": 1.0})
            for constant, value in constants().items():
                for factor in (0.5, 2) if not name or constant in name else ():
                    other = type(value)(value * factor) or 1
                    with mock.patch.object(tuning, constant, other):
                        figures, taken = solve(instance, trust, repeats)
                    table.append({"constant": constant, "value": f"{other:g}", **figures, "time": taken / usual})
        show(f"{kind}, {rows} rows, trust {trust:g}, tol 1e-3", table, json)


if __name__ == "__main__":
    typer.run(main)
