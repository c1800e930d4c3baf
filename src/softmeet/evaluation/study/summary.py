"""From the cells of a known-truth tier to its tables and claims."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from softmeet.evaluation.study.entries import ALL
from softmeet.evaluation.study.report import Table, mean_text, number
from softmeet.evaluation.study.runs import Json
from softmeet.rules.settings import DEFAULT_TRUST, rule_of

Values = list[float | None]
# Rules that plots show.
_SHOWN = (
    "logit-mean", "prob-mean", "meet 1", "meet 10", "max-entropy", "least-squares", "min-underestimation",
    "min-reverse-cross-entropy",
)  # fmt: skip


def gathered(cells: Iterable[Json], label: str, what: str = "kl") -> Values:
    """One rule's values over all rows of some cells."""
    return [x for cell in cells for x in cell["rules"][label].get(what, [])]


def counted(cells: Iterable[Json], label: str, what: str) -> int:
    """How many rows of a rule ended in some way."""
    return sum(cell["rules"][label][what] for cell in cells)


def best_member(cells: Iterable[Json]) -> Values:
    """KL of the member that is best for each row: chosen by an oracle, a stronger baseline than the best on average."""
    return [
        min((x for x in row if x is not None), default=None)
        for cell in cells
        for row in zip(*cell["members"], strict=True)
    ]


def outcomes(columns: Sequence[tuple[str, list[Json]]], where: str = "") -> list[Table]:
    """What became of the rows of each group of cells: how far from the truth, and how they ended."""
    return [
        _by_columns(f"KL(p*‖·), nats{where}", columns),
        _endings(f"Rows with a feasible distribution{where}", columns),
    ]


def _by_columns(title: str, columns: Sequence[tuple[str, list[Json]]]) -> Table:
    """Mean KL to the truth of every rule, a column per group of cells; the best of each column in bold."""
    text = {"best member of each row": [mean_text(best_member(cells)) for _, cells in columns]}
    text |= {e.label: [mean_text(gathered(cells, e.label)) for _, cells in columns] for e in ALL}
    for k in range(len(columns)):
        finite = [float(row[k]) for row in text.values() if "∞" not in row[k] and row[k] != "-"]
        for row in text.values():
            # Rounding has no winners.
            if finite and "∞" not in row[k] and round(float(row[k]), 4) == round(min(finite), 4):
                row[k] = f"**{row[k]}**"
    return Table(title, ["rule", *(name for name, _ in columns)], [[name, *row] for name, row in text.items()])


def _endings(title: str, columns: Sequence[tuple[str, list[Json]]]) -> Table:
    """Per rule and group of cells: the share of rows with a feasible distribution, and rows that were not solved."""

    def cell(cells: list[Json], label: str) -> str:
        rows = len(gathered(cells, label))
        unsolved = counted(cells, label, "unsolved")
        share = 100 * (1 - counted(cells, label, "infeasible") / max(rows, 1))
        return f"{share:.0f} %" + (f", {unsolved} unsolved" if unsolved else "")

    exact = [e.label for e in ALL if rule_of(e.rule).is_feasible]
    rows = [[label, *(cell(cells, label) for _, cells in columns)] for label in exact]
    title += f" (where there is none `meet` at trust {DEFAULT_TRUST:g} answers, but for least squares)"
    return Table(title, ["rule", *(name for name, _ in columns)], rows)


def never_worse(cells: list[Json], ours: str, theirs: str, within: float) -> str:
    """A claim: ``ours`` has no larger KL to the truth than ``theirs`` in any row, up to ``within`` nats."""
    a, b = gathered(cells, ours), gathered(cells, theirs)
    worse = [x - y for x, y in zip(a, b, strict=True) if x is not None and y is not None and x > y + within]
    lost = sum(x is None for x in a)
    verdict = "holds in" if not worse and not lost else f"**fails** in {len(worse) + lost} of"
    extra = f" (by up to {number(max(worse))} nats)" if worse else ""
    return f"`{ours}` is never worse than `{theirs}`: {verdict} {len(a)} rows{extra}"


def lines_by(cells: list[Json], x: Callable[[Json], float]) -> dict[str, list[tuple[float, ...]]]:
    """Means by ``x`` of each rule that is shown; no point where a rule gives some truth an infinite loss."""
    lines: dict[str, list[tuple[float, ...]]] = {label: [] for label in _SHOWN}
    for place in sorted({x(c) for c in cells}):
        here = [c for c in cells if x(c) == place]
        for label, points in lines.items():
            values = gathered(here, label)
            if None not in values:
                points.append((place, fmean(v for v in values if v is not None)))
    return lines


def largest(cells: list[Json], label: str, what: str = "kl") -> float | None:
    """The largest value of a rule; None if one is infinite or there is none."""
    values = gathered(cells, label, what)
    return None if not values or any(x is None for x in values) else max(x for x in values if x is not None)
