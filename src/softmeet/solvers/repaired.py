"""A bound on the gap from a direction that is nearly Newton's: what it leaves of the moments, heavy tokens take up.

The direction s of (7) in docs/mathematics.md solves H s = g but for e = g - H s, which one read of the heads tells. Of
each member e_i is then taken up by its own r_i, on its M heaviest tokens J: r̃_i = r_i(1 + y_i + w_i), with
w_i = (q - m_J)ᵀt_i on J and α_i Cov_J(Q_i) t_i = e_i. No other member sees it, so that the systems are d_i x d_i.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.solvers.certificate import cost, restricted_gap_bound
from softmeet.solvers.dual import DualState
from softmeet.solvers.hessian import curved
from softmeet.solvers.projection import Projection

# Tokens that take up what is left, in columns of the head, and at least.
_TIMES, _LEAST = 3, 512
# Elements of gathered rows at once.
_ELEMENTS = 1 << 24
# What rounding leaves of e, as a share of it, past which a bound is none.
_SOLVED = 1e-4


def repaired_gap_bound(problem: Projection, state: DualState) -> Float[Tensor, " B"]:
    """The bound of every row at a point with a gradient and a direction; inf where none is found.

    Args:
        problem: the projection.
        state: whose direction is about -H⁻¹ times its gradient.
    """
    if any(map(math.isinf, problem.trust)):
        rows = zip(state.log_p.exp(), state.log_r.exp(), state.gradient, strict=True)
        return state.gap.new_tensor([restricted_gap_bound(problem, k, p, r, g) for k, (p, r, g) in enumerate(rows)])
    p, r = state.log_p.exp(), state.log_r.exp()
    change = problem.scores(state.direction)
    left = state.gradient + curved(problem, p, r, change)
    x = problem.tilt(change)
    y = -problem.gamma[:, None] * change
    x, y = x - (p * x).sum(-1, keepdim=True), y - (r * y).sum(-1, keepdim=True)
    slack = torch.zeros_like(state.gap)
    for i, here in enumerate(problem.places):
        tokens = r[:, i].topk(min(r.shape[-1], max(_LEAST, _TIMES * problem.widths[i])), dim=-1).indices
        size = max(1, _ELEMENTS // (tokens.shape[1] * max(1, problem.widths[i])))
        for rows in torch.arange(len(p), device=p.device).split(size):
            X = problem.heads[i].take(rows).gather(tokens[rows])
            mass = r[rows, i].gather(-1, tokens[rows])
            w, e = _taken_up(X, mass, left[rows, here] / problem.alpha[i])
            y[rows, i] = y[rows, i].scatter_add(-1, tokens[rows], w)
            # What is not taken up moves the bound by at most its product with the way to the optimum.
            e, way = problem.alpha[i] * e.norm(dim=-1), state.direction[rows].norm(dim=-1)
            small = e <= _SOLVED * state.gradient[rows].norm(dim=-1)
            slack[rows] += torch.where(small, 4 * e * way, torch.inf)
    bound, broken = cost(problem, p, r, x, y)
    return torch.where(broken, torch.inf, bound + slack)


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
        left = e - torch.bmm((mass * w)[:, None], exact)[:, 0]
    broken = (failed != 0) | ~t.isfinite().all(-1)
    return torch.where(broken[:, None], 0.0, w), torch.where(broken[:, None], torch.inf, left)
