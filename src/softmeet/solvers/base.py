"""The parts that all solvers share: how a row can end, and the one loop, which counts steps and drops finished rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.batched import Batched
from softmeet.solvers.clock import time_is_over
from softmeet.solvers.projection import Projection


class Status(IntEnum):
    """The outcome of one row. ``str(status)`` is a sentence for the user.

    ``OPTIMAL``: solved to the tolerance. ``DEGENERATE``: the objective is constant on the feasible set, so the rule
    chose nothing. ``INFEASIBLE``: the feasible set is proved to be empty. ``NOT_CONVERGED``: the steps that
    ``max_steps`` allows were taken, or made no more progress, before the tolerance was reached. ``UNVERIFIED``: the
    rule has no method ``verify`` that could check its answers. ``BUDGET``: as ``NOT_CONVERGED``, because the time of
    :func:`softmeet.time_limit` or the steps of the option ``budget`` of ``meet`` were over.

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
        """Return the sentence that explains the outcome to the user."""
        return _SENTENCES[self]


class StoppedBy(IntEnum):
    """The reason why the work on one row ended. p° is the exact optimum, ``tol`` the tolerance in nats.

    ``GAP``: the solver's own test. Its answer p has a gap, which bounds KL(p°‖p), of at most ``tol`` (an estimate of
    the gap if it is not certified), or the row is proved infeasible; also every row of a rule without a solver.
    ``POOL``: the pool q is proved to have KL(q‖p°) ≤ ``tol``, and is the answer. ``GATE``: a gate was closed, and the
    answer is the one that the gate names in the rule's place. ``BUDGET``: the time was over, or the steps that
    ``max_steps`` or ``budget`` allows were taken, or made no more progress, before ``tol`` was reached; the status is
    ``NOT_CONVERGED`` or ``BUDGET``.
    """

    GAP = 0
    POOL = 1
    GATE = 2
    BUDGET = 3

    def __str__(self) -> str:
        """Return the reason's name in small letters, such as ``pool``."""
        return self.name.lower()


_SENTENCES = {
    Status.OPTIMAL: "solved to the tolerance",
    Status.DEGENERATE: "every feasible distribution is optimal: the objective is constant on the feasible set",
    Status.INFEASIBLE: "no distribution has every member's moments",
    Status.NOT_CONVERGED: "the tolerance was not reached: this is the best point found; raise tol, or else max_steps",
    Status.UNVERIFIED: "the rule has no second look at an answer: nothing was verified",
    Status.BUDGET: "the budget of steps or time ended first: this is the best point found",
}


def unfinished(status: Int[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
    """Return a mask of the rows that did not reach the tolerance: those with status NOT_CONVERGED or BUDGET."""
    return (status == Status.NOT_CONVERGED) | (status == Status.BUDGET)


def ended(status: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Return the statuses with BUDGET in place of NOT_CONVERGED if the time of :func:`softmeet.time_limit` is over."""
    return status.masked_fill(status == Status.NOT_CONVERGED, Status.BUDGET) if time_is_over() else status


@dataclass
class State(Batched):
    """The state of a solver for a batch of B rows; solvers add fields of their own.

    Attributes:
        done: (B,), rows that need no further step.
        status: (B,), int64, a :class:`Status` for each row; without meaning until the row is done.
        gap: (B,), nats: an upper bound on f(ν) - min f, f the dual function of the :class:`Projection` and ν the
            current dual point; only an estimate of that difference unless ``certified``.
        certified: (B,), True for rows whose ``gap`` is proved to be an upper bound.
        steps: (B,), int64, how often :meth:`Solver.step` was called with the row.
        passes: (B,), how often all heads were read for the row by those calls: entries of [W_1 | … | W_n] read, divided
            by all its entries.
    """

    done: Bool[Tensor, " B"]
    status: Int[Tensor, " B"]
    gap: Float[Tensor, " B"]
    certified: Bool[Tensor, " B"]
    steps: Int[Tensor, " B"]
    passes: Float[Tensor, " B"]


S = TypeVar("S", bound=State)


class Solver(ABC, Generic[S]):
    """A batched iterative method that minimises the dual function of relaxed I-projections (:class:`Projection`).

    S is the :class:`State` that it works on. Subclasses define the first state and one step; :func:`iterate` repeats
    the step until every row has ended.
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
    return ended[-1] if len(places[-1]) == len(state.done) else State.joined(ended).take(torch.cat(places).argsort())
