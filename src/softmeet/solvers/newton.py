"""Newton's method on the dual of a relaxed I-projection, with the full Hessian.

    H = Cov_p([α_1 Q_1 | … | α_n Q_n]) + blockdiag(α_i γ_i Cov_{r_i}(Q_i)),   H s = g,   ν ← ν - t s

A step reads every head twice: for the Hessian at a point, which costs v D² per row, and for the scores of the direction
and the gradient where it leads. The scores also certify the point that was left (:mod:`softmeet.solvers.certificate`),
and a step lowers f by a known amount, so the bound at the new point needs no further read, and a row that it ends no
further Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.solvers.base import Status
from softmeet.solvers.certificate import gap_bound, residual_slack, restricted_gap_bound
from softmeet.solvers.dual import DualMethod, DualState, bound_after, start
from softmeet.solvers.hessian import moments
from softmeet.solvers.projection import Projection

# Elements of all Hessians at once: 32 MiB in fp64.
_ELEMENTS = 1 << 22
# Elements of all members' distributions at once, 4 MiB: rows that share the cost of starting each operation without
# leaving the processor's cache; and rows that products pay for anyway.
_CACHED_ELEMENTS, _FEWEST = 1 << 19, 8
# The share of a gradient that a direction may leave over before it is refined.
_SOLVED = 1e-7
# A row whose estimated gap is so many tolerances gets no bound: it would not end there.
_FAR = 10.0
# The longest direction, in whitened coordinates: scores of single precision do not overflow yet.
_LONGEST = 1e30


@dataclass
class NewtonState(DualState):
    """``slack``: what H s ≠ g may hide, in nats."""

    slack: Float[Tensor, " B"]


class DualNewton(DualMethod[NewtonState]):
    """Newton's method with the full Hessian, for heads that are small or answers that are wanted exactly."""

    def init(self, problem: Projection) -> NewtonState:
        """Begin at the pool, where no head has been read."""
        fields = start(problem)
        return NewtonState(**fields, slack=torch.zeros_like(fields["value"]))

    def rows_at_once(self, problem: Projection) -> int:
        """As many as have room for their Hessians, and on a processor for their distributions in its cache."""
        rows = _ELEMENTS // max(1, len(problem.scale)) ** 2
        if problem.log_p.device.type == "cpu":
            rows = min(rows, max(_FEWEST, _CACHED_ELEMENTS // problem.log_p.shape[1:].numel()))
        return max(1, rows)

    def aim(self, problem: Projection, state: NewtonState) -> None:
        """The Newton direction, by one read of the heads; the first is the start's, where the problem has one."""
        first = not state.steps.any()
        if first and problem.start is not None:
            return
        found = moments(problem, state.log_p, state.log_r)
        state.gradient = problem.scale * (found.joint - found.own)
        s = _solve(found.H, state.gradient, problem.eps)
        state.direction, state.slack = -s, residual_slack(found.H, s, state.gradient, state.gradient)

    def judge(self, problem: Projection, before: NewtonState, after: NewtonState, full: Float[Tensor, "B n v"]) -> None:
        """Certify the point before, and with the fall of f the one after."""
        decrement = -(before.gradient * before.direction).sum(-1)
        fall = before.value - after.value
        # A start from elsewhere is no Newton step: it says nothing about the gap.
        given = (before.steps == 0) & (problem.start is not None)
        estimate = (0.5 * decrement - fall).clamp_min(0).masked_fill(given, torch.inf)
        bound, rounding = torch.full_like(fall, torch.inf), torch.zeros_like(fall)
        near = (estimate <= _FAR * problem.tol).nonzero().squeeze(-1)
        if len(near):
            bound[near], rounding[near] = self.certify(problem, before, after, full, near)
        certified = torch.minimum(bound, torch.where(before.certified, before.gap, torch.inf))
        certified = bound_after(certified, fall, problem.tol)
        after.certified = certified.isfinite()
        after.gap = torch.where(after.certified, certified, estimate) + rounding
        reached = after.certified & (after.gap <= problem.tol)
        stalled = (fall <= 0) & ~reached & ~given
        after.done = reached | stalled
        after.status = after.status.masked_fill(stalled, Status.NOT_CONVERGED)
        after.gap = after.gap.masked_fill(stalled & ~after.certified, torch.inf)

    def certify(
        self,
        problem: Projection,
        before: NewtonState,
        after: NewtonState,
        full: Float[Tensor, "B n v"],
        rows: Int[Tensor, " k"],
    ) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Of some rows (a bound on the gap before, inf where none was found; what rounding may add to it after)."""
        p, r, gradient = before.log_p[rows].exp(), before.log_r[rows].exp(), before.gradient[rows]
        bound, broken = gap_bound(problem, p, r, full[rows])
        bound = torch.where(broken, torch.inf, bound + before.slack[rows])
        decrement = -(gradient * before.direction[rows]).sum(-1)
        for k in (bound.isinf() & (0.25 * decrement <= problem.tol)).nonzero().flatten().tolist():
            bound[k] = restricted_gap_bound(problem, int(rows[k]), p[k], r[k], gradient[k])
        return bound, problem.rounding(p, r, after.z[rows], after.nu[rows])


def _solve(H: Float[Tensor, "B D D"], g: Float[Tensor, "B D"], eps: float) -> Float[Tensor, "B D"]:
    """H⁻¹ g by Cholesky with a ridge at the rounding of H, refined twice; a failing row gets a larger ridge."""
    scale = H.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(H.dtype).tiny)
    ridged, ridge = H.clone(), eps * scale
    for _ in range(12):
        ridged.diagonal(dim1=-2, dim2=-1).copy_(H.diagonal(dim1=-2, dim2=-1) + ridge[:, None])
        L, info = torch.linalg.cholesky_ex(ridged)
        if not info.any():
            break
        ridge = torch.where(info > 0, 10 * ridge, ridge)
    s, residual, going = torch.zeros_like(g), g, torch.ones_like(g[..., :1], dtype=torch.bool)
    for _ in range(3):
        # A row that is solved stays as it is, whatever others need.
        s = torch.where(going, s + torch.cholesky_solve(residual[..., None], L).squeeze(-1), s)
        residual = g - (H @ s[..., None]).squeeze(-1)
        going = residual.norm(dim=-1, keepdim=True) > _SOLVED * g.norm(dim=-1, keepdim=True)
        if not going.any():
            break
    # Where H all but vanishes, as for one-hot distributions, the gradient is still a direction, and may be a Farkas
    # proof; a step that is not a number, or whose scores would overflow, is none.
    return torch.where(s.norm(dim=-1, keepdim=True) <= _LONGEST, s, g)
