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
from jaxtyping import Float
from torch import Tensor

from softmeet.solvers.base import Status
from softmeet.solvers.certificate import gap_bound, residual_slack, restricted_gap_bound
from softmeet.solvers.dual import DualMethod, DualState, add_reads, start
from softmeet.solvers.hessian import moments
from softmeet.solvers.projection import Projection
from softmeet.solvers.sweep import Swept, sweep

# Elements of all Hessians at once: 16 MiB in fp64, about a cache; more is slower.
_ELEMENTS = 1 << 20
# Tokens from which the first means are guessed.
_GUESS = 64


@dataclass
class NewtonState(DualState):
    """``slack``: what H s ≠ g may hide, in nats."""

    slack: Float[Tensor, " B"]


class DualNewton(DualMethod[NewtonState]):
    """See the module's docstring."""

    def init(self, problem: Projection) -> NewtonState:
        """The pool."""
        fields = start(problem)
        return NewtonState(**fields, slack=torch.zeros_like(fields["value"]))

    def rows_at_once(self, problem: Projection) -> int:
        """As many as have room for their Hessians."""
        return max(1, _ELEMENTS // max(1, sum(h.rank for h in problem.heads)) ** 2)

    def begin(self, problem: Projection, state: NewtonState) -> None:
        """The first direction, by one read at the pool."""
        found = moments(problem, problem.log_q, problem.log_p, *_guess(problem))
        gradient = problem.scaled(found.joint - found.own)
        self.aim(problem, state, gradient, found.H)

    def measure(self, problem: Projection, state: NewtonState, direction: Float[Tensor, "B D"] | None) -> Swept:
        """Without the Hessian."""
        return sweep(problem, state.z, direction)

    def judge(
        self,
        problem: Projection,
        before: NewtonState,
        after: NewtonState,
        swept: Swept,
        full: Float[Tensor, "B n v"],
    ) -> None:
        """Certify the point before, and with the fall of f the one after."""
        p, r = before.log_p.exp(), before.log_r.exp()
        decrement = -(before.gradient * before.direction).sum(-1)
        bound, broken = gap_bound(problem, p, r, full)
        bound = torch.where(broken, torch.inf, bound + before.slack)
        for k in (bound.isinf() & (0.25 * decrement <= problem.tol)).nonzero().flatten().tolist():
            bound[k] = restricted_gap_bound(problem, k, p[k], r[k], before.gradient[k])
        fall = before.value - after.value
        rounding = problem.rounding(p, r, after.z, after.nu)
        certified = torch.minimum(bound, torch.where(before.certified, before.gap, torch.inf))
        after.certified = certified.isfinite()
        estimate = (0.5 * decrement - fall).clamp_min(0)
        after.gap = torch.where(after.certified, (certified - fall).clamp_min(0), estimate) + rounding
        reached = after.certified & (after.gap <= problem.tol)
        stalled = (fall <= 0) & ~reached
        after.done = reached | stalled
        after.status[stalled] = Status.NOT_CONVERGED
        after.gap[stalled & ~after.certified] = torch.inf
        going = (~after.done).nonzero().squeeze(-1)
        if len(going):
            some, here = problem.take(going), after.take(going)
            self.go_on(some, here, swept.take(going))
            after.put(going, here)
            add_reads(problem, some, going)

    def go_on(self, problem: Projection, state: NewtonState, swept: Swept) -> None:
        """The next direction, at a point that has been measured; one read of the heads."""
        found = moments(problem, swept.log_p, swept.log_r, swept.joint, swept.own)
        self.aim(problem, state, swept.gradient, found.H)

    def aim(
        self, problem: Projection, state: NewtonState, gradient: Float[Tensor, "B D"], H: Float[Tensor, "B D D"]
    ) -> None:
        """The Newton direction."""
        s = _solve(H, gradient, problem.eps)
        state.gradient, state.direction, state.slack = gradient, -s, residual_slack(H, s, gradient, gradient)


def _guess(problem: Projection) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
    """The means over the heaviest tokens of the pool, and of each member."""
    joint: list[Tensor] = []
    own: list[Tensor] = []
    for i, h in enumerate(problem.heads):
        for log_m, means in ((problem.log_q, joint), (problem.log_p[:, i], own)):
            best = log_m.topk(min(_GUESS, log_m.shape[-1]))
            rows = h.gather(best.indices).to(log_m.dtype)
            means.append((best.values.softmax(-1)[..., None] * rows).sum(1))
    return torch.cat(joint, dim=-1), torch.cat(own, dim=-1)


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
