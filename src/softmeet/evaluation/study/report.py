"""What a study says at the end: tables, sentences that the numbers bear out or not, and plots; Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from softmeet.evaluation.files import write_atomically, write_text
from softmeet.evaluation.study.entries import ALL
from softmeet.evaluation.study.runs import Json
from softmeet.rules.settings import DEFAULT_TRUST, rule_of

Numbers = list[float | None]
Columns = Sequence[tuple[str, list[Json]]]
# Rules that plots show.
_SHOWN = (
    "logit-mean", "prob-mean", "meet 1", "meet 10", "max-entropy", "least-squares", "min-underestimation",
    "min-reverse-cross-entropy",
)  # fmt: skip


@dataclass(frozen=True)
class StudyTable:
    """A title, column names, and rows of text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table in Markdown, under its title.

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
    """A plot of nats against something, one line a rule.

    Attributes:
        name: of the file, without its ending.
        title, x, y: what is written at the plot and its axes.
        lines: by label, each a list of (x, y) or of (x, y, half an interval), without points where y is infinite.
        log_x: whether the axis of x is logarithmic.
        zero: whether there is a line at zero.
        count: whether x is a whole number.
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
        """Write the plot as a PNG file.

        Raises:
            TraceError: the disk is full.
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
    """What a study found.

    Attributes:
        title: of the report.
        command: that made it.
        claims: sentences with their verdicts.
        tables, plots: below them.
        texts: passages by heading.
    """

    title: str
    command: str
    claims: Sequence[str]
    tables: Sequence[StudyTable]
    plots: Sequence[LinePlot] = ()
    texts: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write ``report.md`` and the plots in a folder, and return the path of the former."""
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
        """Return the title, the claims and the tables as JSON has them."""
        return {"title": self.title, "claims": list(self.claims), "tables": [asdict(table) for table in self.tables]}


def mean_text(values: Sequence[float | None]) -> str:
    """Write a mean; where some values are infinite (None), write their share instead.

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
    """Write a number with four decimals, or an exponent where those would show nothing; None is infinity.

    >>> number(0.25), number(1e-6), number(None)
    ('0.2500', '1.0e-06', '∞')
    """
    if x is None or not math.isfinite(x):
        return "∞"
    return f"{x:.1e}" if x and abs(x) < 5e-4 else f"{x:.4f}"


def all_rows(cells: Iterable[Json], rule: str, what: str = "kl") -> Numbers:
    """Return one rule's values over all rows of some cells."""
    return [x for cell in cells for x in cell["rules"][rule].get(what, [])]


def largest(cells: list[Json], rule: str, what: str = "kl") -> float | None:
    """Return the largest value of a rule; None if one is infinite or there is none."""
    values = all_rows(cells, rule, what)
    return None if not values or None in values else max(x for x in values if x is not None)


def outcomes(columns: Columns, where: str = "") -> list[StudyTable]:
    """Make tables of how far each rule is from the truth, and of how its rows ended.

    Args:
        columns: groups of cells and their names.
        where: the titles end in this.
    """
    return [
        _distances(f"KL(p*‖·), nats{where}", columns),
        _endings(f"Rows with a feasible distribution{where}", columns),
    ]


def by_column(title: str, columns: Columns, rows: Mapping[str, Sequence[str]]) -> StudyTable:
    """Make a table of a row for each rule and a column for each group of cells."""
    return StudyTable(title, ["rule", *(name for name, _ in columns)], [[name, *row] for name, row in rows.items()])


def _distances(title: str, columns: Columns) -> StudyTable:
    """Write the mean KL to the truth of every rule, and of the member that is best for each row; the least in bold."""
    text = {"best member of each row": [mean_text(_best_member(cells)) for _, cells in columns]}
    text |= {entry.name: [mean_text(all_rows(cells, entry.name)) for _, cells in columns] for entry in ALL}
    for k in range(len(columns)):
        finite = [float(row[k]) for row in text.values() if "∞" not in row[k] and row[k] != "-"]
        for row in text.values():
            # Rounding has no winners.
            if finite and "∞" not in row[k] and round(float(row[k]), 4) == round(min(finite), 4):
                row[k] = f"**{row[k]}**"
    return by_column(title, columns, text)


def _best_member(cells: Iterable[Json]) -> Numbers:
    """Return the KL of the best member of each row: an oracle's choice, stronger than the member best on average."""
    rows = (row for cell in cells for row in zip(*cell["members"], strict=True))
    return [min((x for x in row if x is not None), default=None) for row in rows]


def _endings(title: str, columns: Columns) -> StudyTable:
    """Write each rule's share of rows with a feasible distribution, and the number of rows that were not solved."""

    def ending(cells: list[Json], rule: str) -> str:
        infeasible, unsolved = (sum(cell["rules"][rule][what] for cell in cells) for what in ("infeasible", "unsolved"))
        share = 100 * (1 - infeasible / max(len(all_rows(cells, rule)), 1))
        return f"{share:.0f} %" + (f", {unsolved} unsolved" if unsolved else "")

    exact = [entry.name for entry in ALL if rule_of(entry.settings["rule"]).is_feasible]
    title += f" (where there is none `meet` at trust {DEFAULT_TRUST:g} answers, but for least squares)"
    return by_column(title, columns, {rule: [ending(cells, rule) for _, cells in columns] for rule in exact})


def never_worse(cells: list[Json], ours: str, theirs: str, within: float) -> str:
    """Claim that ``ours`` has no larger KL to the truth than ``theirs`` in any row, up to ``within`` nats."""
    a, b = all_rows(cells, ours), all_rows(cells, theirs)
    worse = [x - y for x, y in zip(a, b, strict=True) if x is not None and y is not None and x > y + within]
    lost = sum(x is None for x in a)
    verdict = "holds in" if not worse and not lost else f"**fails** in {len(worse) + lost} of"
    extra = f" (by up to {number(max(worse))} nats)" if worse else ""
    return f"`{ours}` is never worse than `{theirs}`: {verdict} {len(a)} rows{extra}"


def lines_by(cells: list[Json], x: Callable[[Json], float]) -> dict[str, list[tuple[float, ...]]]:
    """Return means by ``x`` of each rule that is shown; no point where a rule gives some truth an infinite loss."""
    lines: dict[str, list[tuple[float, ...]]] = {rule: [] for rule in _SHOWN}
    for place in sorted({x(c) for c in cells}):
        here = [c for c in cells if x(c) == place]
        for rule, points in lines.items():
            values = all_rows(here, rule)
            if None not in values:
                points.append((place, fmean(v for v in values if v is not None)))
    return lines
