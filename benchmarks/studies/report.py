"""The report of a study: tables, plots, and claims with their verdicts, as Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from jaxtyping import Float
from torch import Tensor

from softmeet.evaluation.files import write_atomically, write_text


@dataclass(frozen=True)
class StudyTable:
    """A table of text for a study's report.

    Attributes:
        title: the heading above it.
        header: the columns' names.
        rows: each row's cells, one for each column.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table in Markdown, under its title as a heading.

        >>> print(StudyTable("Loss", ["rule", "nats"], [["meet", "4.5"]]).markdown())
        ### Loss
        <BLANKLINE>
        | rule | nats |
        | --- | --- |
        | meet | 4.5 |
        <BLANKLINE>
        """
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"### {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@dataclass(frozen=True)
class LinePlot:
    """A plot of nats against another quantity, with one line for each rule.

    Attributes:
        name: the file's name, without its ending.
        title, x, y: the texts above the plot and along its axes.
        lines: by label, each line's points: all of a line are (x, y), or all are (x, y, half the width of an interval);
            y is finite.
        log_x: whether the x axis is logarithmic.
        zero: whether a horizontal line is drawn at 0.
        count: whether x is an integer, so that the axis has ticks at integers only.
    """

    name: str
    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, ...]]]
    log_x: bool = False
    zero: bool = False
    count: bool = False

    def draw(self, path: Path) -> None:
        """Draw the plot as a PNG file at ``path``.

        Raises:
            TraceError: if the disk is full.
        """
        from matplotlib.ticker import MaxNLocator

        from softmeet.evaluation.plots import blank

        figure, axes = blank(8.0, 5.0)
        for k, (label, points) in enumerate(self.lines.items()):
            style: dict[str, Any] = {"marker": "osD^vP*X"[k % 8], "markersize": 4, "linewidth": 1.2, "label": label}
            if points and len(points[0]) == 3:
                x, y, half = zip(*points, strict=True)
                axes.errorbar(x, y, half, capsize=2, **style)
            else:
                axes.plot(*zip(*points, strict=True), **style)
        axes.set(xlabel=self.x, ylabel=self.y, title=self.title)
        if self.log_x:
            axes.set_xscale("log")
        if self.count:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if self.zero:
            axes.axhline(0, color="0.6", linewidth=0.8)
        axes.grid(visible=True, color="0.92")
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        write_atomically(path, partial(figure.savefig, format="png", dpi=130))


@dataclass(frozen=True)
class Report:
    """The report of a study.

    Attributes:
        title: its heading.
        command: the command that made it.
        claims: sentences with their verdicts, or with figures.
        tables, plots: shown below the claims, tables first.
        texts: further passages in Markdown, by heading; shown last.
    """

    title: str
    command: str
    claims: Sequence[str]
    tables: Sequence[StudyTable]
    plots: Sequence[LinePlot] = ()
    texts: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write ``report.md`` and each plot, as a PNG file, to an existing folder; return the path of ``report.md``.

        Raises:
            TraceError: if the disk is full.
            ImportError: if there are plots, and Matplotlib is not installed.
        """
        parts = [f"# {self.title}", f"`{self.command}`", "\n".join(f"- {claim}" for claim in self.claims)]
        parts += [table.markdown() for table in self.tables]
        for plot in self.plots:
            plot.draw(folder / f"{plot.name}.png")
            parts.append(f"![{plot.title}]({plot.name}.png)")
        parts += [f"### {heading}\n\n{text}" for heading, text in self.texts.items()]
        path = folder / "report.md"
        write_text(path, "\n\n".join(parts) + "\n")
        return path

    def json(self) -> dict[str, Any]:
        """Return the title, the claims and the tables as a dictionary for JSON."""
        return {"title": self.title, "claims": list(self.claims), "tables": [asdict(table) for table in self.tables]}


def mean_text(values: Sequence[float | None]) -> str:
    """Return the mean as text, as :func:`number` writes it; ``-`` if there are no values.

    None stands for infinity: if there are such values, the text is ``∞`` and their share.

    >>> mean_text([0.5, 0.25]), mean_text([0.5, None])
    ('0.3750', '∞ (50 %)')
    """
    if not values:
        return "-"
    infinite = sum(x is None for x in values)
    if infinite:
        return f"∞ ({100 * infinite / len(values):.0f} %)"
    return number(fmean(x for x in values if x is not None))


def number(x: float | None) -> str:
    """Return a number as text: with four decimals, or an exponent if 0 < |x| < 0.0005; ∞ for None, NaN and infinity.

    >>> number(0.25), number(1e-6), number(None)
    ('0.2500', '1.0e-06', '∞')
    """
    if x is None or not math.isfinite(x):
        return "∞"
    return f"{x:.1e}" if x and abs(x) < 5e-4 else f"{x:.4f}"


def finite_or_none(values: Float[Tensor, " B"]) -> list[float | None]:
    """Return numbers as a list for JSON, with None for infinity and NaN.

    >>> import torch
    >>> finite_or_none(torch.tensor([0.5, float("inf")]))
    [0.5, None]
    """
    return [x if math.isfinite(x) else None for x in values.tolist()]
