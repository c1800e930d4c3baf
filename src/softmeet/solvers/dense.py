"""Newton's method on the dual f of a relaxed I-projection in few dense steps: it never forms the Hessian of all heads.

Symbols are those of :mod:`softmeet.solvers.projection`. A step reads all heads twice: for the gradient, and for the
scores of a direction. That is found by conjugate gradients on a model of the Hessian in which heavy tokens have their
curvature exactly, and all others together that of an average token (:mod:`softmeet.solvers.direction`). Then f is
minimised over that direction and the last step, each split by member. A poor direction costs a step and nothing else: f
never rises, but for what rounding hid until scores are read anew. If a bound on the gap may end a row, a third read
computes it. Nothing is sampled, and all rows of a batch share the same products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.solvers import tuning
from softmeet.solvers.base import Status
from softmeet.solvers.certificate import repaired_gap_bound, restricted_gap_bound
from softmeet.solvers.clock import time_is_over
from softmeet.solvers.direction import direction, heavy_tokens
from softmeet.solvers.dual import DualState, Solver, end_by_pool, end_by_proof, iterate, moved_to, pool_is_near, start
from softmeet.solvers.linalg import backtrack, held, some
from softmeet.solvers.projection import Point, Projection

# A restricted bound needs a system of all D columns: it is tried once the estimated gap is this share of ``tol``.
_TINY = 0.1
# The most Newton steps for the coefficients of a step's directions, and the most times that one is shortened.
_COEFFICIENT_STEPS, _SHORTENED = 6, 40
# That Newton's method ends once its next step promises less than this share of the fall of f so far.
_ENOUGH = 0.02
# The share of ``tol`` by which drift of the scores may move f before they are read again, where a bound is wanted.
_DRIFT = 0.1
# Steps without progress after which a row gives up.
_PATIENCE = 2
# The least tolerance, per unit of trust, for vectors in single precision, and the share of ``tol`` that they aim at.
_SINGLE, _KEPT = 5e-5, 0.98
# Added to the diagonal of the coefficients' Hessian, in units of its rounding: directions may be nearly the same.
_RIDGE, _LEAST = 16.0, 1e-30


@dataclass
class DenseState(DualState):
    """A :class:`DualState` with further fields for dense steps.

    Attributes:
        floor: a proved lower bound on the minimum of the dual function, (B,), in nats.
        looseness: the last bound on the gap divided by the gap's estimate at the same point, (B,), from 1 to
            ``tuning.LOOSEST``; ``tuning.LOOSE`` before a first bound.
        moved, step: the change that the last step made to the scores z, (B, n, v), and to ν, (B, D).
        blur, drift: how far rounding may have put ``moved`` and ``z`` off the scores of ``step`` and ν, (B, n), in
            nats, at the worst token.
        stalls: for how many steps in a row the dual function did not fall, (B,).
    """

    floor: Float[Tensor, " B"]
    looseness: Float[Tensor, " B"]
    moved: Float[Tensor, "B n v"]
    step: Float[Tensor, "B D"]
    blur: Float[Tensor, "B n"]
    drift: Float[Tensor, "B n"]
    stalls: Int[Tensor, " B"]


@dataclass(frozen=True)
class DenseNewton(Solver[DenseState]):
    """Newton's method on the dual function by dense steps, which never form the Hessian of all heads.

    A step computes the gradient by one read of all heads, finds a direction from the curvature of heavy tokens, and
    minimises the dual function over all combinations Σ_i (a_i d_i + b_i e_i), d_i and e_i the parts for member i of the
    direction and of the last step; the module docstring has the details.

    Args:
        certify: whether a row must have a proved bound on its gap to be done; if False, an estimate is enough.
    """

    certify: bool = True

    def init(self, problem: Projection) -> DenseState:
        """Return the state at ν = 0, at which the answer is the pool and no head has been read.

        Rows in which the pool's gap Σ_i ρ_i KL(q‖p̂_i) is at most ``problem.tol`` are done (:func:`start`).
        """
        pool = start(problem)
        pool["certified"] &= pool["done"] | self.certify
        return DenseState(
            **pool,
            floor=-pool["gap"],
            looseness=torch.full_like(pool["gap"], tuning.LOOSE),
            moved=torch.zeros_like(pool["z"]),
            step=torch.zeros_like(pool["nu"]),
            blur=torch.zeros_like(pool["z"][..., 0]),
            drift=torch.zeros_like(pool["z"][..., 0]),
            stalls=torch.zeros_like(pool["steps"]),
        )

    def rows_at_once(self, problem: Projection) -> int:
        """Return how many rows one step may take, at least 1, so that its vectors over the vocabulary fit into memory.

        A step keeps about sixteen such vectors for each row and member.
        """
        return held(2 * problem.log_p.shape[1:].numel())

    def step(self, problem: Projection, state: DenseState) -> DenseState:
        """Take one dense step of every row, and bound or estimate the gap at the new point; return the new state.

        ``gradient``, ``direction`` and ``looseness`` of ``state`` are set in place, to those of this step.
        """
        reads, first = problem.passes(), not state.steps.any()
        here = Point.at(problem, state.z)
        estimate = self._aim(problem, state, here, first)
        y = problem.scores(state.direction)
        floor = self._floor(problem, state, here, y, estimate)
        columns, steps = torch.stack([y, state.moved], dim=2), torch.stack([state.direction, state.step], dim=-1)
        if first:
            columns, steps = columns[:, :, :1], steps[..., :1]
        a, there = _least(problem, here, columns)
        step = (problem.spread(a.transpose(1, 2)).transpose(1, 2) * steps).sum(-1)
        stalls = torch.where(there.value < state.value, 0, state.stalls + 1)
        found = {"floor": floor, "step": step, "stalls": stalls, **_rounded(problem, state, a, columns)}
        if self.certify:
            there, found["drift"] = _read_again(problem, state.nu + step, there, found["drift"])
        after = moved_to(problem, state, there, step, **found)
        near = pool_is_near(problem, after) & (after.pool_bound + _hidden(problem, after.drift) <= problem.tol)
        fall = state.value - there.value
        left = torch.maximum(estimate - fall, tuning.LEFT * estimate)
        # If f falls by far more than was estimated, the estimate was too low.
        left = torch.where(fall > tuning.FORETOLD * estimate, torch.maximum(left, fall), left)
        self._judge(problem, after, there, left)
        end_by_proof(problem, state, after)
        end_by_pool(after, near)
        after.passes = state.passes + problem.passes() - reads
        return after

    def _aim(self, problem: Projection, state: DenseState, here: Point, first: bool) -> Float[Tensor, " B"]:
        """Set ``state.gradient`` and ``state.direction``; return an estimate of the gap at this point, (B,), in nats.

        In the first step from ``problem.start`` the direction is that start, and the estimate inf.
        """
        if first and problem.start is not None:
            return torch.full_like(state.value, torch.inf)
        state.gradient = problem.moments(here.p[:, None] - here.r)
        heavy = heavy_tokens(problem, int(state.steps.max()), bounded=self.certify)
        state.direction = direction(problem, state.gradient, here.p, here.r, heavy)
        return -0.5 * (state.gradient * state.direction).sum(-1)

    def _floor(
        self,
        problem: Projection,
        state: DenseState,
        here: Point,
        y: Float[Tensor, "B n v"],
        estimate: Float[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        """Return a lower bound on min f, (B,), in nats: the known one or, if better, f less a new bound on the gap.

        The gap is bounded only in rows that the bound may end.
        """
        # After the step a bound consists of its excess over the gap and of the gap's remaining share.
        near = estimate * (state.looseness - 1 + tuning.LEFT) <= problem.tol
        if not self.certify or not some(near):
            return state.floor
        rows = near.nonzero().squeeze(-1)
        some_of, (log_p, log_r) = problem.take(rows), here.take(rows).logs(problem.take(rows))
        bound = torch.full_like(log_p[:, 0], torch.inf, dtype=torch.float64)
        if math.inf not in problem.trust:
            bound = repaired_gap_bound(some_of, (log_p, log_r), y[rows]).double()
        for k in (bound.isinf() & (estimate[rows] <= _TINY * problem.tol)).nonzero().flatten().tolist():
            if time_is_over():
                break
            bound[k] = restricted_gap_bound(some_of, k, log_p[k], log_r[k], state.gradient[rows[k]])
        bound = bound.to(estimate)
        told = (bound / estimate[rows].clamp_min(torch.finfo(bound.dtype).tiny)).clamp(1.0, tuning.LOOSEST)
        state.looseness = state.looseness.index_copy(0, rows, told)
        least = here.value[rows] - bound - _hidden(problem, state.drift[rows])
        return state.floor.index_copy(0, rows, torch.maximum(state.floor[rows], least))

    def _judge(self, problem: Projection, after: DenseState, there: Point, left: Float[Tensor, " B"]) -> None:
        """Set ``gap``, ``certified``, ``done`` and ``status`` of ``after``, the state after a step, in place.

        Args:
            problem: the batch of relaxed I-projections.
            after: the state; its ``floor`` is set to -inf in rows in which the dual value proves it wrong.
            there: the point of ``after``.
            left: an estimate of the gap there, (B,), in nats, for rows without a proved bound.
        """
        # Rounding can make a bound wrong: f falling far below the floor shows that.
        after.floor = torch.where(after.value < after.floor - problem.tol, -torch.inf, after.floor)
        rounding = problem.rounding(there.p, there.r, after.z, after.nu) + _hidden(problem, after.drift)
        bound = (after.value - after.floor).clamp_min(0) + rounding
        after.certified = bound.isfinite() & self.certify
        after.gap = torch.where(after.certified, bound, left + rounding)
        reached = (after.certified | (not self.certify)) & (after.gap <= problem.tol)
        reached = problem.exactly(reached, after.log_p, after.log_r)
        given_up = (after.stalls >= _PATIENCE) & ~reached
        after.done = reached | given_up
        after.status = after.status.masked_fill(given_up, Status.NOT_CONVERGED)


def _rounded(
    problem: Projection, state: DenseState, a: Float[Tensor, "B n c"], columns: Float[Tensor, "B n c v"]
) -> dict[str, Tensor]:
    """Return ``moved``, ``blur`` and ``drift`` after a step by ``a`` along ``columns``: fields of :class:`DenseState`.

    The change is formed from its parts: the difference of the scores after and before would have the rounding of the
    scores, which the next steps, multiplying it, would let grow without bound.
    """
    parts = a.abs() * columns.abs().amax(-1)
    blur = problem.eps * parts.sum(-1)
    if a.shape[-1] > 1:
        blur = blur + a[..., 1].abs() * state.blur
    return {"moved": torch.matmul(a[:, :, None], columns)[:, :, 0], "blur": blur, "drift": state.drift + blur}


def _hidden(problem: Projection, drift: Float[Tensor, "B n"]) -> Float[Tensor, " B"]:
    """Bound by how much scores that are off by ``drift`` move the dual value against any primal one, (B,), in nats.

    It is 2 Σ_i α_i drift_i: the values differ by α_i times the error's mean under p̃ less that under r̃_i.
    """
    return 2 * (problem.alpha * drift).sum(-1)


def _read_again(
    problem: Projection, nu: Float[Tensor, "B D"], there: Point, drift: Float[Tensor, "B n"]
) -> tuple[Point, Float[Tensor, "B n"]]:
    """Return the point at ``nu`` and its drift, with scores read anew in rows in which drift may move f too far."""
    rows = (_hidden(problem, drift) > _DRIFT * problem.tol).nonzero().squeeze(-1)
    if not len(rows):
        return there, drift
    some_of = problem.take(rows)
    fresh = Point.at(some_of, some_of.scores(nu[rows]))
    return there.put(rows, fresh), drift.index_fill(0, rows, 0.0)


def dense(problem: Projection, max_steps: int, *, certify: bool = True) -> DenseState:
    """Solve every row by dense steps (:class:`DenseNewton`); return the final state, evaluated in fp64.

    Rows are done, OPTIMAL, once their gap is at most ``problem.tol``. During the steps vectors over the vocabulary are
    fp32 if ``problem.tol`` is at least 5e-5 max(1, Σ ρ_i) nats, the sum over finite trusts, and moments need not hold,
    else fp64.

    Args:
        problem: the batch of relaxed I-projections.
        max_steps: the most steps of a row.
        certify: whether a row must have a proved bound on its gap to be done; if False, an estimate is enough.
    """
    prices = max(1.0, float(problem.price.sum()))
    coarse = problem.tol >= _SINGLE * prices and not problem.moments_hold
    if not coarse:
        return iterate(DenseNewton(certify), problem, max_steps)
    found = iterate(DenseNewton(certify), replace(problem.single(), tol=_KEPT * problem.tol), max_steps)
    found = found.mapped(lambda value: value.double() if value.is_floating_point() else value)
    at = Point.at(problem, found.z)
    found.log_p, found.log_r = at.logs(problem)
    found.gap = (found.gap + at.value - found.value).clamp_min(0)
    found.value, found.free = at.value, problem.pool_gap()
    return found


def _least(
    problem: Projection, start: Point, columns: Float[Tensor, "B n c v"]
) -> tuple[Float[Tensor, "B n c"], Point]:
    """Minimise f over z + Σ_k a_ik columns_ik by Newton's method on the coefficients a; f never rises.

    Args:
        problem: the batch of relaxed I-projections.
        start: the point at z.
        columns: the scores of c directions for each member; columns_ik are those of member i in direction k.

    Returns:
        (the coefficients a, the point at which they end).
    """
    B, n, c, _ = columns.shape
    a, at = columns.new_zeros(B, n, c), start
    going = torch.ones_like(start.value, dtype=torch.bool)
    for _ in range(_COEFFICIENT_STEPS):
        H, g = _derivatives(problem, at, columns)
        # A row that has ended does not move, however many steps others take.
        step = torch.where(going[:, None], -torch.linalg.solve(H, g), 0.0).nan_to_num(0.0, 0.0, 0.0)
        promised = -0.5 * (g * step).sum(-1)
        a, at = _fallen(problem, columns, (a, at), start, step.view(B, n, c).to(a))
        going = going & (promised > _ENOUGH * (start.value - at.value))
        if not some(going):
            break
    return a, at


def _derivatives(
    problem: Projection, at: Point, columns: Float[Tensor, "B n c v"]
) -> tuple[Float[Tensor, "B k k"], Float[Tensor, "B k"]]:
    """Return (Hessian, gradient) of the dual function in the coefficients of ``columns`` at the point ``at``, fp64.

    Index i c + k belongs to direction k of member i. A small ridge is on the Hessian's diagonal.
    """
    B, n, c, v = columns.shape
    joint = (problem.alpha[:, None, None] * columns).view(B, n * c, v)
    weighted = joint * at.p[:, None]
    mean = weighted.sum(-1).double()
    H, g = torch.bmm(weighted, joint.transpose(1, 2)).double() - mean[:, :, None] * mean[:, None], mean
    weighted = columns * at.r[:, :, None]
    means = weighted.sum(-1).double()
    own = (weighted @ columns.transpose(2, 3)).double() - means[..., None] * means[..., None, :]
    for i, (alpha, gamma) in enumerate(zip(problem.alpha, problem.gamma, strict=True)):
        here = slice(i * c, (i + 1) * c)
        H[:, here, here] += alpha * gamma * own[:, i]
        g[:, here] -= alpha * means[:, i]
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(diagonal.clamp_min(0) * (1 + _RIDGE * torch.finfo(columns.dtype).eps) + _LEAST)
    return H, g


def _fallen(
    problem: Projection,
    columns: Float[Tensor, "B n c v"],
    here: tuple[Float[Tensor, "B n c"], Point],
    start: Point,
    step: Float[Tensor, "B n c"],
) -> tuple[Float[Tensor, "B n c"], Point]:
    """Return (coefficients, point) after a step, shortened until f does not rise; a row in which it always does stays.

    Args:
        problem: the batch of relaxed I-projections.
        columns: the scores of c directions for each member.
        here: (the coefficients, the point that they lead to) before the step.
        start: the point at which all coefficients are 0.
        step: the change of the coefficients to try first; each trial after it is a third as long.
    """
    (a, at), found = here, start

    def worse(t: Float[Tensor, " B"]) -> Bool[Tensor, " B"]:
        nonlocal found
        moved = a + t[:, None, None] * step
        found = Point.at(problem, start.z + torch.matmul(moved[:, :, None], columns)[:, :, 0])
        return ~(found.value <= at.value)

    t, failed = backtrack(worse, torch.ones_like(at.value), 1 / 3, _SHORTENED)
    new = a + t[:, None, None] * step
    if not some(failed):
        return new, found
    rows = failed.nonzero().squeeze(-1)
    return torch.where(failed[:, None, None], a, new), found.put(rows, at.take(rows))
