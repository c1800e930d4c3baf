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

from softmeet.solvers.base import some
from softmeet.solvers.certificate import phi
from softmeet.solvers.projection import Projection

# Tokens that take up what is left, in columns of the head, and at least.
_TIMES, _LEAST = 2, 512
# Elements of gathered rows at once.
_ELEMENTS = 1 << 24
# Systems of a repair, for tokens that reach 0, and refinements of one.
_ROUNDS, _REFINED = 4, 2
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
            ids = tokens[rows]
            mass, lowest = r[rows, i].gather(-1, ids), -1 - whole[rows].gather(-1, ids)
            w, rest = _taken_up(h.take(rows).gather(ids), mass, e[rows], lowest)
            whole[rows] = whole[rows].scatter_add(-1, ids, w.to(whole))
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

    Tokens that reach their lowest stay there, and the others take up what is left, a few times.
    """
    mass, lowest = mass.double(), lowest.double()
    w, left, lost = torch.zeros_like(mass), e.double(), torch.zeros_like(mass[:, :1])
    free, wrong = torch.ones_like(mass, dtype=torch.bool), torch.zeros_like(mass[:, 0], dtype=torch.bool)
    for _ in range(_ROUNDS):
        some_mass = mass.masked_fill(~free, 0.0)
        total = some_mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        mean = torch.bmm((some_mass / total).to(X.dtype)[:, None], X)
        centred = X - mean
        weighted = centred * some_mass.sqrt().to(X.dtype)[..., None]
        gram = torch.bmm(weighted.transpose(1, 2), weighted).double()
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal += torch.finfo(X.dtype).eps * diagonal.mean(-1, keepdim=True)
        factor, failed = torch.linalg.cholesky_ex(gram)
        for _ in range(_REFINED):
            t = torch.cholesky_solve((left - lost * mean[:, 0])[..., None], factor)[..., 0]
            change = torch.bmm(centred, t[..., None].to(X.dtype))[..., 0].double() + lost / total
            w = torch.maximum(w + change.masked_fill(~free, 0.0), lowest)
            lost = -(mass * w).sum(-1, keepdim=True)
            left = e - torch.bmm((mass * w)[:, None].to(X.dtype), X)[:, 0].double()
        wrong, free = wrong | (failed != 0), free & (w > lowest)
        if not some((left.norm(dim=-1) > _SOLVED * e.norm(dim=-1)) & ~wrong):
            break
    # Mass that was lost or won would move the moments by as much of the mean.
    rest = left.norm(dim=-1) + (lost.abs() * mean[:, 0].norm(dim=-1, keepdim=True))[:, 0]
    wrong |= ~rest.isfinite()
    return torch.where(wrong[:, None], 0.0, w), torch.where(wrong, torch.inf, rest)
