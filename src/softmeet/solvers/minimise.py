"""Which method solves a relaxed I-projection: the full Hessian where heads are small, few dense steps where not."""

from __future__ import annotations

from softmeet.solvers import tuning
from softmeet.solvers.base import Status, iterate
from softmeet.solvers.dense import dense
from softmeet.solvers.dual import DualState
from softmeet.solvers.newton import DualNewton
from softmeet.solvers.projection import Projection


def minimise_dual(problem: Projection, max_steps: int, *, certify: bool = True, rescue: bool = True) -> DualState:
    """Minimise the dual of every row to ``problem.tol``.

    Args:
        problem: the projection.
        max_steps: steps a row, at most.
        certify: bound the gap of rows that dense steps solve; else its estimate ends them. With the full Hessian
            bounds cost nothing, and are always there.
        rescue: try rows that dense steps did not bring home, such as near-one-hot ones, again with the full Hessian.
    """
    if full_hessian_pays(problem):
        return iterate(DualNewton(), problem, max_steps).plain()
    state = dense(problem, max_steps, certify=certify).plain()
    late = (state.status == Status.NOT_CONVERGED).nonzero().squeeze(-1)
    if not rescue or not len(late) or _cost(problem) > tuning.HESSIAN_AS_RESCUE:
        return state
    again = iterate(DualNewton(), problem.take(late), max_steps).plain()
    again.steps += state.steps[late]
    again.passes += state.passes[late]
    better = (again.status == Status.OPTIMAL) | (again.value <= state.value[late])
    return state.put(late[better], again.take(better.nonzero().squeeze(-1)))


def full_hessian_pays(problem: Projection) -> bool:
    """Return whether Newton's method with the full Hessian costs less than dense steps."""
    return _cost(problem) <= (tuning.HESSIAN_WHERE_FINE if problem.tol < tuning.FINE else tuning.HESSIAN)


def _cost(problem: Projection) -> int:
    """Return the multiplications for one Hessian, v D²."""
    return problem.log_q.shape[-1] * len(problem.scale) ** 2
