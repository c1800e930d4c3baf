"""Descent on the dual of a relaxed I-projection: the state of its methods, where they begin, and what ends a row."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.solvers.base import State, Status
from softmeet.solvers.projection import Projection


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

    def plain(self) -> DualState:
        """Return a copy without what only one method keeps of a row."""
        return DualState(**{f.name: getattr(self, f.name) for f in fields(DualState)})

    @property
    def pool_bound(self) -> Float[Tensor, " B"]:
        """KL(q‖p°) is at most this, in nats, whatever the dual point: it falls with f (docs/mathematics.md)."""
        return (self.free + self.value).clamp_min(0)


def start(problem: Projection) -> dict[str, Tensor]:
    """Return the fields of a state at ν = 0, the pool, where no head has been read.

    A row whose pool is within ``tol`` of optimal is done. Where the problem has a start, that is the first direction.
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


def end_by_proof(problem: Projection, before: DualState, after: DualState) -> None:
    """End rows whose point, or whose last step, proves that the exact members have no common distribution."""
    if math.inf not in problem.trust:
        return
    size = torch.maximum(after.z.abs().amax((-1, -2)), before.z.abs().amax((-1, -2)))
    by_point = problem.excludes(after.z, after.nu, size)
    by_step = problem.excludes(after.z - before.z, after.nu - before.nu, size)
    after.ray = torch.where(by_step[:, None], after.nu - before.nu, after.ray)
    after.ray = torch.where(by_point[:, None], after.nu, after.ray)
    infeasible = by_point | by_step
    after.done = after.done | infeasible
    after.status = after.status.masked_fill(infeasible, Status.INFEASIBLE)
    after.gap = after.gap.masked_fill(infeasible, torch.inf)
    after.certified = after.certified & ~infeasible


def pool_is_near(problem: Projection, state: DualState) -> Bool[Tensor, " B"]:
    """Say which rows the pool may answer: its bound, with what rounding of scores may hide, is within ``tol``."""
    near = state.pool_bound <= problem.tol
    if not problem.pool_may_answer or not near.any():
        return torch.zeros_like(near)
    hidden = problem.rounding(state.log_p.exp(), state.log_r.exp(), state.z, state.nu)
    return state.pool_bound + hidden <= problem.tol


def end_by_pool(state: DualState, near: Bool[Tensor, " B"]) -> None:
    """Have the pool answer the rows that are ``near``, unless their own answer was proved to be near enough."""
    near = near & ~(state.done & (state.status == Status.OPTIMAL))
    state.by_pool, state.done = near, state.done | near
    state.status = state.status.masked_fill(near, Status.OPTIMAL)
    state.gap = torch.where(near, state.pool_bound, state.gap)
    state.certified = state.certified | near
