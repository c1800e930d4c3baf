"""What a stored dual point proves about a row of ``meet`` or ``max-entropy``, in fp64 and without the solver."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.rules.answer import Answer
from softmeet.rules.points import exact_gap, proves_empty
from softmeet.rules.problem import Problem
from softmeet.rules.row import Row
from softmeet.solvers.base import Status
from softmeet.solvers.certificate import restricted_gap_bound


def looked_at(row: Row, trust: Sequence[float], answer: Answer, k: int) -> tuple[Float[Tensor, " v"], float, Status]:
    """Evaluate row k's dual point and proof.

    Args:
        row: the problem of that row alone.
        trust: of every member, as the rule solved with them.
        answer: of the whole batch.
        k: the row's place in it.

    Returns:
        (log p at the dual point, or of the pool where that answers, certified gap in nats, status).
    """
    gap, log_p = _gap_at(row.problem, trust, answer, k)
    status = Status.OPTIMAL if gap <= row.problem.tol else Status.NOT_CONVERGED
    return log_p, gap, Status.INFEASIBLE if _proves(row, answer, k) else status


def _gap_at(problem: Problem, trust: Sequence[float], answer: Answer, k: int) -> tuple[float, Float[Tensor, " v"]]:
    """(certified gap, log p) of a problem of one row at row k's stored dual point λ."""
    used = [i for i, rho in enumerate(trust) if rho > 0]
    if not used:
        return 0.0, problem.log_pool[0]
    projection = problem.projection(used, trust)
    # Q R⁻¹ λ: the scores of what λ says about the directions that are constrained, up to a constant.
    pairs = zip(used, projection.heads, strict=True)
    u = [h.scores((h.whitening.inverse @ answer.dual[i][k])[None])[0] for i, h in pairs]
    z = torch.stack([x / alpha for x, alpha in zip(u, projection.alpha, strict=True)])[None]
    p, r = projection.pooled(z).exp(), projection.corrected(z).exp()
    parts = zip(projection.alpha, projection.heads, range(len(used)), strict=True)
    gradient = torch.cat([alpha * h.moments(p - r[:, i])[0][0] for alpha, h, i in parts])
    if answer.by_pool[k]:
        return float(projection.pool_gap()[0] + projection.dual(z)[0]), problem.log_pool[0]
    log_p, bounds = projection.pooled(z)[0], [restricted_gap_bound(projection, 0, p[0], r[0], gradient)]
    if not any(d[k].any() for d in answer.dual):
        bounds.append(float(projection.pool_gap()[0]))
    if all(math.isinf(rho) for rho in trust):
        bounds.append(exact_gap(Row(problem), log_p, tuple(d[k] for d in answer.dual)))
    return min(bounds), log_p


def _proves(row: Row, answer: Answer, k: int) -> bool:
    """Whether the stored ray λ shows that no p has the members' moments: max_j Σ_i λ_iᵀ(a_ij - b_i) < 0."""
    return bool(any(ray[k].any() for ray in answer.ray)) and proves_empty(
        row, row.whitened(tuple(ray[k] for ray in answer.ray))
    )
