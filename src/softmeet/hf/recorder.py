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
    """What a gate kept from being done.

    Attributes:
        rows: in all.
        gated: those of them that the gate closed.
        seconds: that the open ones took for what a closed one goes without: the rule, and by ``unsure`` other members.
    """

    rows: int = 0
    gated: int = 0
    seconds: float = 0.0

    def add(self, rows: int, gated: int, seconds: float) -> None:
        """Count some rows; the seconds are of those that were open."""
        self.rows, self.gated, self.seconds = self.rows + rows, self.gated + gated, self.seconds + seconds

    @property
    def share(self) -> float:
        """The share of the rows that were closed; 0 of none."""
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

    Attributes:
        rows: how many there were.
        asked: those of them at which every member ran.
        passes: summed over ``rows``; divide by them to quote it.
        fallbacks, unconverged: how many rows were answered by the fallback, or not solved to the tolerance.
        largest_gap: in nats, of the rows that no gate closed.
        gate: what a gate saved.
        disagreement: (n,) each member's in nats, summed over ``asked``.
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
        """Count the rows of one solution.

        Args:
            solution: of B rows.
            log_probs: the members', in nats; subclasses keep them.
        """
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
