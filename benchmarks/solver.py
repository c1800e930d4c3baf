"""One row of `meet` at the size of real models, beside the alternatives: python benchmarks/solver.py

The instances are synthetic, shaped after a pretrained pair (benchmarks/problems.py), or those of real members on a text
(``-m A -m B --text FILE``). Rows go alone on one core, then in
a batch; L-BFGS runs on the same dual to the same gap, HiGHS and Clarabel once, under a time limit.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import rivals
import softmeet
from problems import Rows, correlated, of_text, premise
from report import median, now, seconds, show

SIZES = {
    "tiny": (2_048, (32, 32)),
    "small": (16_384, (256, 256)),
    "gpt2": (50_257, (768, 768)),
    "large": (128_256, (2048, 2048)),
}


def alone(rows: Rows, trust: float, tol: float) -> dict[str, Any]:
    """Each row by itself on one core."""
    torch.set_num_threads(1)
    taken, passes, gaps = [], [], []
    softmeet.combine(rows.log_probs[:, :1], rows.heads, trust=trust, tol=tol)
    for k in range(rows.log_probs.shape[1]):
        start = now()
        found = softmeet.combine(rows.log_probs[:, k : k + 1], rows.heads, trust=trust, tol=tol)
        taken.append(now() - start)
        passes.append(found.num_passes.item())
        gaps.append(found.gap.item())
    return _row("meet, one row, one core", median(taken), max(taken), median(passes), f"gap at most {max(gaps):.1e}")


def _row(what: str, s: float | None, worst: float | None, passes: float | None, note: str) -> dict[str, Any]:
    return {"what": what, "s a row": s, "slowest": worst, "passes": passes, "note": note}


def main(
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "small",
    rows: Annotated[int, typer.Option(help="Rows to solve alone.")] = 8,
    batch: Annotated[int, typer.Option(help="Rows of the batch.")] = 32,
    trust: Annotated[float, typer.Option()] = 1.0,
    tol: Annotated[float, typer.Option(help="Nats.")] = 1e-5,
    threads: Annotated[int, typer.Option(help="Of the batch.")] = 1,
    limit: Annotated[float, typer.Option(help="Seconds for HiGHS and Clarabel; 0 to leave them out.")] = 60.0,
    member: Annotated[
        list[str] | None, typer.Option("-m", help="Real members instead: a folder, hub id or GGUF.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text for real members.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    if member and text is None:
        raise typer.BadParameter("real members need a text: --text FILE")
    torch.set_num_threads(threads)
    if member and text:
        given = of_text(member, text.read_text(encoding="utf-8"), max(rows, batch))
    else:
        given = correlated(*SIZES[size], max(rows, batch))
    v, widths = given.log_probs.shape[-1], tuple(head.d for head in given.heads)
    start = now()
    for head in given.heads:
        head.whitening()
    once = now() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    some = given.take(0, rows)
    table = [alone(some, trust, tol)]
    torch.set_num_threads(threads)
    log_probs = given.log_probs[:, :batch]
    found = softmeet.combine(log_probs, given.heads, trust=trust, tol=tol)
    taken = seconds(lambda: softmeet.combine(log_probs, given.heads, trust=trust, tol=tol), repeats=3, warm_up=0)
    each = median(taken) / batch
    note = f"{int((found.status == 0).sum())} of {batch} solved"
    passes = found.num_passes.median().item()
    table.append(
        _row(
            f"meet, batch of {batch}, {'one thread' if threads == 1 else f'{threads} threads'}",
            each,
            max(taken) / batch,
            passes,
            note,
        )
    )
    mean = seconds(lambda: softmeet.combine(log_probs, given.heads, "logit-mean"))
    table.append(
        _row(f"logit-mean, batch of {batch}", median(mean) / batch, max(mean) / batch, 0.0, "the naive average")
    )
    torch.set_num_threads(1)
    exact = softmeet.combine(some.log_probs[:, :3], given.heads, trust=trust, tol=tol / 10)
    runs = [rivals.lbfgs(some, k, trust, -exact.objective[k].item() + tol) for k in range(exact.gap.shape[0])]
    times = [r.seconds for r in runs if r.seconds is not None]
    table.append(
        _row(
            "L-BFGS (scipy), one core", median(times), max(times), median([r.passes or 0.0 for r in runs]), runs[0].note
        )
    )
    if limit:
        torch.set_num_threads(threads)
        cone = rivals.clarabel(given, 0, trust, limit)
        table.append(_row("CVXPY with Clarabel, once", cone.seconds, cone.seconds, None, cone.note))
        if not member and v <= SIZES["small"][0]:
            fits, truth = premise(v, widths, 1)
            lp = rivals.highs(fits, truth, 0, 5 * limit)
            table.append(_row("HiGHS, the essay's LP, once", lp.seconds, lp.seconds, None, lp.note))
    for row in table:
        row["over ours"] = None if row["s a row"] is None else row["s a row"] / table[0]["s a row"]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 2**20
    title = (
        f"v = {v:,}, widths {widths}, trust {trust:g}, tol {tol:g}; whitening, once: {once:.1f} s; {grown:.2f} GiB more"
    )
    show(title, table, json, trust=trust, tol=tol, whitening_seconds=once)


if __name__ == "__main__":
    typer.run(main)
