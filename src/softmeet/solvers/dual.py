"""The state of the methods that minimise the dual f of a relaxed I-projection, their one loop, and ways to end a row.

Symbols are those of :mod:`softmeet.solvers.projection`: q the pool, p̂_i the members, ρ_i the trusts, ν the dual
variables, z_i = Q_i ν_i the scores, p and r_i the answer and the corrected members at ν, p° the optimum's p.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.solvers.base import Status
from softmeet.solvers.batched import Batched
from softmeet.solvers.clock import time_is_over
from softmeet.solvers.projection import Point, Projection


@dataclass
class DualState(Batched):
    """The current dual point ν of each row of a :class:`Projection`, and the direction of its step.

    :func:`start` gives the fields of the first state, and solvers make the later ones by :func:`moved_to`.

    Attributes:
        done: (B,), rows that need no further step.
        status: (B,), int64, a :class:`Status` for each row; without meaning until the row is done.
        gap: (B,), nats: an upper bound on f(ν) - min f, f the dual function of the :class:`Projection` and ν the
            current dual point; only an estimate of that difference unless ``certified``.
        certified: (B,), True for rows whose ``gap`` is proved to be an upper bound.
        steps: (B,), int64, how often :meth:`Solver.step` was called with the row.
        passes: (B,), how often all heads were read for the row by those calls: entries of [W_1 | … | W_n] read, divided
            by all its entries.
        nu, z: the dual variables ν, (B, D), in whitened coordinates, and the scores z_i = Q_i ν_i, (B, n, v).
        value: the dual function f at ν, (B,), in nats.
        gradient: ∇f, (B, D), at the point at which the last direction was computed; 0 until then.
        log_p, log_r: log-probabilities of the answer p, (B, v), and the corrected members r_i, (B, n, v), at ν, in
            nats.
        direction: the direction in ν that was computed for the last step, (B, D); before the first step
            ``problem.start``, or 0.
        ray: dual variables, (B, D), that are a Farkas proof: no distribution has the moments of all members of infinite
            trust; 0 if none is known.
        free: Σ_i ρ_i KL(q‖p̂_i), (B,), in nats, q the pool; known without reading a head.
        by_pool: (B,), True for rows answered by q because KL(q‖p°) ≤ ``tol`` is proved, p° the optimum. There
            ``log_p`` is still the p of the dual point.
    """

    done: Bool[Tensor, " B"]
    status: Int[Tensor, " B"]
    gap: Float[Tensor, " B"]
    certified: Bool[Tensor, " B"]
    steps: Int[Tensor, " B"]
    passes: Float[Tensor, " B"]
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
        """Return a plain :class:`DualState` with this state's own tensors, without the fields that a subclass adds."""
        return DualState(**{f.name: getattr(self, f.name) for f in fields(DualState)})

    @property
    def pool_bound(self) -> Float[Tensor, " B"]:
        """An upper bound on KL(q‖p°), q the pool and p° the optimum, (B,), in nats: Σ_i ρ_i KL(q‖p̂_i) + f(ν).

        It holds at every dual point ν and falls with the dual function f (equation 5b, docs/theory/agreement.md#eq-5b).
        """
        return (self.free + self.value).clamp_min(0)


S = TypeVar("S", bound=DualState)


class Solver(ABC, Generic[S]):
    """A batched iterative method that minimises the dual function of relaxed I-projections (:class:`Projection`).

    S is the :class:`DualState` that it works on. Subclasses define the first state and one step, which :func:`iterate`
    repeats until every row has ended.
    """

    @abstractmethod
    def init(self, problem: Projection) -> S:
        """Return the state of all B rows before the first step; rows that need no step are ``done``, with a status."""

    @abstractmethod
    def step(self, problem: Projection, state: S) -> S:
        """Take one step of every row; return a state with ``done``, ``status``, ``gap`` and ``certified`` set anew.

        :func:`iterate` passes unfinished rows only: ``problem`` and ``state`` hold the same rows in the same order. A
        solver may change fields of ``state`` in place: only the returned state may be used afterwards.
        """

    @abstractmethod
    def rows_at_once(self, problem: Projection) -> int:
        """Return the most rows of ``problem``, at least 1, that one call of :meth:`step` should be given.

        :func:`iterate` splits larger batches, so that the tensors of a step fit into memory or a processor's cache.
        """


def iterate(solver: Solver[S], problem: Projection, max_steps: int) -> S:
    """Repeat ``solver``'s step until every row of ``problem`` has ended; return the final state of all B rows.

    The rows of the state are in the order of the problem's. ``solver.init`` is called once, with all rows. Unfinished
    rows are then split into groups of ``solver.rows_at_once(problem)`` rows, and each group is stepped to its end
    before the next. A row ends once its ``done`` is set, or it has taken ``max_steps`` steps without that, or the time
    is over (:func:`softmeet.time_is_over`); in the last two cases its status becomes ``NOT_CONVERGED``, while ``done``
    stays False. Rows that ended are not stepped again, and those of groups that were not begun stay as ``init`` has
    them.
    """
    state = solver.init(problem)
    done, going = state.done.nonzero().squeeze(-1), (~state.done).nonzero().squeeze(-1)
    if not len(going):
        return state
    places, ended = ([done], [state.take(done)]) if len(done) else ([], [])
    for rows in going.split(solver.rows_at_once(problem)):
        whole = len(rows) == len(state.done)
        active, part = (state, problem) if whole else (state.take(rows), problem.take(rows))
        for _ in range(max_steps):
            if time_is_over():
                break
            active = solver.step(part, active)
            # The batch is copied only when rows finish: their tensors may be large.
            if active.done.all():
                break
            if active.done.any():
                out, on = active.done.nonzero().squeeze(-1), (~active.done).nonzero().squeeze(-1)
                places, ended = [*places, rows[out]], [*ended, active.take(out)]
                rows, active, part = rows[on], active.take(on), part.take(on)
        active.status = active.status.masked_fill(~active.done, Status.NOT_CONVERGED)
        places, ended = [*places, rows], [*ended, active]
    return ended[-1] if len(places[-1]) == len(state.done) else Batched.joined(ended).take(torch.cat(places).argsort())


def start(problem: Projection) -> dict[str, Tensor]:
    """Return the fields of a :class:`DualState` by name at ν = 0, at which the answer is the pool q; no head is read.

    Rows in which the pool's gap Σ_i ρ_i KL(q‖p̂_i) is at most ``problem.tol`` are done, OPTIMAL and answered by the
    pool. ``problem.start``, if given, becomes ``direction``, along which the first step goes.
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


def moved_to(problem: Projection, state: S, there: Point, change: Float[Tensor, "B D"], **found: Tensor) -> S:
    """Return the state after one more step of every row.

    ``nu``, ``z``, ``value``, ``log_p`` and ``log_r`` are set from the new point, ``steps`` rises by 1 in every row, and
    all other fields keep their values, unless ``found`` has them. ``state`` is not changed.

    Args:
        problem: the batch of relaxed I-projections.
        state: the state before the step, with the rows of ``problem``.
        there: the point to which the step leads, from :meth:`Point.at`.
        change: (B, D), the step in ν, the dual variables in whitened coordinates.
        found: values for further fields of the state, by the fields' names, with B rows each.
    """
    log_p, log_r = there.logs(problem)
    moved = {"nu": state.nu + change, "z": there.z, "value": there.value, "log_p": log_p, "log_r": log_r, **found}
    return replace(state, steps=state.steps + 1, **moved)


def end_by_proof(problem: Projection, before: DualState, after: DualState) -> None:
    """End rows of ``after``, in place, as INFEASIBLE if a dual point proves that no p has the exact members' moments.

    Exact members are those of infinite trust; without one nothing is done. Two dual vectors are tried as the Farkas
    proof of :meth:`Projection.excludes`: ν of ``after``, and its difference from ν of ``before``, the state one step
    earlier; the one that is a proof is written to ``after.ray``, ν of ``after`` if both are. Such rows become done,
    with gap inf, not certified. Both states have the rows of ``problem``.
    """
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
    """Return the rows, a mask (B,), in which the pool q may be the answer: KL(q‖p°) ≤ ``problem.tol`` is proved.

    p° is the optimum, and ``state`` has the rows of ``problem``. The bound is :attr:`DualState.pool_bound` plus
    :meth:`Projection.rounding`. All entries are False unless ``problem.pool_may_answer``.
    """
    near = state.pool_bound <= problem.tol
    if not problem.pool_may_answer or not near.any():
        return torch.zeros_like(near)
    hidden = problem.rounding(state.log_p.exp(), state.log_r.exp(), state.z, state.nu)
    return state.pool_bound + hidden <= problem.tol


def end_by_pool(state: DualState, near: Bool[Tensor, " B"]) -> None:
    """Mark the rows of the mask ``near``, in place, as answered by the pool: ``by_pool``, done, OPTIMAL, certified.

    Their gap is :attr:`DualState.pool_bound`; ``log_p`` is not changed. Rows that are done and OPTIMAL already, with
    the solver's own answer, are left out. ``by_pool`` becomes False in all other rows. ``near``, (B,), is the result of
    :func:`pool_is_near`.
    """
    near = near & ~(state.done & (state.status == Status.OPTIMAL))
    state.by_pool, state.done = near, state.done | near
    state.status = state.status.masked_fill(near, Status.OPTIMAL)
    state.gap = torch.where(near, state.pool_bound, state.gap)
    state.certified = state.certified | near
