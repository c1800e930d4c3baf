"""A second opinion on an answer: residual, gap and status in fp64, from the heads, without the solver.

The stored dual point is only a claim; everything is recomputed from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from softmeet.heads import WhitenedHead, whitened_blocks
from softmeet.rules.base import Answer
from softmeet.rules.meet import Meet
from softmeet.rules.problem import DEFAULT_TRUST, Problem
from softmeet.rules.registry import find_rule
from softmeet.simplex import log_normalize, total_variation
from softmeet.solvers.base import Status
from softmeet.solvers.certificate import bound_terms


@dataclass(frozen=True)
class Verification:
    """What the second look found; every field (*batch), but ``residual`` (n, *batch).

    Attributes:
        residual: ‖Q_iᵀ(p - p̂_i)‖ in whitened coordinates.
        gap: nats, certified at the stored dual point (0 for a closed form); inf where nothing could be certified.
        total_variation: between the answer and the distribution at that dual point (or the closed form).
        status: OPTIMAL, INFEASIBLE (the stored proof holds) or NOT_CONVERGED, at the tolerance of the problem.
    """

    residual: Float[Tensor, "n *batch"]
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
        found = [_DualPoint(problem, relaxed if fallback[k] else exact, answer, k).gap() for k in rows]
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


def _scores(problem: Problem, i: int, k: int, lam: Float[Tensor, " d"]) -> Float[Tensor, " v"]:
    head, slope = problem.heads[i], problem.slopes[i]
    out = pad(head.scores(lam[None].double())[0], (0, problem.log_p.shape[-1] - head.v))
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


class _DualPoint:
    """One row at its stored dual point, in whitened coordinates."""

    def __init__(self, problem: Problem, trust: tuple[float, ...], answer: Answer, k: int) -> None:
        self.used = [i for i, rho in enumerate(trust) if rho > 0]
        self.trust = [trust[i] for i in self.used]
        one = problem.take(torch.tensor([k], device=problem.log_p.device))
        self.heads: tuple[WhitenedHead, ...] = one.views(self.used)
        u = [_scores(problem, i, k, answer.dual[i][k]) for i in self.used]
        self.log_p = log_normalize(sum(u, start=problem.log_pool[k]))
        self.p = self.log_p.exp()
        tilted = zip(self.used, u, self.trust, strict=True)
        self.r = [log_normalize(problem.log_p[i, k] - x / rho).exp() for i, x, rho in tilted]

    def gap(self) -> tuple[float, Float[Tensor, " v"]]:
        """(certified gap, log p); tokens that break the bound are left out of K, a few times."""
        if not self.used:
            return 0.0, self.log_p
        keep = torch.ones_like(self.p, dtype=torch.bool)
        for _ in range(4):
            bound, broken = self._bound(keep)
            if math.isinf(bound) or not broken.any():
                return bound, self.log_p
            keep &= ~broken
        return math.inf, self.log_p

    def _bound(self, keep: Bool[Tensor, " v"]) -> tuple[float, Bool[Tensor, " v"]]:
        g = torch.cat([h.moments((self.p - r)[None])[0][0] for h, r in zip(self.heads, self.r, strict=True)])
        p, rs = self.p * keep, [r * keep for r in self.r]
        s = torch.linalg.lstsq(H := self._hessian(p, rs), g[:, None], driver="gelsd").solution.squeeze(-1)
        if (H @ s - g).norm() > 1e-6 * g.norm() + 1e-14:
            return math.inf, torch.zeros_like(keep)
        parts = s.split([h.rank for h in self.heads])
        a = [h.scores(part[None])[0] for h, part in zip(self.heads, parts, strict=True)]
        total = torch.stack(a).sum(0)
        bound, broken = bound_terms(p, -(total - p @ total / p.sum()))
        for x, r, rho in zip(a, rs, self.trust, strict=True):
            if not math.isinf(rho):
                term, negative = bound_terms(r, (x - r @ x / r.sum()) / rho)
                bound, broken = bound + rho * term, broken | negative
        return float(bound), broken

    def _hessian(self, p: Float[Tensor, " v"], rs: list[Float[Tensor, " v"]]) -> Float[Tensor, "D D"]:
        """Cov_p(Q) + blockdiag(Cov_{r_i}(Q_i) / ρ_i), sums over the mass that is there."""
        means = [h.moments(torch.stack([p, r])) for h, r in zip(self.heads, rs, strict=True)]
        joint = torch.cat([m[0][0] for m in means]) / p.sum()
        own = [m[0][1] / r.sum() for m, r in zip(means, rs, strict=True)]
        H = torch.zeros(len(joint), len(joint), dtype=p.dtype, device=p.device)
        for tokens, blocks in whitened_blocks(self.heads):
            rows = [h.sloped(b, 0, tokens) for h, b in zip(self.heads, blocks, strict=True)]
            x = torch.cat(rows, dim=-1) - joint
            H += (x * p[tokens, None]).T @ x
            parts = [(a - m).T @ ((a - m) * r[tokens, None]) for a, m, r in zip(rows, own, rs, strict=True)]
            H += torch.block_diag(*(part / rho for part, rho in zip(parts, self.trust, strict=True)))
        return H
