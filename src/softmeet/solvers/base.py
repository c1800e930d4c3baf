"""What every solver shares: how rows end, and the one loop, which owns step limits and drops finished rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.batched import Batched
from softmeet.solvers.projection import Projection


class Status(IntEnum):
    """How one row ended. ``str(status)`` is the sentence for the user.

    Example:
        >>> from softmeet import Status
        >>> Status(3).name, str(Status.OPTIMAL)
        ('NOT_CONVERGED', 'solved to the tolerance')
    """

    OPTIMAL = 0
    DEGENERATE = 1
    INFEASIBLE = 2
    NOT_CONVERGED = 3
    UNVERIFIED = 4
    BUDGET = 5

    def __str__(self) -> str:
        return _SENTENCES[self]


class StoppedBy(IntEnum):
    """What ended the work on a row: its answer is the solver's, the pool, or what a gate has answer in its place.

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


@dataclass
class State(Batched):
    """What a solver knows of each row; solvers add fields of their own.

    ``gap`` is in nats, an estimate where it is not ``certified``. ``passes`` counts reads of all heads, in rows of
    [W_1 | … | W_n] divided by the size of the vocabulary.
    """

    done: Bool[Tensor, " B"]
    status: Int[Tensor, " B"]
    gap: Float[Tensor, " B"]
    certified: Bool[Tensor, " B"]
    steps: Int[Tensor, " B"]
    passes: Float[Tensor, " B"]


S = TypeVar("S", bound=State)


class Solver(ABC, Generic[S]):
    """A batched iterative method: how to begin, and one step of unfinished rows."""

    @abstractmethod
    def init(self, problem: Projection) -> S:
        """Return the state before the first step."""

    @abstractmethod
    def step(self, problem: Projection, state: S) -> S:
        """Take one step of every row, and set ``done``, ``status`` and ``gap`` in the state that is returned."""

    @abstractmethod
    def rows_at_once(self, problem: Projection) -> int:
        """Return how many rows to run together, by what a step keeps in memory."""


def iterate(solver: Solver[S], problem: Projection, max_steps: int) -> S:
    """Run ``solver`` until every row is done or has taken ``max_steps``; finished rows take no further part.

    A row that is not done at the end is ``NOT_CONVERGED``. No more rows run at once than the solver asks for.
    """
    state = solver.init(problem)
    done, going = state.done.nonzero().squeeze(-1), (~state.done).nonzero().squeeze(-1)
    if not len(going):
        return state
    places, ended = [done], [state.take(done)]
    for rows in going.split(solver.rows_at_once(problem)):
        whole = len(rows) == len(state.done)
        active, part = (state, problem) if whole else (state.take(rows), problem.take(rows))
        for _ in range(max_steps):
            active = solver.step(part, active)
            # Rows are taken out only when some finish: what they carry may be large.
            if active.done.all():
                break
            if active.done.any():
                out, on = active.done.nonzero().squeeze(-1), (~active.done).nonzero().squeeze(-1)
                places, ended = [*places, rows[out]], [*ended, active.take(out)]
                rows, active, part = rows[on], active.take(on), part.take(on)
        active.status = active.status.masked_fill(~active.done, Status.NOT_CONVERGED)
        places, ended = [*places, rows], [*ended, active]
    return ended[-1] if len(places[-1]) == len(state.done) else State.joined(ended).take(torch.cat(places).argsort())
