"""A bound on the gap at a point with a small gradient, whose moments heavy tokens take up: no head is read for it.

At (p, r) the moments differ by g_i = α_i Q_iᵀ(p - r_i). Each r_i takes up its own on its M heaviest tokens J,
r̃_i = r_i(1 + w_i) with w_i = (q - m_J)ᵀt_i and α_i Cov_J(Q_i) t_i = g_i: a feasible point, so that by (6) in
docs/mathematics.md the gap is at most Σ ρ_i Σ_J r_ij φ(w_ij). No other member sees it: the systems are d_i x d_i.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.solvers.certificate import phi
from softmeet.solvers.dual import DualState
from softmeet.solvers.projection import Projection

# Tokens that take up what is left, in columns of the head, and at least.
_TIMES, _LEAST = 3, 512
# Elements of gathered rows at once.
_ELEMENTS = 1 << 24
# What rounding leaves of a gradient, as a share of it, past which a bound is none.
_SOLVED = 1e-4


def repaired_gap_bound(problem: Projection, state: DualState) -> Float[Tensor, " B"]:
    """The bound of every row, for finite trusts; inf where none is found.

    Args:
        problem: the projection.
        state: where the gradient is known, and a direction, which tells how far the optimum is.
    """
    bound = torch.zeros_like(state.gap)
    for i, here in enumerate(problem.places):
        r, alpha = state.log_r[:, i], problem.alpha[i]
        tokens = r.topk(min(r.shape[-1], max(_LEAST, _TIMES * problem.widths[i])), dim=-1).indices
        size = max(1, _ELEMENTS // (tokens.shape[1] * max(1, problem.widths[i])))
        for rows in torch.arange(len(r), device=r.device).split(size):
            X, mass = problem.heads[i].take(rows).gather(tokens[rows]), r[rows].gather(-1, tokens[rows]).exp()
            w, left = _taken_up(X, mass, state.gradient[rows, here] / alpha)
            cost = problem.price[i] * (mass * phi(w.clamp_min(-1))).sum(-1)
            # What is not taken up moves the bound by at most its product with the way to the optimum.
            left = alpha * left.norm(dim=-1)
            small = left <= _SOLVED * state.gradient[rows].norm(dim=-1)
            cost = cost + 4 * left * state.direction[rows].norm(dim=-1)
            bound[rows] += torch.where(small & (w >= -1).all(-1), cost, torch.inf)
    return bound


def _taken_up(
    X: Float[Tensor, "b M d"], mass: Float[Tensor, "b M"], e: Float[Tensor, "b d"]
) -> tuple[Float[Tensor, "b M"], Float[Tensor, "b d"]]:
    """(w, what is left of e) with Σ mass w (x - m) = e and Σ mass w = 0, about."""
    share = (mass / mass.sum(-1, keepdim=True)).to(X.dtype)
    X = X - torch.bmm(share[:, None], X)
    weighted = X * mass.sqrt().to(X.dtype)[..., None]
    gram = torch.bmm(weighted.transpose(1, 2), weighted).double()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += torch.finfo(X.dtype).eps * diagonal.mean(-1, keepdim=True)
    factor, failed = torch.linalg.cholesky_ex(gram)
    exact, t, left = X.double(), torch.zeros_like(e), e
    for _ in range(3):
        t = t + torch.cholesky_solve(left[..., None], factor)[..., 0]
        w = torch.bmm(exact, t[..., None])[..., 0]
        w = w - (mass * w).sum(-1, keepdim=True) / mass.sum(-1, keepdim=True)
        left = e - torch.bmm((mass * w)[:, None], exact)[:, 0]
    broken = ((failed != 0) | ~t.isfinite().all(-1))[:, None]
    return torch.where(broken, 0.0, w), torch.where(broken, torch.inf, left)
