"""The rules over the feasible set against HiGHS: how a linear program over all tokens is solved fastest.

The premise holds for two heads, so the feasible set is not empty. ``min-underestimation``: ours by its interior-point
method over all tokens, and HiGHS on the same dense program. A linear cost drawn at random: ours with column generation,
without it, and HiGHS alone. Heads share some directions to rounding, so values agree only as far as moments are
required to (10⁻⁶).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.optimize import linprog

import softmeet
from problems import premise
from report import now, show
from softmeet.essay import column_generation
from softmeet.essay.feasible_set import FeasibleSet
from softmeet.essay.max_entropy import members_of
from softmeet.essay.min_cross_entropy import MinCrossEntropy

Array = np.ndarray[Any, np.dtype[np.float64]]
SIZES = {"1024 x 64": (1024, (32, 32)), "4096 x 256": (4096, (128, 128)), "16384 x 512": (16384, (256, 256))}


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """(seconds, value)."""
    start = now()
    value = function()
    return now() - start, value


def by_highs(
    cost: Array, G: Array, g: Array, upper: Array | None, limit: float, method: str = "highs"
) -> tuple[float | None, float | None]:
    """(seconds, value), or Nones where ``limit`` seconds were not enough; no value where HiGHS gives up by itself."""
    bounds = (0, None) if upper is None else np.stack([np.zeros_like(upper), upper], axis=1)
    start = now()
    found = linprog(cost, A_eq=G.T, b_eq=g, bounds=bounds, method=method, options={"time_limit": limit})
    if found.status == 1:
        return None, None
    if found.status != 0:
        print(f"{method}: {found.message}")
    return now() - start, float(found.fun) if found.status == 0 else None


def measure(name: str, limit: float, *, only_first: bool) -> list[dict[str, Any]]:
    """A table of both programs at one size."""
    v, widths = SIZES[name]
    rows, _ = premise(v, widths, 1)
    solution = softmeet.combine(rows.log_probs, rows.heads, "min-underestimation", tol=1e-7)  # whitens the heads
    row = FeasibleSet.of(solution.problem)[0]
    G, g = row.tokens.rows(torch.arange(v)).numpy(), row.target.numpy()
    m = row.log_p.amin(0).exp()
    table = []

    def ours() -> float:
        found = softmeet.combine(rows.log_probs, rows.heads, "min-underestimation", tol=1e-7)
        return float(found.objective[0])

    table.append(entry(name, "min-underestimation", "interior point", *timed(ours)))
    upper = np.append((m / m.sum()).numpy(), 2.0)
    cost = np.append(np.zeros(v), -1.0)
    for method in ("highs", "highs-ipm"):
        seconds, value = by_highs(cost, np.vstack([G, -g]), np.zeros_like(g), upper, limit, method)
        log_t = None if value is None else -float(np.log(-value * float(m.sum())))
        table.append(entry(name, "min-underestimation", method, seconds, log_t))
    return table if only_first else table + linear(name, row, G, g, limit)


def linear(name: str, row: FeasibleSet, G: Array, g: Array, limit: float) -> list[dict[str, Any]]:
    """The table of a linear cost."""
    start = now()
    member = members_of(row.problem).log_probs[0].exp()
    first = now() - start
    cost = torch.randn(len(member), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def ours() -> float:
        return float(cost @ MinCrossEntropy().extremes(FeasibleSet(replace(row.problem)), cost, member).p)

    table = [entry(name, "a linear cost", "column generation", *timed(ours))]
    with mock.patch.object(column_generation, "_FEWEST", len(cost)):
        table.append(entry(name, "a linear cost", "all columns", *timed(ours)))
    table.append(entry(name, "a linear cost", "highs", *by_highs(cost.numpy(), G, g, None, limit)))
    table.append(entry(name, "(a first member of C)", "Newton", first, None))
    return table


def entry(size: str, what: str, method: str, seconds: float | None, value: float | None) -> dict[str, Any]:
    """One line."""
    return {"v x D": size, "program": what, "method": method, "seconds": seconds, "objective": value}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="1024 x 64")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for HiGHS")
    parser.add_argument("--only-underestimation", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of ours; HiGHS has one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = list(SIZES) if arguments.size == "all" else [arguments.size]
    first = arguments.only_underestimation
    lines: list[dict[str, Any]] = []
    for name in names:
        lines += measure(name, arguments.limit, only_first=first)
        show("exact rules", lines, arguments.json)


if __name__ == "__main__":
    main()
