"""A second opinion on an answer: residual, gap and status in fp64, from the heads, without the solver.

The stored dual point is only a claim; everything is recomputed from it, by the rule itself (``Rule.verify``). A rule
that has no second look is UNVERIFIED.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.rules.answer import Answer
from softmeet.rules.problem import Problem
from softmeet.rules.settings import rule_of
from softmeet.simplex import total_variation
from softmeet.solvers.base import Status


@dataclass(frozen=True)
class Verification:
    """What the second look found; every field (*batch), but ``residual`` (n, *batch).

    Attributes:
        residual: ‖Q_iᵀ(p - p̂_i)‖ in whitened coordinates.
        gap: nats, certified at the stored dual point (0 for a closed form); inf where nothing could be certified.
        total_variation: between the answer and the distribution at that dual point (or the closed form); 0 for rules
            whose own p is evaluated, which are all but the averages, ``meet`` and ``max-entropy``; NaN for a rule that
            has no second look.
        status: OPTIMAL, DEGENERATE (the objective is proved constant; where only two programs show that, OPTIMAL),
            INFEASIBLE (the stored proof holds) or NOT_CONVERGED, at the tolerance of the problem; UNVERIFIED for a rule
            that has no second look.
    """

    residual: Float[Tensor, n * batch]
    gap: Float[Tensor, "*batch"]
    total_variation: Float[Tensor, "*batch"]
    status: Int[Tensor, "*batch"]

    def reshape(self, shape: torch.Size) -> Verification:
        """Give the batch dimensions back."""
        flat = (self.gap, self.total_variation, self.status)
        return Verification(
            self.residual.reshape(len(self.residual), *shape), *(value.reshape(shape) for value in flat)
        )


@dataclass(frozen=True, eq=False)
class Recomputed:
    """What a rule finds when it looks at its answer again: the distribution at the stored point, its gap and status."""

    log_probs: Float[Tensor, "B v"]
    gap: Float[Tensor, " B"]
    status: Int[Tensor, " B"]

    @staticmethod
    def of_rows(rows: Sequence[tuple[Float[Tensor, " v"], float, int]], like: Float[Tensor, "B v"]) -> Recomputed:
        """Join (log-probabilities, gap, status) of single rows; ``like`` gives the shape where there is none."""
        log_probs = torch.stack([log_p for log_p, _, _ in rows]) if rows else like
        gap = like.new_tensor([gap for _, gap, _ in rows])
        return Recomputed(log_probs, gap, gap.new_tensor([int(s) for _, _, s in rows]).long())

    @staticmethod
    def nothing(answer: Answer) -> Recomputed:
        """Say that there was no second look."""
        unknown = torch.full_like(answer.gap, torch.inf)
        status = torch.full_like(answer.status, int(Status.UNVERIFIED))
        return Recomputed(torch.full_like(answer.log_probs, torch.nan), unknown, status)


def residuals(problem: Problem, log_probs: Float[Tensor, "B v"]) -> Float[Tensor, "n B"]:
    """Measure ‖Q_iᵀ(p - p̂_i)‖ in the directions that are constrained; one read of every head."""
    if not len(log_probs):
        return log_probs.new_zeros(len(problem.heads), 0)
    starts = iter(log_probs.exp().split([piece.log_p.shape[1] for piece in problem.pieces()]))
    parts = []
    for piece, p in zip(problem.pieces(), starts, strict=True):
        views = piece.views(range(len(piece.heads)))
        off = [h.moments(p - q.exp())[0].norm(dim=-1) for h, q in zip(views, piece.log_p, strict=True)]
        parts.append(torch.stack(off))
    return torch.cat(parts, dim=-1)


def verify(problem: Problem, answer: Answer, fallback: Bool[Tensor, " B"]) -> Verification:
    """Check every row of ``answer`` to the rule of ``problem``; rows of ``fallback`` are checked as what they are."""
    problem = problem.changed(dtype=torch.float64)
    claimed, gap, status = torch.empty_like(answer.log_probs), answer.gap.clone(), answer.status.clone()
    for which, relaxed in ((~fallback, False), (fallback, True)):
        rows = which.nonzero().squeeze(-1)
        if len(rows):
            part, some = problem.take(rows), answer.take(rows)
            part = part.relaxed() if relaxed else part
            rule = rule_of(part.settings.on_infeasible) if relaxed else part.settings.rule
            found = rule.verify(part, some) or Recomputed.nothing(some)
            claimed[rows], gap[rows], status[rows] = found.log_probs, found.gap, found.status
    distance = total_variation(answer.log_probs, claimed)
    return Verification(residuals(problem, answer.log_probs), gap, distance, status)
