"""The study's plots: lines of nats against something, one a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from softmeet.evaluation.files import write_atomically


@dataclass(frozen=True)
class Plot:
    """Lines by label; each a list of (x, y) or of (x, y, half an interval), without points where y is infinite.

    ``count`` if x is a whole number.
    """

    name: str
    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, ...]]]
    log_x: bool = False
    zero: bool = False
    count: bool = False


def draw(plot: Plot, path: Path) -> None:
    """Write a PNG.

    Raises:
        TraceError: the disk is full.
    """
    from matplotlib.ticker import MaxNLocator

    from softmeet.evaluation.plots import blank

    figure, axes = blank(8.0, 5.0)
    for k, (label, points) in enumerate(plot.lines.items()):
        style: dict[str, Any] = {"marker": "osD^vP*X"[k % 8], "markersize": 4, "linewidth": 1.2, "label": label}
        if points and len(points[0]) == 3:
            x, y, half = zip(*points, strict=True)
            axes.errorbar(x, y, half, capsize=2, **style)
        else:
            axes.plot(*zip(*points, strict=True), **style)
    axes.set(xlabel=plot.x, ylabel=plot.y, title=plot.title)
    if plot.log_x:
        axes.set_xscale("log")
    if plot.count:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if plot.zero:
        axes.axhline(0, color="0.6", linewidth=0.8)
    axes.grid(visible=True, color="0.92")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    write_atomically(path, partial(figure.savefig, format="png", dpi=130))
