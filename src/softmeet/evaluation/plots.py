"""Plots of an evaluation, as PNG files: gain by disagreement, calibration, and differences with intervals."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from softmeet.evaluation.files import write_atomically
from softmeet.extras import install_line
from softmeet.members.member import short

try:
    from matplotlib.figure import Figure
except ImportError as error:  # pragma: no cover - the extra is installed where tests run
    raise ImportError(f"plots are drawn by matplotlib: {install_line('eval')}") from error


def draw(facts: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the three plots of an evaluation as PNG files in a folder, and return their paths.

    They show each rule's gain over the best baseline by disagreement, the calibration, and the differences from that
    baseline with their intervals.

    Args:
        facts: the figures, as :func:`softmeet.evaluation.report.summary` returns them.
        folder: made if there is none; gets ``gain.png``, ``calibration.png`` and ``differences.png``, in this order.

    Raises:
        TraceError: if the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"gain": gain_plot(facts), "calibration": calibration_plot(facts), "differences": _differences(facts)}
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        write_atomically(written[-1], partial(figure.savefig, format="png", dpi=120))
    return written


def blank(width: float = 7.0, height: float = 4.5) -> tuple[Any, Any]:
    """Return (a Matplotlib figure of ``width`` by ``height`` inches, its axes), with nothing drawn."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _rivals(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: rule for name, rule in facts["rules"].items() if name != facts["baseline"]}


def gain_plot(facts: dict[str, Any]) -> Any:
    """Draw each rule's gain over the baseline by disagreement, from figures of :func:`summary`."""
    figure, axes = blank()
    rivals = _rivals(facts)
    for name, rule in rivals.items():
        bins = rule["gain_by_disagreement"]
        x, y = [b["disagreement"] for b in bins], [b["gain"] for b in bins]
        axes.errorbar(x, y, yerr=[2 * b["error"] for b in bins], marker="o", markersize=4, capsize=2, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlabel("disagreement of the members (Jensen-Shannon divergence, nats)")
    axes.set_ylabel(f"gain over {short(facts['baseline'])} (nats per {facts['vocabulary'][:-1]})")
    if rivals:
        axes.legend(frameon=False)
    return figure


def calibration_plot(facts: dict[str, Any]) -> Any:
    """Draw how often each rule's most probable token came, from figures of :func:`summary`."""
    figure, axes = blank(5.5, 5.0)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    for name, rule in facts["rules"].items():
        found = rule["calibration"]
        label = f"{name} (error {found['error']:.3f})"
        axes.plot(found["confidence"], found["accuracy"], marker="o", markersize=4, label=label)
    axes.set(xlabel="probability of the most probable token", ylabel="how often it came")
    axes.legend(frameon=False)
    return figure


def _differences(facts: dict[str, Any]) -> Any:
    rivals = _rivals(facts)
    figure, axes = blank(7.0, 1.5 + 0.35 * len(rivals))
    for k, rule in enumerate(rivals.values()):
        low, high = rule["against"]["ci95"]
        axes.plot([low, high], [k, k], color="tab:blue")
        axes.plot([rule["against"]["delta"]], [k], "o", color="tab:blue")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rivals)), list(rivals))
    axes.invert_yaxis()
    axes.set_xlabel(f"nats per token against {short(facts['baseline'])}, 95 % (left is better)")
    return figure
