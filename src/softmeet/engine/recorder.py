"""Counts of how generated positions were solved, which ``forward`` and ``generate`` fill on request.

A *row* is one position that is combined; a gate closes the rows for which it spares the rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.rules.solution import Solution
from softmeet.solvers.base import Status


@dataclass
class Savings:
    """The work that a gate saved.

    Attributes:
        rows: the number of rows, open or closed.
        gated: the number of rows that the gate closed.
        seconds: the time in seconds that the open rows took for the work that closed rows are spared: solving the rule
            and, under the gate ``unsure``, running the members after the first.
    """

    rows: int = 0
    gated: int = 0
    seconds: float = 0.0

    def add(self, rows: int, gated: int, seconds: float) -> None:
        """Add ``rows`` rows, ``gated`` of them closed, whose open ones took ``seconds``, to the counts."""
        self.rows, self.gated, self.seconds = self.rows + rows, self.gated + gated, self.seconds + seconds

    @property
    def share(self) -> float:
        """The share of the rows that were closed, from 0 to 1; 0 if there are no rows."""
        return self.gated / max(self.rows, 1)

    @property
    def saved(self) -> float | None:
        """An estimate of the seconds that closed rows saved, at an open row's mean time each; None if none was open.

        Under the gate ``unsure``, an open row's members also run the tokens that they skipped, in one chunk. The
        estimate is right if a chunk takes about as long as one token, which is so while reading the weights takes most
        of the time; if a chunk takes longer, the estimate is too high.
        """
        is_open = self.rows - self.gated
        return self.gated * self.seconds / is_open if is_open else None


@dataclass
class Recorder:
    """Counts over all rows of the calls of ``forward`` or ``generate`` that it is passed to as ``recorder=``.

    Attributes:
        rows: the number of rows, those that a gate closed included.
        asked: the number of rows at which every member ran: all rows, but for those that the gate ``unsure`` closed.
        passes: reads of all heads (:attr:`Solution.num_passes`), summed over all rows, closed ones included;
            ``passes / rows`` is the mean per row.
        fallbacks: the number of rows that had no feasible distribution, so that the fallback answered.
        statuses: the number of rows of each :class:`softmeet.Status`, by its name; no entry for a status of no row.
        largest_gap: the largest gap of a row that no gate closed, in nats; 0 if there is none.
        gate: the work that the gate saved.
        disagreement: (n,), each member's ``Solution.disagreement`` in nats, summed over the rows at which it ran; no
            elements before the first row.
        claims: (m,), the share that each reader which claims took, summed over the rows; no elements where none does.
        coming: the numbers of the sequences of which the next rows are, where ``generate`` says so: those that go on.
    """

    # Whether averages have to be solved for, too; otherwise add_average is called for those that need not be.
    needs_solutions: ClassVar[bool] = True

    rows: int = 0
    asked: int = 0
    passes: float = 0.0
    fallbacks: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    largest_gap: float = 0.0
    gate: Savings = field(default_factory=Savings)
    disagreement: Float[Tensor, " n"] = field(default_factory=lambda: torch.zeros(0))
    claims: Float[Tensor, " m"] = field(default_factory=lambda: torch.zeros(0))
    coming: list[int] = field(default_factory=list)

    def came(self, rows: int) -> list[int]:
        """Take from ``coming`` of which sequences so many rows are; none where nobody said so."""
        found = self.coming[:rows]
        del self.coming[:rows]
        return found

    def add_average(self, logits: Sequence[Float[Tensor, "B _"]]) -> None:
        """Add the rows of an average that was not solved for; here, their number.

        Args:
            logits: each member's, (B, v_i).
        """
        self.rows, self.asked = self.rows + len(logits[0]), self.asked + len(logits[0])

    def add(self, solution: Solution, log_probs: Float[Tensor, "n B v"]) -> None:
        """Add the rows of one solution to all counts; ``forward`` calls it once for each chunk of rows that it solves.

        Args:
            solution: the solution of B rows, open or closed.
            log_probs: (n, B, v), the members' log-probabilities in nats; unused here, for subclasses that keep them.
        """
        is_open, known = ~solution.gated, ~solution.disagreement.isnan().any(0)
        self.rows += solution.status.numel()
        self.asked += int(known.sum())
        self.gate.add(is_open.numel(), int(solution.gated.sum()), solution.seconds)
        self.passes += solution.num_passes.sum().item()
        self.fallbacks += int(solution.fallback.sum())
        for code, count in enumerate(solution.status.flatten().bincount().tolist()):
            if count:
                self.statuses[Status(code).name] += count
        self.largest_gap = max(self.largest_gap, solution.gap[is_open].max().item() if is_open.any() else 0.0)
        total = solution.disagreement.nan_to_num(0.0).flatten(1).sum(-1).cpu()
        self.disagreement = total if not len(self.disagreement) else self.disagreement + total
        if solution.claims is not None:
            shares = solution.claims.flatten(1).sum(-1).cpu()
            self.claims = shares if not len(self.claims) else self.claims + shares
