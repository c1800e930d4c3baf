"""The choice of the method for a relaxed I-projection: the full Hessian if heads are small, else few dense steps."""

from __future__ import annotations

from softmeet.solvers import tuning
from softmeet.solvers.base import Status
from softmeet.solvers.clock import time_is_over
from softmeet.solvers.dense import dense
from softmeet.solvers.dual import DualState, iterate
from softmeet.solvers.newton import DualNewton
from softmeet.solvers.projection import Projection

# How many times as many steps a last attempt may take; whoever allows fewer than so many in all does not wait for one.
_BOLD, _PATIENT = 2, 50


def minimise_dual(problem: Projection, max_steps: int, *, certify: bool = True, rescue: bool = True) -> DualState:
    """Minimise the dual function of every row until its gap is at most ``problem.tol``; return the final state.

    Rows that reach that are OPTIMAL; if ``problem.pool_may_answer``, so are rows in which the pool q is proved to have
    KL(q‖p°) ≤ ``problem.tol``, p° the optimum (:attr:`DualState.by_pool`). Rows in which it is proved that no
    distribution has the moments of all members of infinite trust are INFEASIBLE, all others NOT_CONVERGED.

    Args:
        problem: the batch of relaxed I-projections, such as :meth:`softmeet.rules.problem.Problem.projection` returns.
        max_steps: the most steps of a row; an attempt of ``rescue`` may take as many again, and a bold one, if this is
            50 or more, twice as many. ``steps`` and ``passes`` of the state are the sums over all attempts.
        certify: whether dense steps must prove the gap of a row; if False, an estimate ends it. The full Hessian proves
            the gap in any case, at no cost.
        rescue: whether rows that are NOT_CONVERGED are solved again with the full Hessian, and then by its bold steps
            (:class:`DualNewton`), unless v D² (v tokens, D dual variables) exceeds ``tuning.HESSIAN_AS_RESCUE`` or the
            time is over. A further result replaces one if it is OPTIMAL or has no larger dual value.
    """
    small = full_hessian_pays(problem)
    state = iterate(DualNewton(), problem, max_steps) if small else dense(problem, max_steps, certify=certify).plain()
    if not rescue or _cost(problem) > tuning.HESSIAN_AS_RESCUE:
        return state
    if not small:
        state = _again(problem, state, DualNewton(), max_steps)
    if max_steps >= _PATIENT:
        state = _again(problem, state, DualNewton(bold=True), _BOLD * max_steps)
    return state


def _again(problem: Projection, state: DualState, solver: DualNewton, max_steps: int) -> DualState:
    """Solve rows that are NOT_CONVERGED again from the pool, unless the time is over; keep the better of both."""
    late = (state.status == Status.NOT_CONVERGED).nonzero().squeeze(-1)
    if not len(late) or time_is_over():
        return state
    again = iterate(solver, problem.take(late), max_steps)
    again.steps += state.steps[late]
    again.passes += state.passes[late]
    better = (again.status == Status.OPTIMAL) | (again.value <= state.value[late])
    return state.put(late[better], again.take(better.nonzero().squeeze(-1)))


def full_hessian_pays(problem: Projection) -> bool:
    """Return whether solving ``problem`` with the full Hessian is expected to cost less than with dense steps.

    A step with the full Hessian takes v D² multiplications per row, v tokens and D dual variables. It pays if that is
    at most ``tuning.HESSIAN``, or ``tuning.HESSIAN_WHERE_FINE`` for a tolerance below ``tuning.FINE`` or if moments
    have to hold.
    """
    fine = problem.tol < tuning.FINE or problem.moments_hold
    return _cost(problem) <= (tuning.HESSIAN_WHERE_FINE if fine else tuning.HESSIAN)


def _cost(problem: Projection) -> int:
    """Return v D², the multiplications for one full Hessian."""
    return problem.log_q.shape[-1] * len(problem.scale) ** 2
