"""The price of a difference of moments that a feasible point of a relaxed I-projection leaves, in nats.

Symbols are those of :mod:`softmeet.solvers.certificate`. If p̃ and r̃_i are to be feasible, e_i = Q_iᵀ(p̃ - r̃_i) has to
be 0, and solvers leave a little. Let u_i be signed masses of total 0 with Q_iᵀu_i = e_i. Adding u_i's positive part to
r̃_i and its negative part to p̃ and to every other r̃_k makes moments equal, whatever the masses are, and by convexity
raises a bound on the gap by no more than

    Σ_j u_ij⁺ ρ_i log(1/r_ij) + Σ_j u_ij⁻ (log(1/p_j) + Σ_{k≠i} ρ_k log(1/r_kj)).

u_i = Q_i e_i is such a measure, for Q_i has orthonormal columns of sum 0: no head is read to bound its cost
(:func:`moment_prices`). Where tokens cannot have mass, or a soft-cap has its slopes, some rows of the head give one
(:func:`carried`).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.solvers.linalg import add_ridge
from softmeet.solvers.projection import Projection

# A residual up to this share is rounding; one up to this share may be estimated; the most solutions of a system.
ROUNDING, _ESTIMATED, _REFINED = 1e-9, 1e-7, 3


def moment_prices(
    problem: Projection, log_p: Float[Tensor, "B v"], log_r: Float[Tensor, "B n v"]
) -> Float[Tensor, "B n"]:
    """Bound the cost of making up a difference Q_iᵀ(p̃ - r̃_i) of member i's moments, per unit of its length; no read.

    It is the Euclidean length of max(ρ_i log(1/r_ij), log(1/p_j) + Σ_{k≠i} ρ_k log(1/r_kj)) over the tokens j, as the
    module docstring derives; inf in rows in which a token cannot have mass, for members with a soft-cap, whose rows are
    not orthonormal, and for all if a trust is infinite.

    Args:
        problem: the batch of relaxed I-projections.
        log_p, log_r: log-probabilities of the answer and of the corrected members at the dual point, in nats.

    Returns:
        The prices, (B, n), fp64, in nats.
    """
    if math.inf in problem.trust:
        return torch.full_like(log_r[..., 0], torch.inf, dtype=torch.float64)
    up = -problem.price[:, None] * log_r
    total = up.sum(1) - log_p
    prices = torch.stack([torch.maximum(own, total - own).double().norm(dim=-1) for own in up.unbind(1)], dim=1)
    capped = torch.tensor([h.slope is not None for h in problem.heads], device=prices.device)
    return prices.nan_to_num(torch.inf, torch.inf).masked_fill(capped, torch.inf)


def residual_slack(
    problem: Projection,
    point: tuple[Float[Tensor, "B v"], Float[Tensor, "B n v"]],
    e: Float[Tensor, "B D"],
    s: Float[Tensor, "B D"],
    gradient: Float[Tensor, "B D"],
) -> Float[Tensor, " B"]:
    """Bound by how much a bound on the gap may be too low because H s = g holds only up to e = H s - g; (B,), nats.

    With finite trusts it is proved: Σ_i |e_i|/α_i times :func:`moment_prices`. With an infinite trust, whose member
    cannot take up anything, it is an estimate, 4 |e| |s|, and inf if |e| > 1e-7 |∇f|, which is no rounding.

    Args:
        problem: the batch of relaxed I-projections.
        point: (log p, log r_i) at the dual point, in nats.
        e, s: the residual and the approximate solution of the Newton system.
        gradient: the gradient ∇f of the dual function at that point.
    """
    if math.inf in problem.trust:
        size = e.norm(dim=-1)
        return torch.where(size <= _ESTIMATED * gradient.norm(dim=-1), 4 * size * s.norm(dim=-1), math.inf)
    sizes = torch.stack([part.norm(dim=-1) for part in e.split(problem.widths, dim=-1)], dim=1) / problem.alpha
    return torch.where(sizes > 0, sizes * moment_prices(problem, *point), 0.0).sum(-1)


def token_prices(
    problem: Projection, i: int, point: tuple[Float[Tensor, "b v"], Float[Tensor, "b n v"]], tokens: Int[Tensor, "b k"]
) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Return what a unit of mass costs on some tokens, in nats: (in r_i; in p and all other r_k), (b, k) each, fp64."""
    log_p, log_r = point
    up = -problem.price[:, None] * log_r.gather(-1, tokens[:, None].expand(-1, log_r.shape[1], -1))
    return up[:, i].double(), (up.sum(1) - up[:, i] - log_p.gather(-1, tokens)).double()


def carried(
    X: Float[Tensor, "b k d"],
    wanted: tuple[Float[Tensor, "b d"], Float[Tensor, " b"]],
    up: Float[Tensor, "b k"],
    down: Float[Tensor, "b k"],
) -> Float[Tensor, " b"]:
    """Bound the cost of making up a difference of moments by signed masses u on k tokens; (b,), nats, inf if none do.

    u is the shortest vector with Σ u x = e and Σ u = a, up to the rounding of ``e``.

    Args:
        X: the tokens' rows x of a head.
        wanted: (e, the difference of the moments; a, that of the sums).
        up, down: what a unit of positive and of negative mass costs, as :func:`token_prices` returns it; tokens for
            which one of them is inf stay as they are.
    """
    alive = (up + down).isfinite()[..., None]
    X, (e, total) = torch.where(alive, X.double(), 0.0), wanted
    e, total, count = e.double(), total.double()[:, None], alive.sum(1).clamp_min(1)
    mean = X.sum(1) / count
    centred = torch.where(alive, X - mean[:, None], 0.0)
    factor, failed = torch.linalg.cholesky_ex(add_ridge(centred.transpose(1, 2) @ centred, torch.finfo(X.dtype).eps))
    u, left = torch.where(alive[..., 0], total / count, 0.0), e - total * mean
    size = left.norm(dim=-1)
    for _ in range(_REFINED):
        u = u + (centred @ torch.cholesky_solve(left[..., None], factor))[..., 0]
        left = e - (u[:, None] @ X)[:, 0]
    cost = torch.where(u > 0, u * up, 0.0).sum(-1) - torch.where(u < 0, u * down, 0.0).sum(-1)
    proved = (failed == 0) & (left.norm(dim=-1) <= ROUNDING * size) & cost.isfinite()
    return torch.where(proved, cost, torch.inf)
