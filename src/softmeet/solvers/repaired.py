"""A bound on the gap from a direction that nearly solves the Newton system: by a feasible point near (p, r).

Along the direction s with scores y_i = Q_i s_i every token changes a little, p̃ ∝ p(1 + x)₊ with x = Σ α_i y_i and
r̃_i ∝ r_i(1 - γ_i y_i)₊, as in :mod:`softmeet.solvers.certificate`. What is left of the moments' difference,
e_i = Q_iᵀ(p̃ - r̃_i), each r̃_i takes up on its M heaviest tokens J: r_i w_i is added there, w_i = (q - m_J)ᵀt_i with
Cov_J(Q_i) t_i = e_i. That point is feasible, so by (6) in docs/mathematics.md

    gap ≤ Σ_j p_j φ(x̃_j) + Σ_i ρ_i Σ_j r_ij φ(ỹ_ij),   p̃ = p(1 + x̃),   r̃_i + r_i w_i = r_i(1 + ỹ_i).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.solvers.certificate import phi
from softmeet.solvers.projection import Projection

# Tokens that take up what is left, in columns of the head, and at least.
_TIMES, _LEAST = 3, 512
# Elements of gathered rows at once.
_ELEMENTS = 1 << 24
# Steps of a repair.
_ROUNDS = 6
# What rounding leaves of a gradient, as a share of it, past which a bound is none.
_SOLVED = 1e-4


def repaired_gap_bound(
    problem: Projection,
    p: Float[Tensor, "B v"],
    r: Float[Tensor, "B n v"],
    y: Float[Tensor, "B n v"],
    sizes: tuple[Float[Tensor, " B"], Float[Tensor, " B"]],
) -> Float[Tensor, " B"]:
    """The bound of every row in nats, for finite trusts; inf where none is found. One read of every head.

    Args:
        problem: the projection.
        p, r: the distributions at the dual point.
        y: scores of a direction in which f falls.
        sizes: lengths of the gradient and of the direction.
    """
    x, own = _changed(p, problem.tilt(y)), _changed(r, -problem.gamma[:, None] * y)
    gradient, length = sizes
    bound = (p * phi(x)).sum(-1)
    for i, h in enumerate(problem.heads):
        e = h.moments(p * (1 + x) - r[:, i] * (1 + own[:, i]))[0]
        tokens = r[:, i].topk(min(r.shape[-1], max(_LEAST, _TIMES * h.rank)), dim=-1).indices
        size = max(1, _ELEMENTS // (tokens.shape[1] * max(1, h.rank)))
        left, whole = torch.zeros_like(bound), own[:, i]
        for rows in torch.arange(len(r), device=r.device).split(size):
            some = tokens[rows]
            mass, lowest = r[rows, i].gather(-1, some), -1 - whole[rows].gather(-1, some)
            w, rest = _taken_up(h.take(rows).gather(some), mass, e[rows], lowest)
            whole[rows] = whole[rows].scatter_add(-1, some, w.to(whole))
            left[rows] = problem.alpha[i] * rest.to(left)
        cost = problem.price[i] * (r[:, i] * phi(whole.clamp_min(-1))).sum(-1)
        # What is not taken up moves the bound by at most its product with the way to the optimum.
        bound = bound + torch.where(left <= _SOLVED * gradient, cost + 4 * left * length, torch.inf)
    return bound


def _changed(p: Float[Tensor, "*b v"], x: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """x̃ with p(1 + x̃) ∝ p(1 + x - E_p x)₊."""
    up = (1 + x - (p * x).sum(-1, keepdim=True)).clamp_min(0)
    return up / (p * up).sum(-1, keepdim=True) - 1


def _taken_up(
    X: Float[Tensor, "b M d"], mass: Float[Tensor, "b M"], e: Float[Tensor, "b d"], lowest: Float[Tensor, "b M"]
) -> tuple[Float[Tensor, "b M"], Float[Tensor, " b"]]:
    """(w ≥ lowest with Σ mass w x = e and Σ mass w = 0, about; how much is left over, inf where it is no number).

    By steps of the system that holds where no token is at its lowest: where few are, they come to an end all the same.
    """
    mass, lowest = mass.double(), lowest.double()
    total = mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    mean = torch.bmm((mass / total).to(X.dtype)[:, None], X)
    X = X - mean
    weighted = X * mass.sqrt().to(X.dtype)[..., None]
    gram = torch.bmm(weighted.transpose(1, 2), weighted).double()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += torch.finfo(X.dtype).eps * diagonal.mean(-1, keepdim=True)
    factor, failed = torch.linalg.cholesky_ex(gram)
    w, left, lost = torch.zeros_like(mass), e.double(), torch.zeros_like(total)
    for _ in range(_ROUNDS):
        t = torch.cholesky_solve(left[..., None], factor)[..., 0]
        change = torch.bmm(X, t[..., None].to(X.dtype))[..., 0].double() + lost / total
        w = torch.maximum(w + change, lowest)
        lost = -(mass * w).sum(-1, keepdim=True)
        left = e - torch.bmm((mass * w)[:, None].to(X.dtype), X)[:, 0].double()
    # Mass that was lost or won would move the moments by as much of the mean.
    rest = left.norm(dim=-1) + (lost.abs() * mean[:, 0].norm(dim=-1, keepdim=True))[:, 0]
    broken = (failed != 0) | ~rest.isfinite()
    return torch.where(broken[:, None], 0.0, w), torch.where(broken, torch.inf, rest)
