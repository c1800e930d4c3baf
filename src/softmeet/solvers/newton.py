"""Newton's method on the dual of a relaxed I-projection, with the full Hessian.

    H = Cov_p([α_1 Q_1 | … | α_n Q_n]) + blockdiag(α_i γ_i Cov_{r_i}(Q_i)),   H s = g,   ν ← ν - t s

A step reads every head three times (moments, covariances, scores of the direction) and costs v D² per row. The scores
of the direction also give the certificate (:mod:`softmeet.solvers.certificate`), and a step of size t lowers f by a
known amount, so the bound at the new point needs no further read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.heads import whitened_blocks
from softmeet.solvers.base import Solver, State, Status, empty_state_fields
from softmeet.solvers.certificate import gap_bound, residual_slack, restricted_gap_bound
from softmeet.solvers.projection import Projection

_ARMIJO = 1e-4
_HALVINGS = 40


@dataclass
class NewtonState(State):
    """``nu``: the dual variables in whitened coordinates; ``z``: their scores Q_i ν_i; ``ray``: a Farkas proof or 0."""

    nu: Float[Tensor, "B D"]
    z: Float[Tensor, "B n v"]
    value: Float[Tensor, " B"]
    ray: Float[Tensor, "B D"]


class DualNewton(Solver[Projection, NewtonState]):
    """See the module's docstring."""

    def init(self, problem: Projection) -> NewtonState:
        """The pool; a row whose pool is within ``tol`` of optimal is done without a read (zero-pass stop)."""
        batch = len(problem.log_q)
        fields = empty_state_fields(batch, problem.log_q.device)
        gap = problem.pool_gap()
        fields |= {"gap": gap, "done": gap <= problem.tol, "certified": gap.isfinite()}
        z = torch.zeros_like(problem.log_p)
        nu = z.new_zeros(batch, sum(h.rank for h in problem.heads))
        return NewtonState(**fields, nu=nu, z=z, value=problem.dual(z), ray=nu.clone())

    def take(self, problem: Projection, rows: Int[Tensor, " k"]) -> Projection:
        """Some rows."""
        return problem.take(rows)

    def step(self, problem: Projection, state: NewtonState) -> NewtonState:
        """One damped Newton step of every row, and its certificate."""
        before = problem.passes()
        p, r = problem.pooled(state.z).exp(), problem.corrected(state.z).exp()
        gradient, H = _derivatives(problem, p, r)
        s = _solve(H, gradient, problem.eps)
        parts = s.split([h.rank for h in problem.heads], dim=-1)
        change = torch.stack([h.scores(-part) for h, part in zip(problem.heads, parts, strict=True)], dim=1)
        bound, broken = gap_bound(problem, p, r, change)
        decrement = (gradient * s).sum(-1)
        bound = torch.where(broken, torch.inf, bound + residual_slack(H, s, gradient, gradient))
        for k in ((bound.isinf()) & (0.25 * decrement <= problem.tol)).nonzero().flatten().tolist():
            bound[k] = restricted_gap_bound(problem, k, p[k], r[k], gradient[k])
        t, value = _line_search(problem, state, change, decrement)
        state.nu = state.nu - t[:, None] * s
        state.z = state.z + t[:, None, None] * change
        self._judge(problem, state, bound, value, decrement, problem.rounding(p, r, state.z, state.nu))
        self._look_for_a_proof(problem, state, s, change)
        state.passes = state.passes + problem.passes() - before
        return state

    def _judge(
        self,
        problem: Projection,
        state: NewtonState,
        bound: Float[Tensor, " B"],
        value: Float[Tensor, " B"],
        decrement: Float[Tensor, " B"],
        rounding: Float[Tensor, " B"],
    ) -> None:
        fall = state.value - value
        known = torch.where(state.certified, state.gap, torch.inf)
        certified = torch.minimum(bound, known)
        state.certified = certified.isfinite()
        estimate = (0.5 * decrement - fall).clamp_min(0)
        state.gap = torch.where(state.certified, (certified - fall).clamp_min(0) + rounding, estimate + rounding)
        state.value, state.steps = value, state.steps + 1
        reached = state.certified & (state.gap <= problem.tol)
        stalled = (fall <= 0) & ~reached
        state.done = reached | stalled
        state.status[stalled] = Status.NOT_CONVERGED
        state.gap[stalled & ~state.certified] = torch.inf

    def _look_for_a_proof(
        self, problem: Projection, state: NewtonState, s: Float[Tensor, "B D"], change: Float[Tensor, "B n v"]
    ) -> None:
        by_point, by_direction = problem.excludes(state.z), problem.excludes(change)
        state.ray = torch.where(by_point[:, None], state.nu, torch.where(by_direction[:, None], -s, state.ray))
        infeasible = by_point | by_direction
        state.done |= infeasible
        state.status[infeasible] = Status.INFEASIBLE
        state.gap[infeasible] = torch.inf
        state.certified[infeasible] = False


def _derivatives(
    problem: Projection, p: Float[Tensor, "B v"], r: Float[Tensor, "B n v"]
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D D"]]:
    """(gradient, Hessian) of f at p, r; two reads of every head."""
    means = [h.moments(p, r[:, i]) for i, h in enumerate(problem.heads)]
    gradient = torch.cat([a * (mp - mr) for a, (mp, mr) in zip(problem.alpha, means, strict=True)], dim=-1)
    joint = torch.cat([a * mp for a, (mp, _) in zip(problem.alpha, means, strict=True)], dim=-1)
    sizes = [h.rank for h in problem.heads]
    places = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    H = gradient.new_zeros(len(p), sum(sizes), sum(sizes))
    for tokens, blocks in whitened_blocks(problem.heads):
        for k in range(len(p)):
            rows = [h.sloped(b, k, tokens) for h, b in zip(problem.heads, blocks, strict=True)]
            x = torch.cat([a * b for a, b in zip(problem.alpha, rows, strict=True)], dim=-1)
            H[k] += _scatter(x, joint[k], p[k, tokens])
            for i, place in enumerate(places):
                if problem.gamma[i]:
                    own = _scatter(rows[i], means[i][1][k], r[k, i, tokens])
                    H[k, place, place] += problem.alpha[i] * problem.gamma[i] * own
    return gradient, H


def _scatter(x: Float[Tensor, "b d"], mean: Float[Tensor, " d"], mass: Float[Tensor, " b"]) -> Float[Tensor, "d d"]:
    """Σ mass_j (x_j - mean)(x_j - mean)ᵀ in the dtype of x."""
    x = x - mean.to(x.dtype)
    return (x * mass.to(x.dtype)[:, None]).T @ x


def _solve(H: Float[Tensor, "B D D"], g: Float[Tensor, "B D"], eps: float) -> Float[Tensor, "B D"]:
    """H⁻¹ g by Cholesky with a ridge at the rounding of H, refined twice; a failing row gets a larger ridge."""
    scale = H.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(H.dtype).tiny)
    identity = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    ridge = eps * scale
    for _ in range(12):
        L, info = torch.linalg.cholesky_ex(H + ridge[:, None, None] * identity)
        if not info.any():
            break
        ridge = torch.where(info > 0, 10 * ridge, ridge)
    s = torch.zeros_like(g)
    for _ in range(3):
        residual = g - (H @ s[..., None]).squeeze(-1)
        s = s + torch.cholesky_solve(residual[..., None], L).squeeze(-1)
    # Where H vanishes, as for one-hot distributions, the gradient is still a direction, and may be a Farkas proof.
    return torch.where(s.isfinite().all(-1, keepdim=True), s, g)


def _line_search(
    problem: Projection, state: NewtonState, change: Float[Tensor, "B n v"], decrement: Float[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """(t, f(ν - t s)) by halving until Armijo's condition holds; t = 0 where it never does. Reads no head."""
    t = torch.ones_like(decrement)
    value = problem.dual(state.z + change)
    for tried in range(_HALVINGS):
        failed: Bool[Tensor, " B"] = ~(value <= state.value - _ARMIJO * t * decrement)
        if not failed.any():
            return t, value
        shorter = t / 2 if tried else torch.minimum(t / 2, 4 * _safe_step(problem, change))
        t = torch.where(failed, shorter, t)
        value = torch.where(failed, problem.dual(state.z + t[:, None, None] * change), value)
    failed = ~(value <= state.value)
    return torch.where(failed, 0.0, t), torch.where(failed, state.value, value)


def _safe_step(problem: Projection, change: Float[Tensor, "B n v"]) -> Float[Tensor, " B"]:
    """log(1 + d) / d, d the range of the tilts: a step that lowers a generalised self-concordant f (Sun and
    Tran-Dinh, Math. Program. 178, 2019, eq. 23 with ν = 2); what is needed where every distribution is one-hot.
    """
    tilt = problem.tilt(change)
    span = tilt.amax(-1) - tilt.amin(-1)
    for i, gamma in enumerate(problem.gamma):
        span = torch.maximum(span, gamma * (change[:, i].amax(-1) - change[:, i].amin(-1)))
    return torch.log1p(span) / span.clamp_min(torch.finfo(span.dtype).tiny)
