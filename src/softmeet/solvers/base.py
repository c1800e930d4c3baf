"""How a row can end: the outcomes, the reasons, and what users are told of them."""

from __future__ import annotations

from enum import IntEnum

from jaxtyping import Bool, Int
from torch import Tensor

from softmeet.solvers.clock import time_is_over


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
