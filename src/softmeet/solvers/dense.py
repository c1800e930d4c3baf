"""Newton's method on the dual of a relaxed I-projection in few dense steps: no sampling, and every row in one product.

A step reads the heads twice: for the gradient, and for the scores of a direction found by conjugate gradients on the
curvature of the heaviest tokens, exactly, and of all others as :mod:`softmeet.solvers.tail` has it. Then f is minimised
over that direction and the last step, of each member by itself (:mod:`softmeet.solvers.least`). A poor direction costs
a step and nothing else: f never rises. A third read bounds what is left where that may end a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.solvers.base import Solver, Status, iterate, some
from softmeet.solvers.certificate import restricted_gap_bound
from softmeet.solvers.dual import DualState, end_by_pool, look_for_a_proof, pool_is_near, start
from softmeet.solvers.heavy import direction
from softmeet.solvers.least import least
from softmeet.solvers.point import Point
from softmeet.solvers.projection import Projection
from softmeet.solvers.repaired import repaired_gap_bound

# Elements of one row's vectors over the vocabulary, and how many all rows of a step may have: 512 MiB in fp32.
_VECTORS, _ELEMENTS = 16, 1 << 27
# Steps in a row without progress after which a row gives up.
_PATIENCE = 2
# By how much a bound exceeds the estimated gap, before the first one tells, and at the most that is believed of one.
_LOOSE, _LOOSEST = 1.5, 8.0
# Where it is this share of one, a bound is worth a system of all members' columns.
_TINY = 0.1
# The least share of its estimated gap that a row is taken to have left after a step.
_LEFT = 0.25
# So many times the estimated gap is more than f can fall by, if the estimate is right.
_FORETOLD = 2.0
# The tolerance that vectors in fp32 can tell, per unit of price, and the share of it that they are to reach.
_SINGLE, _KEPT = 5e-5, 0.98


@dataclass
class DenseState(DualState):
    """``floor``: f is proved to be nowhere below it; ``looseness``: the last bound over the estimated gap; ``moved``,
    ``step``: the last step's scores and its ν; ``stalls``: steps in a row without progress.
    """

    floor: Float[Tensor, " B"]
    looseness: Float[Tensor, " B"]
    moved: Float[Tensor, "B n v"]
    step: Float[Tensor, "B D"]
    stalls: Int[Tensor, " B"]


@dataclass(frozen=True)
class DenseNewton(Solver[Projection, DenseState]):
    """See the module's docstring.

    Args:
        certify: end a row on a bound; else on the estimate of its gap, which proves nothing.
    """

    certify: bool = True

    def init(self, problem: Projection) -> DenseState:
        """Begin at the pool, where no head has been read."""
        pool = start(problem)
        pool["certified"] &= pool["done"] | self.certify
        return DenseState(
            **pool,
            floor=-pool["gap"],
            looseness=torch.full_like(pool["gap"], _LOOSE),
            moved=torch.zeros_like(pool["z"]),
            step=torch.zeros_like(pool["nu"]),
            stalls=torch.zeros_like(pool["steps"]),
        )

    def take(self, problem: Projection, rows: Int[Tensor, " k"]) -> Projection:
        """Cut the problem to some rows of its batch."""
        return problem.take(rows)

    def rows_at_once(self, problem: Projection) -> int:
        """As many as a step has room for."""
        return max(1, _ELEMENTS // (_VECTORS * max(1, problem.log_p.shape[1:].numel())))

    def step(self, problem: Projection, state: DenseState) -> DenseState:
        """One step of every row, and a look at what is left."""
        reads, first = problem.passes(), not state.steps.any()
        here = Point.at(problem, state.z)
        estimate = self._aim(problem, state, here, first)
        y = problem.scores(state.direction)
        floor = self._floor(problem, state, here, y, estimate)
        columns, steps = torch.stack([y, state.moved], dim=2), torch.stack([state.direction, state.step], dim=-1)
        if first:
            columns, steps = columns[:, :, :1], steps[..., :1]
        a, there = least(problem, here, columns)
        step = (problem.spread_rows(a) * steps).sum(-1)
        log_p, log_r = there.logs(problem)
        after = replace(
            state,
            steps=state.steps + 1,
            nu=state.nu + step,
            z=there.z,
            value=there.value,
            log_p=log_p,
            log_r=log_r,
            floor=floor,
            moved=there.z - state.z,
            step=step,
            stalls=torch.where(there.value < state.value, 0, state.stalls + 1),
        )
        near = pool_is_near(problem, after)
        fall = state.value - there.value
        left = torch.maximum(estimate - fall, _LEFT * estimate)
        # Where f falls by far more than was foretold, an estimate is not to be believed.
        left = torch.where(fall > _FORETOLD * estimate, torch.maximum(left, fall), left)
        self._judge(problem, after, there, left)
        if math.inf in problem.trust:
            look_for_a_proof(problem, state, after)
        end_by_pool(after, near)
        after.passes = state.passes + problem.passes() - reads
        return after

    def _aim(self, problem: Projection, state: DenseState, here: Point, first: bool) -> Float[Tensor, " B"]:
        """Set the gradient and the direction, the start's where there is one; an estimate of the gap."""
        if first and problem.start is not None:
            return torch.full_like(state.value, torch.inf)
        parts = zip(problem.heads, problem.alpha, range(len(problem.heads)), strict=True)
        state.gradient = torch.cat([alpha * h.moments(here.p - here.r[:, i])[0] for h, alpha, i in parts], dim=-1)
        state.direction = direction(problem, state.gradient, here.p, here.r, int(state.steps.max()))
        return -0.5 * (state.gradient * state.direction).sum(-1)

    def _floor(
        self,
        problem: Projection,
        state: DenseState,
        here: Point,
        y: Float[Tensor, "B n v"],
        estimate: Float[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        """What f is nowhere below, with a bound on the gap where that may end a row."""
        # What is left of a bound once f has fallen is what the bound exceeded the gap by, and a share of the gap.
        near = estimate * (state.looseness - 1 + _LEFT) <= problem.tol
        if not self.certify or not some(near):
            return state.floor
        rows = near.nonzero().squeeze(-1)
        some_of, p, r, gradient = problem.take(rows), here.p[rows], here.r[rows], state.gradient[rows]
        sizes = gradient.norm(dim=-1), state.direction[rows].norm(dim=-1)
        bound = torch.full_like(p[:, 0], torch.inf)
        if math.inf not in problem.trust:
            bound = repaired_gap_bound(some_of, p, r, y[rows], sizes)
        for k in (bound.isinf() & (estimate[rows] <= _TINY * problem.tol)).nonzero().flatten().tolist():
            bound[k] = restricted_gap_bound(some_of, k, p[k], r[k], gradient[k])
        told = (bound / estimate[rows].clamp_min(torch.finfo(bound.dtype).tiny)).clamp(1.0, _LOOSEST)
        state.looseness = state.looseness.index_copy(0, rows, told)
        return state.floor.index_copy(0, rows, torch.maximum(state.floor[rows], here.value[rows] - bound))

    def _judge(self, problem: Projection, after: DenseState, there: Point, left: Float[Tensor, " B"]) -> None:
        """Set ``gap``, ``certified``, ``done`` and ``status``; ``left`` estimates the gap."""
        # Rounding can spoil a bound: where f falls far below it, it is none.
        after.floor = torch.where(after.value < after.floor - problem.tol, -torch.inf, after.floor)
        rounding = problem.rounding(there.p, there.r, after.z, after.nu)
        bound = (after.value - after.floor).clamp_min(0) + rounding
        after.certified = bound.isfinite() & self.certify
        after.gap = torch.where(after.certified, bound, left + rounding)
        reached = (after.certified | (not self.certify)) & (after.gap <= problem.tol)
        given_up = (after.stalls >= _PATIENCE) & ~reached
        after.done = reached | given_up
        after.status = after.status.masked_fill(given_up, Status.NOT_CONVERGED)


def dense(problem: Projection, max_steps: int, *, certify: bool = True) -> DenseState:
    """Run :class:`DenseNewton`, its vectors in fp32 where that tells a gap of ``tol``, and evaluate the end in fp64.

    Args:
        problem: the projection.
        max_steps: steps a row, at most.
        certify: as there.
    """
    prices = max(1.0, float(problem.price.sum()))
    coarse = problem.tol >= _SINGLE * prices
    if not coarse:
        return iterate(DenseNewton(certify), problem, max_steps)
    found = iterate(DenseNewton(certify), replace(problem.single(), tol=_KEPT * problem.tol), max_steps)
    for f in fields(found):
        value = getattr(found, f.name)
        setattr(found, f.name, value.double() if value.is_floating_point() else value)
    at = Point.at(problem, found.z)
    found.log_p, found.log_r = at.logs(problem)
    found.gap = (found.gap + at.value - found.value).clamp_min(0)
    found.value, found.free = at.value, problem.pool_gap()
    return found
