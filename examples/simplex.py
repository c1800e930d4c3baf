"""Draw two members and three tokens on the simplex: python examples/simplex.py docs/images

Every point is a distribution over the tokens A, B and C; the corners are certainty. docs/theory/worked-example.md
computes the same points by hand. In simplex.png the members are right as far as their heads can say; in
simplex-wrong.png they are not, and no distribution has both moments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

import softmeet

CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])  # of the tokens A, B and C
HEADS = [torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[0.0], [1.0], [0.0]])]  # W_i, (v, 1): tokens A and B
TRUTH = (0.45, 0.40, 0.15)
RIGHT = [(0.45, 0.275, 0.275), (0.30, 0.40, 0.30)]  # each as near to the truth as its head can be
WRONG = [(0.70, 0.15, 0.15), (0.20, 0.60, 0.20)]
TRUSTS = (0.3, 1.0, 10.0)
BLUE, ORANGE, GREEN = "#1f77b4", "#d95f02", "#1b9e77"


def combined(members: Sequence[Sequence[float]], rule: str) -> list[float]:
    """Return the distribution of a rule for two members' predictions, each three probabilities."""
    log_probs = torch.tensor(members, dtype=torch.float64).log()
    found: list[float] = softmeet.combine(log_probs, HEADS, rule, tol=1e-9).log_probs.exp().tolist()
    return found


def _at(p: Any) -> Any:
    """Return the place in the drawing of a point, (3,), or of points, (k, 3)."""
    return np.asarray(p, dtype=float) @ CORNERS


def draw(axes: Axes, members: Sequence[Sequence[float]], truth: Sequence[float] | None) -> None:
    """Draw what both members can say, what they say, the lines of their moments, the averages and ``meet``."""
    axes.fill(*CORNERS.T, facecolor="white", edgecolor="black", linewidth=1)
    for corner, name, shift in zip(CORNERS, "ABC", [(-0.05, -0.04), (0.05, -0.04), (0, 0.04)], strict=True):
        x, y = corner + shift
        axes.text(x, y, name, ha="center", va="center", fontsize=12)
    logits = np.linspace(-8, 8, 200)
    for token, (member, color) in enumerate(zip(members, (BLUE, ORANGE), strict=True)):
        said = np.exp(np.outer(logits, np.eye(3)[token]))
        axes.plot(*_at(said / said.sum(1, keepdims=True)).T, color=color, linewidth=1, linestyle=":")
        ends = np.full((2, 3), 0.0)
        ends[:, token] = member[token]
        ends[0, (token + 1) % 3] = ends[1, (token + 2) % 3] = 1 - member[token]
        axes.plot(*_at(ends).T, color=color, linewidth=1.5)
        axes.plot(*_at(member), "o", color=color, label=f"member {token + 1}; dotted: all it can say; line: its moment")
    path = [combined(members, f"meet:trust={trust}") for trust in np.geomspace(0.01, 1000, 40)]
    axes.plot(*_at(path).T, color=GREEN, linewidth=1)
    axes.plot(*_at(combined(members, "logit-mean")), "s", color="black", label="logit-mean")
    axes.plot(*_at(combined(members, "prob-mean")), "D", color="grey", markersize=4, label="prob-mean")
    for trust, size in zip(TRUSTS, (4, 6, 8), strict=True):
        point = combined(members, f"meet:trust={trust}")
        axes.plot(*_at(point), "^", color=GREEN, markersize=size, label=f"meet, trust {trust:g}")
    if truth is not None:
        axes.plot(*_at(truth), "*", color="black", markersize=13, label="the truth, and max-entropy")
    axes.set_aspect("equal")
    axes.axis("off")


def main(folder: Path) -> None:
    """Write both drawings into ``folder``."""
    for name, members, truth in (("simplex", RIGHT, TRUTH), ("simplex-wrong", WRONG, None)):
        figure, axes = plt.subplots(figsize=(6, 6))
        draw(axes, members, truth)
        figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False, fontsize=9)
        figure.tight_layout(rect=(0, 0.16, 1, 1))
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
