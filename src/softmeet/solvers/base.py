"""What every solver shares: statuses, and the one loop that owns step limits and the masking of finished rows."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

from jaxtyping import Bool, Float, Int
from torch import Tensor


class Status(IntEnum):
    """How one row ended. ``str(status)`` is the sentence for the user."""

    OPTIMAL = 0
    DEGENERATE = 1
    INFEASIBLE = 2
    NOT_CONVERGED = 3
    UNVERIFIED = 4
    BUDGET = 5

    def __str__(self) -> str:
        return _SENTENCES[self]


class StoppedBy(IntEnum):
    """What ended the work on a row: its answer is the solver's, the pool, or whatever a gate has answer.

    ``GAP``: the answer p was proved to be near enough, KL(p°‖p) ≤ tol. ``POOL``: the pool q was, KL(q‖p°) ≤ tol.
    ``GATE``: a gate was closed. ``BUDGET``: the steps ended.
    """

    GAP = 0
    POOL = 1
    GATE = 2
    BUDGET = 3

    def __str__(self) -> str:
        return self.name.lower()


_SENTENCES = {
    Status.OPTIMAL: "solved to the tolerance",
    Status.DEGENERATE: "every feasible distribution is optimal: the objective is constant on the feasible set",
    Status.INFEASIBLE: "no distribution has every member's moments",
    Status.NOT_CONVERGED: "the tolerance was not reached: raise it, or max_steps where num_steps is as many",
    Status.UNVERIFIED: "the rule has no second look at an answer: nothing was verified",
    Status.BUDGET: "the budget of steps or time ended first: this is the best point found",
}


P = TypeVar("P")
S = TypeVar("S", bound="State")


@dataclass
class State:
    """One row per problem in every field; solvers add fields of their own. A step makes new tensors.

    ``passes`` counts reads of all heads, in rows of A divided by v.
    """

    done: Bool[Tensor, " B"]
    status: Int[Tensor, " B"]
    gap: Float[Tensor, " B"]
    certified: Bool[Tensor, " B"]
    steps: Int[Tensor, " B"]
    passes: Float[Tensor, " B"]

    def take(self: S, rows: Int[Tensor, " k"]) -> S:
        """A copy of some rows."""
        return dataclasses.replace(self, **{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})

    def put(self: S, rows: Int[Tensor, " k"], other: S) -> S:
        """Write the rows of another state back into this one, and return it."""
        for f in dataclasses.fields(self):
            getattr(self, f.name)[rows] = getattr(other, f.name)
        return self


def some(rows: Bool[Tensor, " B"]) -> bool:
    """Whether a mask holds any row; taken for granted on an accelerator, where looking would wait for it."""
    return rows.device.type != "cpu" or bool(rows.any())


class Solver(ABC, Generic[P, S]):
    """A batched iterative method: how to begin, one step of unfinished rows, and how to cut a problem to some rows."""

    @abstractmethod
    def init(self, problem: P) -> S:
        """The state before the first step."""

    @abstractmethod
    def step(self, problem: P, state: S) -> S:
        """One step of every row; sets ``done``, ``status`` and ``gap``."""

    @abstractmethod
    def take(self, problem: P, rows: Int[Tensor, " k"]) -> P:
        """The problem of some rows."""

    @abstractmethod
    def rows_at_once(self, problem: P) -> int:
        """How many rows to run together, for what a step keeps in memory."""


def iterate(solver: Solver[P, S], problem: P, max_steps: int) -> S:
    """Run ``solver`` until every row is done or has taken ``max_steps``; finished rows are left alone.

    A row that is not done at the end is ``NOT_CONVERGED``. No more rows run at once than the solver asks for.
    """
    state = solver.init(problem)
    going = (~state.done).nonzero().squeeze(-1)
    for rows in going.split(solver.rows_at_once(problem)) if len(going) else ():
        state = _run(solver, problem, state, rows, max_steps)
    return state


def _run(solver: Solver[P, S], problem: P, state: S, rows: Int[Tensor, " k"], max_steps: int) -> S:
    active = state
    if len(rows) < len(state.done):
        active, problem = state.take(rows), solver.take(problem, rows)
    for _ in range(max_steps):
        active = solver.step(problem, active)
        # Rows leave only when they finish: what they carry may be large.
        if active.done.all():
            break
        if active.done.any():
            ended, going = active.done.nonzero().squeeze(-1), (~active.done).nonzero().squeeze(-1)
            state.put(rows[ended], active.take(ended))
            rows, active, problem = rows[going], active.take(going), solver.take(problem, going)
    active.status = active.status.masked_fill(~active.done, Status.NOT_CONVERGED)
    return active if len(rows) == len(state.done) else state.put(rows, active)
