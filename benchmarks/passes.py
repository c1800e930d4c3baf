"""How often `meet` reads the heads on real text, and how near it comes: python benchmarks/passes.py

On held-out positions of both bundled families; the total variation is to the answer by the full Hessian in fp64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import softmeet
from problems import held_out
from report import now, quantile, show
from softmeet import Status
from softmeet.simplex import total_variation

CHUNK = 64


def main(
    positions: Annotated[int, typer.Option(help="Of each family.")] = 1024,
    trust: Annotated[str, typer.Option(help="Trusts, the same for every member.")] = "0.3,1,2",
    tol: Annotated[float, typer.Option(help="Nats.")] = 1e-5,
    threads: Annotated[int, typer.Option()] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for family in ("narrow", "wide"):
        given = held_out(family, positions)
        size = given.log_probs.shape[1]
        for rho in (float(x) for x in trust.split(",")):
            passes, gaps, distances, certified, taken = [], [], [], 0, 0.0
            some = given.take(0, min(CHUNK, size))
            softmeet.combine(some.log_probs, some.heads, trust=rho, tol=tol)  # what is found once a head is found
            for start in track(range(0, size, CHUNK), description=f"{family}, trust {rho:g}", transient=True):
                part = given.take(start, min(start + CHUNK, size))
                begun = now()
                ours = softmeet.combine(part.log_probs, part.heads, trust=rho, tol=tol)
                taken += now() - begun
                exact = softmeet.combine(part.log_probs.double(), part.heads, trust=rho, tol=1e-10, max_steps=100)
                passes += ours.num_passes.tolist()
                gaps += ours.gap.tolist()
                certified += int((ours.gap_is_certified & (ours.status == Status.OPTIMAL)).sum())
                distances += total_variation(ours.log_probs.double(), exact.log_probs).tolist()
            rows.append(
                {
                    "family": family,
                    "trust": rho,
                    "positions": size,
                    "passes, median": quantile(passes, 0.5),
                    "99 %": quantile(passes, 0.99),
                    "largest": max(passes),
                    "certified": f"{certified} of {size}",
                    "largest gap": max(gaps),
                    "largest TV": max(distances),
                    "ms a row": 1e3 * taken / size,
                }
            )
    show(f"meet at tol {tol:g} on held-out text", rows, json, tol=tol)


if __name__ == "__main__":
    typer.run(main)
