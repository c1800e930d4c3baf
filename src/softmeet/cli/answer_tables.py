"""Tables of right answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softmeet.cli import options
from softmeet.cli.tables import out, print_table
from softmeet.evaluation.record import repeats


def show(facts: dict[str, Any]) -> None:
    """Print the figures of :func:`softmeet.answers.results.figures`."""
    console, told = out(), any("seconds" in row for row in facts["rows"])
    rows = [
        (
            _shown(row), _percent(row["right"], row["ci95"]),
            _percent(row["against"]["delta"], row["against"]["ci95"], "+") if "against" in row else "the best member",
            f"{row['against']['p']:.2g}" if "against" in row else "",
            f"{row['seconds']:.2f}" if "seconds" in row else "", f"{row['tokens']:.0f}" if "tokens" in row else "",
        )[: None if told else 4]
        for row in facts["rows"]
    ]  # fmt: skip
    columns = ("", "right, %", "against the best member, %", "p", "s a question", "tokens a question")
    print_table(console, columns if told else columns[:4], [rows], title=_title(facts))
    console.print(
        "Shares have Wilson's 95 % intervals, differences at the same questions Bonett's and Price's, and p is that of "
        "McNemar's exact test. The best member is the best on these very questions."
    )
    for line in repeats(facts.get("run", {}).get("members", ())):
        console.print(line)
    doubts = [row for row in facts["rows"] if row.get("doubt")]
    if doubts:
        names = list(dict.fromkeys(name for row in doubts for name in row["doubt"]))
        cells = [[_shown(row), *(_area(row["doubt"].get(name)) for name in names)] for row in doubts]
        print_table(console, ["", *names], [cells], title="How well doubt tells wrong answers from right ones (AUROC)")


def _title(facts: dict[str, Any]) -> str:
    if "metrics" not in facts:
        return f"{facts['questions']:,} questions, answered by {facts['how']}"
    tasks, metrics = list(facts["metrics"]), ", ".join(dict.fromkeys(facts["metrics"].values()))
    return f"{facts['questions']:,} questions of {tasks[0] if len(tasks) == 1 else f'{len(tasks)} tasks'}, by {metrics}"


def _shown(row: dict[str, Any]) -> str:
    return options.short(row["name"]) if "/" in row["name"] else str(row["name"])


def _area(found: dict[str, Any] | None) -> str:
    return "" if found is None else "{:.2f} [{:.2f}, {:.2f}]".format(found["auroc"], *found["ci95"])


def _percent(share: float, interval: Sequence[float], sign: str = "") -> str:
    mean, low, high = (f"{100 * x:{sign}.0f}" for x in (share, *interval))
    return f"{mean} [{low}, {high}]"
