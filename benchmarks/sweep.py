"""What a sweep costs: the averages, max-entropy and six trusts of meet over a trace: python benchmarks/sweep.py narrow

The members run once, over the first tokens of every held-out book.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from fit import traced
from held_out import meet
from report import show
from softmeet import Ensemble
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.perplexity import evaluate_positions
from softmeet.evaluation.report import summary
from softmeet.scaling.local import LocalEngine

TRUSTS = (0.1, 0.3, 0.6, 1.0, 2.0, 4.0)


def main(
    family: Annotated[str, typer.Argument(help="A bundled family.")] = "narrow",
    tokens: Annotated[int, typer.Option(help="Of each of the 20 books, at most.")] = 1000,
    trace: Annotated[Path | None, typer.Option(help="Keep the trace here.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json")] = None,
    workers: Annotated[int, typer.Option(help="Threads that solve, as softmeet evaluate --workers has them.")] = 2,
) -> None:
    """Print one table."""
    torch.set_num_threads(workers)
    ensemble = Ensemble.from_pretrained(family)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        positions = traced(ensemble, tokens, trace or Path(scratch) / "trace").read()
        tracing = time.perf_counter() - start
    choices = [RuleChoice(name, {"rule": name}) for name in ("logit-mean", "prob-mean", "max-entropy")]
    choices += [meet(rho, len(ensemble.names)) for rho in TRUSTS]
    start = time.perf_counter()
    with LocalEngine(workers) as engine:
        facts = summary(evaluate_positions(ensemble, positions, choices, engine=engine))
    sweeping = time.perf_counter() - start
    rows = [
        {
            "": Path(name).name,
            "nats": row["nll"],
            "vs best baseline": row["vs"]["delta"] if "vs" in row else None,
            "± (95 %)": (row["vs"]["ci95"][1] - row["vs"]["ci95"][0]) / 2 if "vs" in row else None,
            "by meet": row.get("fallbacks"),
            "not converged": row.get("unconverged"),
            "passes": row.get("passes"),
        }
        for kind in ("members", "rules")
        for name, row in facts[kind].items()
    ]
    title = f"{family}: {len(positions):,} positions; {tracing:.0f} s to trace, {sweeping:.0f} s to sweep"
    show(title, rows, as_json, tracing=tracing, sweeping=sweeping, tokens=len(positions))


if __name__ == "__main__":
    typer.run(main)
