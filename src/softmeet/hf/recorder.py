"""What became of each generated position: filled by forward, when asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.rules.solution import Solution
from softmeet.solvers.base import Status


@dataclass
class Savings:
    """What a gate kept from being done: rows in all, those of them that it closed, and the seconds of the open ones.

    ``seconds`` counts what a closed row goes without: the rule, and by ``unsure`` the other members.
    """

    rows: int = 0
    gated: int = 0
    seconds: float = 0.0

    def add(self, rows: int, gated: int, seconds: float) -> None:
        """Count some rows; the seconds are of those that were open."""
        self.rows, self.gated, self.seconds = self.rows + rows, self.gated + gated, self.seconds + seconds

    @property
    def share(self) -> float:
        """Of the rows, those that were closed; 0 of none."""
        return self.gated / max(self.rows, 1)

    @property
    def saved(self) -> float | None:
        """About how many seconds the closed rows saved: each what an open one took. None if no row was open to tell by.

        By ``unsure`` an open row also catches up on those before it, in one chunk. Where a chunk takes about as long as
        a token, as it does while weights are what is read, that is right; where it takes longer, this is too much.
        """
        is_open = self.rows - self.gated
        return self.gated * self.seconds / is_open if is_open else None


@dataclass
class Recorder:
    """Sums over the rows solved while it was passed to ``forward`` or ``generate`` as ``recorder=``.

    ``passes`` is a sum over ``rows``, and ``disagreement`` (n,) one over ``asked``, the rows at which every member ran;
    means are what one quotes. ``gate`` says how many rows a gate closed, ``largest_gap`` is of the others.
    """

    rows: int = 0
    asked: int = 0
    passes: float = 0.0
    fallbacks: int = 0
    unconverged: int = 0
    largest_gap: float = 0.0
    gate: Savings = field(default_factory=Savings)
    disagreement: Float[Tensor, " n"] = field(default_factory=lambda: torch.zeros(0))

    def add(self, solution: Solution, log_probs: Float[Tensor, "n B v"]) -> None:
        """Count the rows of one solution; ``log_probs`` are the members'."""
        is_open, known = ~solution.gated, ~solution.disagreement.isnan().any(0)
        self.rows += solution.status.numel()
        self.asked += int(known.sum())
        self.gate.add(is_open.numel(), int(solution.gated.sum()), solution.seconds)
        self.passes += solution.num_passes.sum().item()
        self.fallbacks += int(solution.fallback.sum())
        self.unconverged += int((solution.status == Status.NOT_CONVERGED).sum())
        self.largest_gap = max(self.largest_gap, solution.gap[is_open].max().item() if is_open.any() else 0.0)
        total = solution.disagreement.nan_to_num(0.0).flatten(1).sum(-1).cpu()
        self.disagreement = total if not len(self.disagreement) else self.disagreement + total
