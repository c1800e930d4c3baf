"""Newton's method on the dual f of a relaxed I-projection, with the full Hessian H and the gradient g = ∇f.

    H = Cov_p([α_1 Q_1 | … | α_n Q_n]) + blockdiag(α_i γ_i Cov_{r_i}(Q_i)),   H s = g,   ν ← ν - t s

Symbols are those of :mod:`softmeet.solvers.projection`. A step reads all heads twice: for H and g at the current point,
which costs v D² per row, and for the scores of the direction -s. The step length t is shortened if f does not fall
enough, and lengthened if f is nearly straight. The scores also give a bound on the gap at the point before the step
(:mod:`softmeet.solvers.certificate`). As the step lowers f by a known amount, the same bound less that amount holds at
the new point, so a row that it ends needs no further Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.solvers import tuning
from softmeet.solvers.base import Status
from softmeet.solvers.certificate import gap_bound, restricted_gap_bound
from softmeet.solvers.clock import time_is_over
from softmeet.solvers.dual import DualState, Solver, end_by_pool, end_by_proof, moved_to, pool_is_near, start
from softmeet.solvers.leftover import residual_slack
from softmeet.solvers.linalg import backtrack, cached, held, solve_ridged
from softmeet.solvers.oracle import moments
from softmeet.solvers.projection import Point, Projection

# The fewest rows at once, even if their vectors do not fit the cache: they share the cost of starting each operation.
_FEWEST = 8
# The most multiplications of a step on a CPU: between steps it is asked whether the time is over.
_WORK = 1 << 33
# Armijo's condition: f falls by at least this share of its slope times the step. A step after which the slope is still
# more than ``_STRAIGHT`` of the first met little curvature, as if every distribution is one-hot.
_ARMIJO, _STRAIGHT = 1e-4, 0.5
_HALVINGS, _DOUBLINGS = 40, 20


# Of a step's system H s = g: the scores of its direction -s; the residual H s - g, which rounding leaves.
Solved = tuple[Float[Tensor, "B n v"], Float[Tensor, "B D"]]


@dataclass(frozen=True)
class DualNewton(Solver[DualState]):
    """Newton's method on the dual function with its full Hessian, for small heads or precise answers.

    A step costs v D² multiplications per row (v tokens, D dual variables) and two passes over all heads; the module
    docstring describes it.

    Args:
        bold: whether a step that had to be shortened is lengthened again for as long as f falls. Most rows of members
            that are sure of unlike tokens need far fewer steps so; a few, of very unequal trusts, never converge.
    """

    bold: bool = False

    def init(self, problem: Projection) -> DualState:
        """Return the state at ν = 0, at which the answer is the pool and no head has been read.

        Rows in which the pool's gap Σ_i ρ_i KL(q‖p̂_i) is at most ``problem.tol`` are done (:func:`start`).
        """
        return DualState(**start(problem))

    def rows_at_once(self, problem: Projection) -> int:
        """Return how many rows one step may take, at least 1, so that their Hessians, D² numbers each, fit into memory.

        On a CPU their vectors over the vocabulary should also fit its cache, but for that no fewer than 8 are returned;
        and a step should not take longer than a large fraction of a second.
        """
        size, place = len(problem.scale) ** 2, problem.log_p.device
        rows = held(size)
        if place.type == "cpu":
            rows = min(rows, cached(problem.log_p.shape[1:].numel(), place, _FEWEST))
            rows = min(rows, max(1, _WORK // max(1, size * problem.log_q.shape[-1])))
        return rows

    def step(self, problem: Projection, state: DualState) -> DualState:
        """Take one Newton step of every row, and bound or estimate the gap at the new point; return the new state.

        ``gradient`` and ``direction`` of ``state`` are set in place, by :meth:`aim`.
        """
        reads = problem.passes()
        residual = self.aim(problem, state)
        y = problem.scores(state.direction)
        after = _moved(problem, state, y, bold=self.bold)
        near = pool_is_near(problem, after)
        if not near.all():
            self._judge(problem, state, after, (y, residual))
            end_by_proof(problem, state, after)
        end_by_pool(after, near)
        after.passes = state.passes + problem.passes() - reads
        return after

    def aim(self, problem: Projection, state: DualState) -> Float[Tensor, "B D"]:
        """Set ``state.gradient`` to ∇f and ``state.direction`` to -H⁻¹∇f, in place, by one pass over all heads.

        f is the dual function and H its Hessian. If ``problem.start`` is given and no row of ``state`` has taken a
        step, nothing is read or changed: :meth:`init` has set the direction to that start.

        Returns:
            The residual H s - g, (B, D), of the system H s = g = ∇f, which is solved only up to rounding; 0 at a start.
        """
        first = not state.steps.any()
        if first and problem.start is not None:
            return torch.zeros_like(state.gradient)
        found = moments(problem, state.log_p, state.log_r)
        state.gradient = problem.scale * (found.joint - found.own)
        s = solve_ridged(found.H, state.gradient, problem.eps)
        state.direction = -s
        return (found.H @ s[..., None]).squeeze(-1) - state.gradient

    def _judge(self, problem: Projection, before: DualState, after: DualState, solved: Solved) -> None:
        """Set ``gap``, ``certified``, ``done`` and ``status`` of ``after``, in place.

        The gap before the step is bounded by the scores of the direction, and the residual of its system; less the fall
        of f, the bound holds after the step.
        """
        decrement = -(before.gradient * before.direction).sum(-1)
        fall = before.value - after.value
        # The first step to a given start is no Newton step: it says nothing about the gap.
        given = (before.steps == 0) & (problem.start is not None)
        estimate = (0.5 * decrement - fall).clamp_min(0).masked_fill(given, torch.inf)
        bound, rounding = torch.full_like(fall, torch.inf), torch.zeros_like(fall)
        # A row that stalls is bounded, too: what it has may be near the optimum, though not as near as ``tol`` asks.
        near = ((estimate <= tuning.FAR * problem.tol) | ((fall <= 0) & ~given)).nonzero().squeeze(-1)
        if len(near):
            bound[near], rounding[near] = _certified(problem, before, after, solved, near)
        certified = torch.minimum(bound, torch.where(before.certified, before.gap, torch.inf))
        certified = bound_after(certified, fall, problem.tol)
        after.certified = certified.isfinite()
        after.gap = torch.where(after.certified, certified, estimate) + rounding
        reached = after.certified & (after.gap <= problem.tol)
        reached = problem.exactly(reached, after.log_p, after.log_r)
        stalled = (fall <= 0) & ~reached & ~given
        after.done = reached | stalled
        after.status = after.status.masked_fill(stalled, Status.NOT_CONVERGED)
        after.gap = after.gap.masked_fill(stalled & ~after.certified, torch.inf)


def bound_after(bound: Float[Tensor, " B"], fall: Float[Tensor, " B"], tol: float) -> Float[Tensor, " B"]:
    """Return a bound on the gap after a step, (B,), in nats: ``bound`` less ``fall``, or 0 if that is negative.

    If it is below -``tol``, ``bound`` was wrong, and inf is returned: rounding of a Hessian in single precision can
    spoil it if one token has nearly all the mass.

    Args:
        bound: a bound on the gap before the step, in nats.
        fall: by how much the step lowered the dual function, in nats.
        tol: the tolerance in nats.
    """
    left = bound - fall
    return torch.where(left < -tol, torch.inf, left.clamp_min(0))


def _certified(
    problem: Projection, before: DualState, after: DualState, solved: Solved, rows: Int[Tensor, " k"]
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Bound the gap at the point of ``before`` in the rows with the indices ``rows``, by the direction's scores.

    Returns:
        (the bound in nats, inf if none is found; the rounding, in nats, to add to a bound after the step).
    """
    (y, residual), (log_p, log_r) = solved, (before.log_p[rows], before.log_r[rows])
    p, r, gradient, direction = log_p.exp(), log_r.exp(), before.gradient[rows], before.direction[rows]
    bound, broken = gap_bound(problem, p, r, y[rows])
    slack = residual_slack(problem.take(rows), (log_p, log_r), residual[rows], direction, gradient)
    bound = torch.where(broken, torch.inf, bound + slack)
    decrement = -(gradient * direction).sum(-1)
    for k in (bound.isinf() & (0.25 * decrement <= problem.tol)).nonzero().flatten().tolist():
        if time_is_over():
            break
        bound[k] = restricted_gap_bound(problem, int(rows[k]), log_p[k], log_r[k], gradient[k])
    return bound, problem.rounding(p, r, after.z[rows], after.nu[rows])


def _moved(problem: Projection, state: DualState, y: Float[Tensor, "B n v"], *, bold: bool) -> DualState:
    """Return the state after a step along ``state.direction``, whose scores are ``y``, long enough to lower f.

    The length is 1 if Armijo's condition holds there, else shorter, or if ``bold`` the longest of its doubles to which
    f falls; it is longer than 1 if f is nearly straight.
    """
    there, slope = Point.at(problem, state.z + y), (state.gradient * state.direction).sum(-1)
    t = torch.ones_like(slope)
    failed = ~(there.value <= state.value + _ARMIJO * slope)
    straight = ~failed & (slope < 0) & (there.slope(problem, y) < _STRAIGHT * slope)
    for which, search in ((failed, _shorter), (straight | (failed & bold), _longer)):
        if which.any():
            rows = which.nonzero().squeeze(-1)
            t[rows] = search(problem.take(rows), state.take(rows), y[rows], slope[rows], t[rows])
    if (t != 1).any():
        rows = (t != 1).nonzero().squeeze(-1)
        moved = state.z[rows] + t[rows, None, None] * y[rows]
        there = there.put(rows, Point.at(problem.take(rows), moved))
    return moved_to(problem, state, there, t[:, None] * state.direction)


def _shorter(
    problem: Projection, state: DualState, y: Float[Tensor, "B n v"], slope: Float[Tensor, " B"], t: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Return step lengths below ``t`` by halving until Armijo's condition holds; 0 if f never falls. Reads no head."""

    def value(t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        return problem.dual(state.z + t[:, None, None] * y)

    def worse(t: Float[Tensor, " B"]) -> Bool[Tensor, " B"]:
        return ~(value(t) <= state.value + _ARMIJO * t * slope)

    t = torch.minimum(0.5 * t, 4 * _safe_step(problem, y))
    t, failed = backtrack(worse, t, 0.5, _HALVINGS, wait=True)
    return torch.where(value(t) <= state.value, t, 0.0) if failed.any() else t


def _longer(
    problem: Projection, state: DualState, y: Float[Tensor, "B n v"], slope: Float[Tensor, " B"], t: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Return step lengths of ``t`` or more by doubling while f falls and Armijo's condition holds. Reads no head."""
    value, going = problem.dual(state.z + t[:, None, None] * y), torch.ones_like(state.done)
    for _ in range(_DOUBLINGS):
        further = problem.dual(state.z + 2 * t[:, None, None] * y)
        going = going & (further < value) & (further <= state.value + _ARMIJO * 2 * t * slope)
        if not going.any():
            break
        t, value = torch.where(going, 2 * t, t), torch.where(going, further, value)
    return t


def _safe_step(problem: Projection, y: Float[Tensor, "B n v"]) -> Float[Tensor, " B"]:
    """Return log(1 + d) / d, d the range of the tilts: a step length at which a generalised self-concordant f falls.

    It is needed if every distribution is one-hot (Sun and Tran-Dinh, Math. Program. 178, 2019, eq. 23 with ν = 2).
    """
    tilts = torch.cat([problem.tilt(y)[:, None], problem.gamma[:, None] * y], dim=1)
    span = (tilts.amax(-1) - tilts.amin(-1)).amax(-1)
    return torch.log1p(span) / span.clamp_min(torch.finfo(span.dtype).tiny)
