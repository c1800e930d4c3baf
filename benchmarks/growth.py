"""How the time of a row grows with v, D, n and the batch: python benchmarks/growth.py --plot growth.png

One quantity varies at a time around v = 32,768 and two heads of 512 (of 256 where n varies); exponents are
least-squares fits on logarithms.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track

import softmeet
from problems import correlated
from report import median, seconds, show

V, WIDTH, BATCH = 32_768, 512, 2
POINTS: dict[str, list[tuple[float, int, tuple[int, ...], int]]] = {
    "v": [(v, v, (WIDTH, WIDTH), BATCH) for v in (4096, 8192, 16_384, 32_768, 65_536, 131_072)],
    "D": [(2 * d, V, (d, d), BATCH) for d in (32, 64, 128, 256, 512, 1024, 2048)],
    "n": [(n, V, (256,) * n, BATCH) for n in (2, 4, 8)],
    "batch": [(b, V, (WIDTH, WIDTH), b) for b in (1, 4, 16, 64)],
}


def main(
    quick: Annotated[bool, typer.Option(help="Fewer and smaller points: under two minutes.")] = False,
    trust: Annotated[float, typer.Option()] = 1.0,
    tol: Annotated[float, typer.Option(help="Nats.")] = 1e-5,
    threads: Annotated[int, typer.Option()] = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw the growth here, as PNG or SVG.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for name, points in POINTS.items():
        chosen = [p for p in points if not quick or p[1] * sum(p[2]) * p[3] <= 2**26]
        for x, v, widths, batch in track(chosen, description=name, transient=True):
            given = correlated(v, widths, batch)
            for head in given.heads:
                head.whitening()
            found = softmeet.combine(given.log_probs, given.heads, trust=trust, tol=tol)
            taken = seconds(partial(softmeet.combine, given.log_probs, given.heads, trust=trust, tol=tol), 3, 0)
            solved = int((found.status == 0).sum())
            rows.append(
                {
                    "varies": name,
                    "value": int(x),
                    "ms a row": 1e3 * median(taken) / batch,
                    "passes, median": found.num_passes.median().item(),
                    "solved": f"{solved} of {batch}",
                }
            )
    fits = {name: _exponent([r for r in rows if r["varies"] == name]) for name in POINTS}
    title = "growth around v = 32,768, D = 1,024, n = 2; exponents: " + ", ".join(
        f"{k} {e:.2f}" for k, e in fits.items()
    )
    show(title, rows, json, exponents=fits)
    if plot is not None:
        _draw(rows, fits, plot)


def _exponent(rows: list[dict[str, Any]]) -> float:
    x, y = np.log([r["value"] for r in rows]), np.log([r["ms a row"] for r in rows])
    return float(np.polyfit(x, y, 1)[0]) if len(rows) > 1 else float("nan")


def _draw(rows: list[dict[str, Any]], fits: dict[str, float], where: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(fits), figsize=(12, 3.2), layout="constrained", sharey=True)
    for axis, (name, exponent) in zip(axes, fits.items(), strict=True):
        points = [r for r in rows if r["varies"] == name]
        axis.loglog([r["value"] for r in points], [r["ms a row"] for r in points], "o-", color="#2a6f97")
        axis.set(xlabel=name, title=f"exponent {exponent:.2f}")
        ticks = [points[0]["value"], points[-1]["value"]]
        axis.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axis.minorticks_off()
        axis.grid(visible=True, which="both", alpha=0.25)
    axes[0].set_ylabel("ms a row")
    figure.savefig(where, dpi=130)


if __name__ == "__main__":
    typer.run(main)
