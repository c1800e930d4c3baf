"""Upper bounds on the duality gap of a relaxed I-projection, from one linear solve.

For feasible (p̃, r̃), primal(p̃, r̃) + f(λ) = KL(p̃‖p_λ) + Σ ρ_i KL(r̃_i‖r_i,λ), so the right-hand side bounds f(λ) - f*.
With H s = g, the relative changes x_j = -(a_j - m)ᵀs and y_ij = γ_i (a_ij - m_i)ᵀs_i make p̃ = p(1 + x), r̃_i = r_i(1 + y_i)
feasible when all are at least -1, and then

    gap ≤ Σ_j p_j φ(x_j) + Σ_i ρ_i Σ_j r_ij φ(y_ij),   φ(x) = (1 + x) log(1 + x) - x.

All sums may be restricted to a set K of tokens, if H and the changes are.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.solvers.projection import Projection

# A change smaller than this share of all mass is below the rounding of the sums that it enters.
_NEGLIGIBLE = 1e-17


def phi(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """(1 + x) log(1 + x) - x for x ≥ -1, without cancellation near 0."""
    series = x * x * (0.5 - x * (1 / 6 - x * (1 / 12 - x / 20)))
    exact = torch.special.xlogy(1 + x, 1 + x) - x
    return torch.where(x.abs() < 1e-3, series, exact)


def bound_terms(
    p: Float[Tensor, "*b v"], x: Float[Tensor, "*b v"]
) -> tuple[Float[Tensor, "*b"], Bool[Tensor, "*b v"]]:
    """(Σ p φ(x), the tokens where p(1 + x) would be negative); a token of negligible change is left as it is."""
    x = torch.where(p * x.abs() < _NEGLIGIBLE, 0.0, x)
    return (p * phi(x.clamp_min(-1))).sum(-1), x < -1


def gap_bound(
    problem: Projection,
    p: Float[Tensor, "B v"],
    r: Float[Tensor, "B n v"],
    change: Float[Tensor, "B n v"],
) -> tuple[Float[Tensor, " B"], Bool[Tensor, "B v"]]:
    """(bound in nats, tokens that break it); the bound holds for rows where no token does.

    Args:
        problem: the projection.
        p, r: the distributions at the current dual point.
        change: Q_i(-s_i), the scores of the Newton direction.
    """
    x = problem.tilt(change)
    bound, broken = bound_terms(p, x - (p * x).sum(-1, keepdim=True))
    for i, rho in enumerate(problem.trust):
        if not math.isinf(rho):
            y = -problem.gamma[i] * change[:, i]
            term, negative = bound_terms(r[:, i], y - (r[:, i] * y).sum(-1, keepdim=True))
            bound, broken = bound + rho * term, broken | negative
    return bound, broken


def restricted_gap_bound(
    problem: Projection,
    row: int,
    p: Float[Tensor, " v"],
    r: Float[Tensor, "n v"],
    gradient: Float[Tensor, " D"],
    broken: Bool[Tensor, " v"],
    limit: int = 4096,
) -> float:
    """The bound of one row over a set K of at most ``limit`` tokens that leaves out the ``broken`` ones; inf if none.

    Tokens that turn out to break the bound are left out in turn, a few times.
    """
    exact = torch.tensor([math.isinf(rho) for rho in problem.trust], device=p.device)
    rho = torch.tensor(problem.trust, dtype=p.dtype, device=p.device).masked_fill(exact, 0.0)
    weight = torch.where(broken, 0.0, p + rho @ r)
    tokens = weight.topk(min(limit, int((weight > 0).sum()))).indices
    rows = [h.gather(row, tokens) for h in problem.heads]
    keep = torch.ones_like(tokens, dtype=torch.bool)
    for _ in range(4):
        kept = [a[keep] for a in rows]
        bound, negative = _bound_over(problem, kept, p[tokens[keep]], r[:, tokens[keep]], gradient)
        if bound == math.inf or not negative.any():
            return bound
        keep[keep.nonzero().squeeze(-1)[negative]] = False
    return math.inf


def _bound_over(
    problem: Projection,
    rows: list[Float[Tensor, "k rank"]],
    p: Float[Tensor, " k"],
    r: Float[Tensor, "n k"],
    gradient: Float[Tensor, " D"],
) -> tuple[float, Bool[Tensor, " k"]]:
    """(bound, tokens that break it) from the exact Hessian over the given rows of Q; inf if it cannot meet g."""
    joint = torch.cat([alpha * (a - p @ a / p.sum()) for a, alpha in zip(rows, problem.alpha, strict=True)], dim=-1)
    own = [gamma * (a - r_i @ a / r_i.sum()) for a, r_i, gamma in zip(rows, r, problem.gamma, strict=True)]
    blocks = [(a * r_i[:, None]).T @ a for a, r_i in zip(own, r, strict=True)]
    # ρ γ² = α γ; an exact member has γ = 0 and no block.
    scales = [0.0 if math.isinf(rho) else rho for rho in problem.trust]
    H = (joint * p[:, None]).T @ joint + torch.block_diag(*(c * b for c, b in zip(scales, blocks, strict=True)))
    s = torch.linalg.lstsq(H, gradient[:, None], driver="gelsd").solution.squeeze(-1)
    if (H @ s - gradient).norm() > 1e-7 * gradient.norm():
        return math.inf, torch.zeros_like(p, dtype=torch.bool)
    bound, broken = bound_terms(p, -(joint @ s))
    for i, part in enumerate(s.split([a.shape[1] for a in rows])):
        term, negative = bound_terms(r[i], own[i] @ part)
        bound, broken = bound + scales[i] * term, broken | negative
    return float(bound), broken
