"""A second opinion on an answer: residual, gap and status in fp64, from the heads, without the solver.

The stored dual point is only a claim; everything is recomputed from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.heads import WhitenedHead
from softmeet.rules.base import Answer
from softmeet.rules.exact import ExactRule
from softmeet.rules.meet import MaxEntropy, Meet
from softmeet.rules.points import exact_gap, moments_hold, proves_empty
from softmeet.rules.problem import Problem, finite_trust
from softmeet.rules.registry import find_rule
from softmeet.rules.row import Row, may_be_unique
from softmeet.simplex import total_variation
from softmeet.solvers.base import Status
from softmeet.solvers.certificate import restricted_gap_bound


@dataclass(frozen=True)
class Verification:
    """What the second look found; every field (*batch), but ``residual`` (n, *batch).

    Attributes:
        residual: ‖Q_iᵀ(p - p̂_i)‖ in whitened coordinates.
        gap: nats, certified at the stored dual point (0 for a closed form); inf where nothing could be certified.
        total_variation: between the answer and the distribution at that dual point (or the closed form); 0 for rules
            whose own p is evaluated, which are all but the averages, ``meet`` and ``max-entropy``.
        status: OPTIMAL, DEGENERATE (the objective is proved constant; where only two programs show that, OPTIMAL),
            INFEASIBLE (the stored proof holds) or NOT_CONVERGED, at the tolerance of the problem.
    """

    residual: Float[Tensor, n * batch]
    gap: Float[Tensor, "*batch"]
    total_variation: Float[Tensor, "*batch"]
    status: Int[Tensor, "*batch"]

    def reshape(self, shape: torch.Size) -> Verification:
        """With the batch dimensions back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        residual = values.pop("residual")
        residual = residual.reshape(len(residual), *shape)
        return Verification(residual=residual, **{name: value.reshape(shape) for name, value in values.items()})


def residuals(problem: Problem, log_probs: Float[Tensor, "B v"]) -> Float[Tensor, "n B"]:
    """‖Q_iᵀ(p - p̂_i)‖ in the directions that are constrained; one read of every head."""
    if not len(log_probs):
        return log_probs.new_zeros(len(problem.heads), 0)
    starts = iter(log_probs.exp().split([piece.log_p.shape[1] for piece in problem.pieces()]))
    parts = []
    for piece, p in zip(problem.pieces(), starts, strict=True):
        views = piece.views(range(len(piece.heads)))
        off = [h.moments(p - q.exp())[0].norm(dim=-1) for h, q in zip(views, piece.log_p, strict=True)]
        parts.append(torch.stack(off))
    return torch.cat(parts, dim=-1)


def verify(name: str, problem: Problem, answer: Answer, fallback: Bool[Tensor, " B"]) -> Verification:
    """Check every row of ``answer`` to the rule ``name``; rows of ``fallback`` are checked as the ``meet`` they are."""
    problem = replace(problem, dtype=torch.float64)
    rule = find_rule(name)
    if isinstance(rule, Meet | ExactRule):
        found = [_second_look(rule, one, answer, k, bool(fallback[k])) for k, one in enumerate(problem.rows())]
        gap = torch.tensor([look.gap for look in found], dtype=torch.float64, device=problem.log_p.device)
        claimed = torch.stack([look.log_p for look in found]) if found else answer.log_probs
        status = torch.tensor([look.status for look in found], dtype=torch.int64, device=gap.device)
    else:
        claimed = rule.solve(problem).log_probs
        gap = torch.zeros_like(answer.gap)
        status = torch.full_like(answer.status, int(Status.OPTIMAL))
    distance = total_variation(answer.log_probs, claimed)
    return Verification(residuals(problem, answer.log_probs), gap, distance, status)


@dataclass(frozen=True, eq=False)
class _Look:
    """What a row is found to be."""

    gap: float
    log_p: Float[Tensor, " v"]
    status: int


def _second_look(rule: Meet | ExactRule, problem: Problem, answer: Answer, k: int, fallback: bool) -> _Look:
    row = Row(problem)
    if isinstance(rule, ExactRule) and not fallback:
        p = answer.log_probs[k].exp()
        found = rule.proved(row, p, row.whitened(tuple(lam[k] for lam in answer.dual)))
        status = rule.status(row, p, found)
        return _Look(found.gap, (p / p.sum()).log(), int(status))
    relaxed = finite_trust(problem.trust)
    trust = relaxed if fallback else rule.effective_trust(problem)  # type: ignore[union-attr]
    if isinstance(rule, MaxEntropy) and not fallback and _is_only_point(row, answer.log_probs[k].exp()):
        return _Look(0.0, answer.log_probs[k], int(Status.OPTIMAL))
    gap, log_p = _dual_point(problem, trust, answer, k)
    status = Status.OPTIMAL if gap <= problem.tol else Status.NOT_CONVERGED
    return _Look(gap, log_p, int(Status.INFEASIBLE if _proves(row, answer, k) else status))


def _is_only_point(row: Row, p: Float[Tensor, " v"]) -> bool:
    return may_be_unique(row.problem) and row.unique and moments_hold(row, p)


def _dual_point(
    problem: Problem, trust: tuple[float, ...], answer: Answer, k: int
) -> tuple[float, Float[Tensor, " v"]]:
    """(certified gap, log p) of a problem of one row at row k's stored dual point λ, in fp64."""
    used = [i for i, rho in enumerate(trust) if rho > 0]
    if not used:
        return 0.0, problem.log_pool[0]
    projection = problem.projection(used, trust)
    u = [_scores(h, answer.dual[i][k]) for i, h in zip(used, projection.heads, strict=True)]
    z = torch.stack([x / alpha for x, alpha in zip(u, projection.alpha, strict=True)])[None]
    p, r = projection.pooled(z).exp(), projection.corrected(z).exp()
    parts = zip(projection.alpha, projection.heads, range(len(used)), strict=True)
    gradient = torch.cat([alpha * h.moments(p - r[:, i])[0][0] for alpha, h, i in parts])
    log_p, bounds = projection.pooled(z)[0], [restricted_gap_bound(projection, 0, p[0], r[0], gradient)]
    if not any(d[k].any() for d in answer.dual):
        bounds.append(float(projection.pool_gap()[0]))
    if all(math.isinf(rho) for rho in trust):
        bounds.append(exact_gap(Row(problem), log_p, tuple(d[k] for d in answer.dual)))
    return min(bounds), log_p


def _scores(head: WhitenedHead, lam: Float[Tensor, " d"]) -> Float[Tensor, " v"]:
    """Q R⁻¹ λ, the scores of what λ says about the directions that are constrained, up to a constant."""
    return head.scores((head.whitening.inverse @ lam)[None])[0]


def _proves(row: Row, answer: Answer, k: int) -> bool:
    """Whether the stored ray λ shows that no p has the members' moments: max_j Σ_i λ_iᵀ(a_ij - b_i) < 0."""
    return bool(any(ray[k].any() for ray in answer.ray)) and proves_empty(
        row, row.whitened(tuple(ray[k] for ray in answer.ray))
    )
