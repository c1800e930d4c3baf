"""What became of each generated position: filled by forward, when asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.rules.solution import Solution
from softmeet.solvers.base import Status


@dataclass
class Recorder:
    """Sums over the rows solved while it was passed to ``forward`` or ``generate`` as ``recorder=``.

    ``disagreement`` (n,) and ``passes`` are sums over ``rows``; means are what one quotes.
    """

    rows: int = 0
    passes: float = 0.0
    fallbacks: int = 0
    unconverged: int = 0
    largest_gap: float = 0.0
    disagreement: Float[Tensor, " n"] = field(default_factory=lambda: torch.zeros(0))

    def add(self, solution: Solution, log_probs: Float[Tensor, "n B v"]) -> None:
        """Count the rows of one solution; ``log_probs`` are the members'."""
        self.rows += solution.status.numel()
        self.passes += solution.num_passes.sum().item()
        self.fallbacks += int(solution.fallback.sum())
        self.unconverged += int((solution.status == Status.NOT_CONVERGED).sum())
        self.largest_gap = max(self.largest_gap, solution.gap.max().item())
        total = solution.disagreement.flatten(1).sum(-1).cpu()
        self.disagreement = total if not len(self.disagreement) else self.disagreement + total
