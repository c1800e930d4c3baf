"""Gradients of a loss through the relaxed I-projection, by the implicit function theorem.

Symbols are those of :mod:`softmeet.solvers.projection`. At the optimum ∇f(ν*; θ) = 0 for θ = (log q, ρ), so
H dν = -∂_θ∇f dθ, H the Hessian of f. Let g be the loss's gradient at log p, ĝ = g - p Σg, b_i = α_i Q_iᵀĝ and H s = b:
one linear solve per row. With y_i = Q_i s_i and x = Σ α_i y_i

    ∂L/∂ log q = ĝ - p(x - E_p x),        ∂L/∂ρ_i = γ_i² Cov_{r_i}(y_i, z_i).

The scaling of ν by ρ cancels. The members and their heads are constants. H is formed if it is small; else
preconditioned conjugate gradients multiply by it through the heads, to a limited relative accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.solvers.direction import Around, heavy_tokens
from softmeet.solvers.dual import DualState
from softmeet.solvers.linalg import Linear, add_ridge, conjugate_gradients
from softmeet.solvers.oracle import curved, moments
from softmeet.solvers.projection import Projection

Solve = Callable[[Projection], DualState]
# The most elements of all Hessians of a batch together; above it Hessians are not formed.
_ELEMENTS = 1 << 26
# Gradients have a relative error of about 1e-2, which takes a tenth of the products of 1e-4.
_REDUCTION = 0.05
_STEPS = 60
# The preconditioner's inner steps, and its rows at once.
_INNER, _GROUP = 24, 4


def projected(problem: Projection, trust: Float[Tensor, " n"], solve: Solve) -> Float[Tensor, "B v"]:
    """Solve a batch of relaxed I-projections; return log p, in nats, differentiable in ``problem.log_q`` and ``trust``.

    Args:
        problem: the batch; its ``log_q`` (the pool, (B, v)) may require a gradient. Its own ``trust`` is ignored.
        trust: the trusts ρ_i, (n,), one per member, positive and finite, fp64; may require a gradient.
        solve: a function of one argument, a :class:`Projection`, that minimises its dual function and returns the final
            :class:`DualState`: ``lambda problem: minimise_dual(problem, 50)``, for example, with
            :func:`~softmeet.solvers.minimise.minimise_dual`. It is called once, before this function returns, with
            ``problem`` whose trusts are ``trust`` and whose ``log_q`` is detached; the backward pass does not call it.
            Its remaining gap limits the accuracy of the gradients, which themselves have a relative error of about
            1e-2 if heads are large.
    """
    given = replace(problem, trust=tuple(trust.tolist()))
    # Only some versions of torch have a type for it.
    apply: Callable[..., Tensor] = _Projected.apply
    return apply(problem.log_q, trust, given, solve)


class _Projected(torch.autograd.Function):
    """The autograd function of :func:`projected`; its derivatives are those in the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, log_q: Float[Tensor, "B v"], trust: Float[Tensor, " n"], problem: Projection, solve: Solve
    ) -> Float[Tensor, "B v"]:
        """Solve the batch; return log p, (B, v), in nats. ``trust`` equals ``problem.trust``."""
        problem = replace(problem, log_q=log_q.detach())
        state = solve(problem)
        ctx.problem, ctx.state = problem, state
        # save_for_backward is for tensors of the graph; the solver's state is none.
        return state.log_p.clone()

    @staticmethod
    def backward(ctx: Any, g: Float[Tensor, "B v"]) -> tuple[Tensor, Tensor, None, None]:
        """Return the loss's gradients in log q, (B, v), and in the trusts, (n,), from that in log p, ``g``."""
        problem, state = ctx.problem, ctx.state
        p, r = state.log_p.exp(), state.log_r.exp()
        inner = g - p * g.sum(-1, keepdim=True)
        b = problem.moments(inner[:, None].expand_as(r))
        y = problem.scores(adjoint(problem, state, b))
        x = problem.tilt(y)
        to_pool = inner - p * (x - (p * x).sum(-1, keepdim=True))
        to_pool = torch.where(problem.log_q.isneginf(), 0.0, to_pool)
        centred = y - (r * y).sum(-1, keepdim=True)
        covariance = (r * centred * state.z).sum(-1).sum(0)
        return to_pool, covariance * problem.gamma**2, None, None


def adjoint(problem: Projection, state: DualState, b: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Return s, (B, D), with H s = b for every row, H the Hessian of the dual function at the point of ``state``.

    If the Hessians of all B rows together have at most 2²⁶ entries (B D²) they are formed, and the systems are solved
    directly; else approximately, by :func:`iterative`.

    Args:
        problem: the batch of relaxed I-projections.
        state: the final state of a solver for ``problem``, as :func:`~softmeet.solvers.minimise.minimise_dual` returns.
        b: the right-hand sides, (B, D), D dual variables per row.
    """
    if b.shape[1] ** 2 * len(b) > _ELEMENTS:
        return iterative(problem, state, b)
    s: Tensor = torch.linalg.solve(add_ridge(moments(problem, state.log_p, state.log_r).H, problem.eps), b)
    return s


def iterative(
    problem: Projection, state: DualState, b: Float[Tensor, "B D"], reduction: float = _REDUCTION, limit: int = _STEPS
) -> Float[Tensor, "B D"]:
    """Return approximately H⁻¹ b by preconditioned conjugate gradients, which read all heads twice in each step.

    H is the Hessian of the dual function at the point of ``state``. The preconditioner has the curvature of heavy
    tokens: without it, rows in which few tokens have nearly all the mass would take hundreds of steps.

    Args:
        problem: the batch of relaxed I-projections.
        state: the final state of a solver for ``problem``, as :func:`~softmeet.solvers.minimise.minimise_dual` returns.
        b: the right-hand sides, (B, D).
        reduction: a row stops once √(eᵀM⁻¹e), e = b - H s its residual and M⁻¹ the preconditioner, is at most this
            share of its value at s = 0.
        limit: the most steps.
    """
    p, r = state.log_p.exp(), state.log_r.exp()

    def product(d: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        rows = d.any(-1).nonzero().squeeze(-1)
        part = problem.take(rows)
        return torch.zeros_like(d).index_copy(0, rows, curved(part, p[rows], r[rows], part.scores(d[rows])))

    return conjugate_gradients(product, b, _by_heavy_tokens(problem, p, r), reduction, limit, wait=True)


def _by_heavy_tokens(problem: Projection, p: Float[Tensor, "B v"], r: Float[Tensor, "B n v"]) -> Linear:
    """Return a preconditioner: an approximate H⁻¹ by :class:`Around`, with enough inner steps to be nearly linear.

    Rows are taken in small groups, to save memory.
    """
    groups = torch.arange(len(p), device=p.device).split(_GROUP)
    parts = [Around(problem.take(rows), p[rows], r[rows], heavy_tokens(problem, 1)) for rows in groups]
    return lambda g: torch.cat([part.solve(g[rows], _INNER) for rows, part in zip(groups, parts, strict=True)])
