"""Verification of an answer: its residual, gap and status are recomputed in fp64, from the heads, without the solver.

The rule itself (``Rule.verify``) recomputes them from the stored dual variables and proofs, which nothing else is
trusted for. Rows of a rule without that method are UNVERIFIED.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.rules.answer import Answer
from softmeet.rules.problem import Problem
from softmeet.rules.recomputed import Recomputed
from softmeet.rules.settings import rule_of
from softmeet.simplex import total_variation


@dataclass(frozen=True)
class Verification:
    """The figures of each row of a solution, recomputed without the solver.

    Attributes:
        residual: ‖Q_iᵀ(p - p̂_i)‖, the distance of the answer p from member i's moments, Q_i being its whitened head,
            (n, *batch).
        gap: the gap in nats that is certified at the stored dual variables, (*batch); 0 for a closed form, inf if
            nothing could be certified.
        total_variation: between the answer and a distribution recomputed from the dual variables (``meet``,
            ``max-entropy``) or the formula (averages, ``one-hot``), (*batch); 0 for the other rules, which evaluate
            the answer itself; NaN for a rule without ``verify``.
        status: :class:`softmeet.Status` as int, (*batch): OPTIMAL if ``gap`` is at most the problem's ``tol`` and
            the answer itself is within it: by its own objective, by its divergence from that distribution
            (``reach``) or by its moments, whichever the rule asks for; DEGENERATE if moreover the objective is proved
            constant on the feasible set (OPTIMAL if only the solver showed that); INFEASIBLE if the stored proof
            holds; else NOT_CONVERGED; but UNVERIFIED for a rule without ``verify``.
    """

    residual: Float[Tensor, " n *batch"]
    gap: Float[Tensor, "*batch"]
    total_variation: Float[Tensor, "*batch"]
    status: Int[Tensor, "*batch"]

    def reshape(self, shape: torch.Size) -> Verification:
        """Return a copy whose one batch dimension is replaced by the dimensions ``shape``."""
        of_rows = [value.reshape(shape) for value in (self.gap, self.total_variation, self.status)]
        return Verification(self.residual.reshape(len(self.residual), *shape), *of_rows)


def residuals(problem: Problem, log_probs: Float[Tensor, "B v"]) -> Float[Tensor, "n B"]:
    """Return ‖Q_iᵀ(p - p̂_i)‖, the distance of p from member i's moments, by one read of every head.

    Args:
        problem: the problem with the members' p̂_i and whitened heads Q_i; products are in ``problem.dtype``.
        log_probs: log p of each of the B rows, in nats, on the device of ``problem.log_p``.
    """
    p, views = log_probs.exp(), problem.views(range(len(problem.heads)))
    return torch.stack([h.moments(p - q.exp())[0].norm(dim=-1) for h, q in zip(views, problem.log_p, strict=True)])


def verify(problem: Problem, answer: Answer, fallback: Bool[Tensor, " B"]) -> Verification:
    """Recompute residual, gap and status of every row of an answer in fp64, without the solver.

    Args:
        problem: the problem that was solved; its ``dtype`` is ignored.
        answer: the answer to its B rows.
        fallback: a bool mask, True in rows that the fallback answered; they are checked by the rule that
            ``on_infeasible`` names, with infinite trusts replaced by 0.3, all others by the problem's rule.

    Returns:
        The figures of each row, with one batch dimension of B rows.

    Raises:
        SoftmeetError: if ``Rule.verify`` raises it, such as RuleError if the rule fails.
    """
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
