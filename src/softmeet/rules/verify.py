"""A second opinion on an answer: residual, gap and status in fp64, from the heads, without the solver.

The stored dual point is only a claim; everything is recomputed from it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from softmeet.rules.base import Answer
from softmeet.rules.meet import Meet
from softmeet.rules.problem import DEFAULT_TRUST, Problem
from softmeet.rules.registry import find_rule
from softmeet.simplex import total_variation
from softmeet.solvers.base import Status
from softmeet.solvers.certificate import restricted_gap_bound


@dataclass(frozen=True)
class Verification:
    """What the second look found; every field (*batch), but ``residual`` (n, *batch).

    Attributes:
        residual: ‖Q_iᵀ(p - p̂_i)‖ in whitened coordinates.
        gap: nats, certified at the stored dual point (0 for a closed form); inf where nothing could be certified.
        total_variation: between the answer and the distribution at that dual point (or the closed form).
        status: OPTIMAL, INFEASIBLE (the stored proof holds) or NOT_CONVERGED, at the tolerance of the problem.
    """

    residual: Float[Tensor, n * batch]
    gap: Float[Tensor, "*batch"]
    total_variation: Float[Tensor, "*batch"]
    status: Int[Tensor, "*batch"]

    def reshape(self, shape: torch.Size) -> Verification:
        """With the batch dimensions back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        residual = values.pop("residual").reshape(-1, *shape)
        return Verification(residual=residual, **{name: value.reshape(shape) for name, value in values.items()})


def residuals(problem: Problem, log_probs: Float[Tensor, "B v"]) -> Float[Tensor, "n B"]:
    """‖Q_iᵀ(p - p̂_i)‖; one read of every head."""
    views = problem.views(range(len(problem.heads)))
    p = log_probs.exp()
    return torch.stack([h.moments(p - q.exp())[0].norm(dim=-1) for h, q in zip(views, problem.log_p, strict=True)])


def verify(name: str, problem: Problem, answer: Answer, fallback: Bool[Tensor, " B"]) -> Verification:
    """Check every row of ``answer`` to the rule ``name``; rows of ``fallback`` are checked as the ``meet`` they are."""
    problem = replace(problem, dtype=torch.float64)
    rule = find_rule(name)
    if isinstance(rule, Meet):
        exact = rule.effective_trust(problem)
        relaxed = problem.with_finite_trust(DEFAULT_TRUST).trust
        rows = range(problem.log_p.shape[1])
        found = [_dual_point(problem, relaxed if fallback[k] else exact, answer, k) for k in rows]
        gap = torch.tensor([g for g, _ in found], dtype=torch.float64, device=problem.log_p.device)
        claimed = torch.stack([log_p for _, log_p in found])
    else:
        claimed = rule.solve(problem).log_probs
        gap = torch.zeros_like(answer.gap)
    status = torch.where(gap <= problem.tol, int(Status.OPTIMAL), int(Status.NOT_CONVERGED))
    proved = torch.tensor([_proves(problem, answer, k) for k in range(len(gap))], device=gap.device)
    status = torch.where(proved, int(Status.INFEASIBLE), status)
    distance = total_variation(answer.log_probs, claimed)
    return Verification(residuals(problem, answer.log_probs), gap, distance, status)


def _dual_point(
    problem: Problem, trust: tuple[float, ...], answer: Answer, k: int
) -> tuple[float, Float[Tensor, " v"]]:
    """(certified gap, log p) of row k at its stored dual point λ, in fp64."""
    one = problem.take(torch.tensor([k], device=problem.log_p.device))
    used = [i for i, rho in enumerate(trust) if rho > 0]
    if not used:
        return 0.0, one.log_pool[0]
    projection = one.projection(used, trust)
    u = [_scores(problem, i, k, answer.dual[i][k]) for i in used]
    z = torch.stack([x / alpha for x, alpha in zip(u, projection.alpha, strict=True)])[None]
    p, r = projection.pooled(z).exp(), projection.corrected(z).exp()
    parts = zip(projection.alpha, projection.heads, range(len(used)), strict=True)
    gradient = torch.cat([alpha * h.moments(p - r[:, i])[0][0] for alpha, h, i in parts])
    bounds = [restricted_gap_bound(projection, 0, p[0], r[0], gradient), float(projection.pool_gap()[0])]
    return min(bounds) if not any(d[k].any() for d in answer.dual) else bounds[0], projection.pooled(z)[0]


def _scores(problem: Problem, i: int, k: int, lam: Float[Tensor, " d"]) -> Float[Tensor, " v"]:
    head, slope = problem.heads[i], problem.slopes[i]
    raw = head.scores(lam[None].to(head.weight.device, torch.float64))[0].to(lam.device)
    out = pad(raw, (0, problem.log_p.shape[-1] - head.v))
    return out if slope is None else out * slope[k]


def _proves(problem: Problem, answer: Answer, k: int) -> bool:
    """Whether the stored ray λ shows that no p has the members' moments: max_j Σ_i λ_iᵀ(a_ij - b_i) < 0."""
    if not answer.ray or not any(ray[k].any() for ray in answer.ray):
        return False
    worst = -problem.log_pool.new_zeros(problem.log_p.shape[-1])
    for i, ray in enumerate(answer.ray):
        u = _scores(problem, i, k, ray[k])
        worst = worst + u - problem.log_p[i, k].exp() @ u
    return bool(worst[~problem.log_pool[k].isneginf()].max() < 0)
