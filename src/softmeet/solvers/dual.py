"""Descent on the dual of a relaxed I-projection: what its methods share.

A step goes along a direction whose scores one read of every head gives, shortened where f does not fall enough and
lengthened where f is straight, and then looks for a bound on the gap.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.solvers.base import Solver, State, Status
from softmeet.solvers.point import Point
from softmeet.solvers.projection import Projection

_ARMIJO = 1e-4
_HALVINGS = 40
# A step at whose end so much of the slope is left has met little curvature, as where every distribution is one-hot.
_STRAIGHT = 0.5
_DOUBLINGS = 20


@dataclass
class DualState(State):
    """Where each row is, and where it goes next.

    Attributes:
        nu, z: the dual variables in whitened coordinates and their scores Q_i ν_i.
        value: f there.
        gradient: ∇f where the last direction was chosen; 0 until a head has been read.
        log_p, log_r: log p and log r_i there.
        direction: of the next step; 0 before the first look.
        ray: a Farkas proof of infeasibility, or 0.
        free: Σ ρ_i KL(q‖p̂_i).
        by_pool: whether the pool is proved to be as near the optimum as was asked, and answers.
    """

    nu: Float[Tensor, "B D"]
    z: Float[Tensor, "B n v"]
    value: Float[Tensor, " B"]
    gradient: Float[Tensor, "B D"]
    log_p: Float[Tensor, "B v"]
    log_r: Float[Tensor, "B n v"]
    direction: Float[Tensor, "B D"]
    ray: Float[Tensor, "B D"]
    free: Float[Tensor, " B"]
    by_pool: Bool[Tensor, " B"]

    @property
    def pool_bound(self) -> Float[Tensor, " B"]:
        """KL(q‖p°) is at most this, in nats, whatever the dual point: it falls with f (docs/mathematics.md)."""
        return (self.free + self.value).clamp_min(0)


S = TypeVar("S", bound=DualState)


def start(problem: Projection) -> dict[str, Tensor]:
    """The fields at ν = 0, the pool; a row whose pool is within ``tol`` of optimal is done without a read.

    Where the problem has a start, that is the first direction.
    """
    gap, z = problem.pool_gap(), torch.zeros_like(problem.log_p)
    nothing = z.new_zeros(len(z), len(problem.scale))
    return {
        "done": gap <= problem.tol,
        "status": torch.full_like(gap, Status.OPTIMAL, dtype=torch.int64),
        "gap": gap,
        "certified": gap.isfinite(),
        "steps": torch.zeros_like(gap, dtype=torch.int64),
        "passes": torch.zeros_like(gap),
        "nu": nothing,
        "z": z,
        "value": problem.dual(z),
        "gradient": nothing.clone(),
        "log_p": problem.log_q.clone(),
        "log_r": problem.log_p.clone(),
        "direction": nothing.clone() if problem.start is None else problem.start.clone(),
        "ray": nothing.clone(),
        "free": gap.clone(),
        "by_pool": gap <= problem.tol,
    }


class DualMethod(Solver[Projection, S]):
    """A Newton-like method on the dual: subclasses choose the direction, and judge where it led."""

    def take(self, problem: Projection, rows: Int[Tensor, " k"]) -> Projection:
        """Cut the problem to some rows of its batch."""
        return problem.take(rows)

    @abstractmethod
    def aim(self, problem: Projection, state: S) -> None:
        """Choose the direction of the next step, where it is not known yet."""

    @abstractmethod
    def judge(self, problem: Projection, before: S, after: S, full: Float[Tensor, "B n v"]) -> None:
        """Set ``gap``, ``certified``, ``done`` and ``status`` of ``after``, and what the method keeps.

        ``full`` holds the scores of the whole direction, of which the step may have been a part.
        """

    def advance(self, problem: Projection, state: S, y: Float[Tensor, "B n v"]) -> S:
        """Move ``state`` along its direction, with the scores ``y``, as far as f falls by Armijo's condition."""
        there, slope = Point.at(problem, state.z + y), (state.gradient * state.direction).sum(-1)
        t = torch.ones_like(slope)
        failed = ~(there.value <= state.value + _ARMIJO * slope)
        straight = ~failed & (slope < 0) & (there.slope(problem, y) < _STRAIGHT * slope)
        for which, search in ((failed, _shorter), (straight, _longer)):
            if which.any():
                rows = which.nonzero().squeeze(-1)
                here = state.take(rows)
                t[rows] = search(problem.take(rows), here, y[rows], slope[rows])
        if (t != 1).any():
            rows = (t != 1).nonzero().squeeze(-1)
            moved = state.z[rows] + t[rows, None, None] * y[rows]
            there = there.put(rows, Point.at(problem.take(rows), moved))
        log_p, log_r = there.logs(problem)
        return replace(
            state,
            steps=state.steps + 1,
            nu=state.nu + t[:, None] * state.direction,
            z=there.z,
            value=there.value,
            log_p=log_p,
            log_r=log_r,
        )

    def step(self, problem: Projection, state: S) -> S:
        """A direction, one read of the heads for its scores, and as much of it as lowers f."""
        reads = problem.passes()
        self.aim(problem, state)
        y = problem.scores(state.direction)
        after = self.advance(problem, state, y)
        near = pool_is_near(problem, after)
        if not near.all():
            self.judge(problem, state, after, y)
            if math.inf in problem.trust:
                look_for_a_proof(problem, state, after)
        end_by_pool(after, near)
        after.passes = state.passes + problem.passes() - reads
        return after


def pool_is_near(problem: Projection, state: DualState) -> Bool[Tensor, " B"]:
    """The rows that the pool may answer, with what rounding of scores may hide."""
    near = state.pool_bound <= problem.tol
    if not problem.pool_may_answer or not near.any():
        return torch.zeros_like(near)
    hidden = problem.rounding(state.log_p.exp(), state.log_r.exp(), state.z, state.nu)
    return state.pool_bound + hidden <= problem.tol


def end_by_pool(state: DualState, near: Bool[Tensor, " B"]) -> None:
    """Have the pool answer rows that it may answer, unless their own answer was proved to be near enough."""
    near = near & ~(state.done & (state.status == Status.OPTIMAL))
    state.by_pool, state.done = near, state.done | near
    state.status = state.status.masked_fill(near, Status.OPTIMAL)
    state.gap = torch.where(near, state.pool_bound, state.gap)
    state.certified = state.certified | near


def bound_after(bound: Float[Tensor, " B"], fall: Float[Tensor, " B"], tol: float) -> Float[Tensor, " B"]:
    """What is left of a bound on the gap once f has fallen; inf, no bound, where f fell by more than ``tol`` beyond it.

    Rounding can spoil a bound: that of a Hessian in single precision, where one token has all the mass.
    """
    left = bound - fall
    return torch.where(left < -tol, torch.inf, left.clamp_min(0))


def look_for_a_proof(problem: Projection, before: DualState, after: DualState) -> None:
    """End rows whose point, or whose last direction, proves that the exact members have no common distribution."""
    size = torch.maximum(after.z.abs().amax((-1, -2)), before.z.abs().amax((-1, -2)))
    by_point = problem.excludes(after.z, after.nu, size)
    by_direction = problem.excludes(after.z - before.z, after.nu - before.nu, size)
    after.ray = torch.where(by_direction[:, None], after.nu - before.nu, after.ray)
    after.ray = torch.where(by_point[:, None], after.nu, after.ray)
    infeasible = by_point | by_direction
    after.done = after.done | infeasible
    after.status = after.status.masked_fill(infeasible, Status.INFEASIBLE)
    after.gap = after.gap.masked_fill(infeasible, torch.inf)
    after.certified = after.certified & ~infeasible


def _shorter(
    problem: Projection, state: DualState, change: Float[Tensor, "B n v"], slope: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """A step below 1 by halving until Armijo's condition holds; 0 where it never does. Reads no head."""
    t = torch.minimum(torch.full_like(slope, 0.5), 4 * _safe_step(problem, change))
    for _ in range(_HALVINGS):
        value = problem.dual(state.z + t[:, None, None] * change)
        failed: Bool[Tensor, " B"] = ~(value <= state.value + _ARMIJO * t * slope)
        if not failed.any():
            return t
        t = torch.where(failed, t / 2, t)
    return torch.where(problem.dual(state.z + t[:, None, None] * change) <= state.value, t, 0.0)


def _longer(
    problem: Projection, state: DualState, change: Float[Tensor, "B n v"], slope: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """A step of 1 or more, by doubling while f falls and Armijo's condition holds. Reads no head."""
    t = torch.ones_like(slope)
    value, going = problem.dual(state.z + change), torch.ones_like(state.done)
    for _ in range(_DOUBLINGS):
        further = problem.dual(state.z + 2 * t[:, None, None] * change)
        going = going & (further < value) & (further <= state.value + _ARMIJO * 2 * t * slope)
        if not going.any():
            break
        t, value = torch.where(going, 2 * t, t), torch.where(going, further, value)
    return t


def _safe_step(problem: Projection, change: Float[Tensor, "B n v"]) -> Float[Tensor, " B"]:
    """log(1 + d) / d, d the range of the tilts: a step that lowers a generalised self-concordant f (Sun and
    Tran-Dinh, Math. Program. 178, 2019, eq. 23 with ν = 2); what is needed where every distribution is one-hot.
    """
    tilt = problem.tilt(change)
    span = tilt.amax(-1) - tilt.amin(-1)
    for i, gamma in enumerate(problem.gamma):
        span = torch.maximum(span, gamma * (change[:, i].amax(-1) - change[:, i].amin(-1)))
    return torch.log1p(span) / span.clamp_min(torch.finfo(span.dtype).tiny)
