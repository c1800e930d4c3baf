"""Newton's method on the dual of a relaxed I-projection in few dense steps: no sampling, and every row in one product.

A step reads the heads once or twice. From the gradient a direction is found by conjugate gradients on the curvature of
the heaviest tokens, exactly, and of all others as :mod:`softmeet.solvers.tail` has it. Then f is minimised over that
direction and the last step, of each member by itself (:mod:`softmeet.solvers.least`). A poor direction costs a step and
nothing else: f never rises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.solvers.base import Solver, Status
from softmeet.solvers.certificate import restricted_gap_bound
from softmeet.solvers.dual import DualState, bound_after, end_by_pool, look_for_a_proof, pool_is_near, start
from softmeet.solvers.heavy import direction
from softmeet.solvers.least import least
from softmeet.solvers.projection import Projection
from softmeet.solvers.repaired import repaired_gap_bound
from softmeet.solvers.sweep import sweep

# Elements of one row's vectors over the vocabulary, and how many all rows of a step may have: 1 GiB in fp64.
_VECTORS, _ELEMENTS = 16, 1 << 27
# Steps in a row without progress after which a row gives up.
_PATIENCE = 2
# How many times as far f has to fall at its least for a second read.
_WORTH = 1.1
# A bound is rarely less than so many times the estimate of the gap: no use to look for one sooner.
_LOOSE = 1.5


@dataclass
class DenseState(DualState):
    """``moved`` and ``step``: the last step's scores and its ν; ``stalls``: steps in a row without progress."""

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
        """The pool."""
        fields = start(problem)
        fields["certified"] &= fields["done"] | self.certify
        return DenseState(
            **fields,
            moved=torch.zeros_like(fields["z"]),
            step=torch.zeros_like(fields["nu"]),
            stalls=torch.zeros_like(fields["steps"]),
        )

    def take(self, problem: Projection, rows: Int[Tensor, " k"]) -> Projection:
        """Some rows."""
        return problem.take(rows)

    def rows_at_once(self, problem: Projection) -> int:
        """As many as a step has room for."""
        return max(1, _ELEMENTS // (_VECTORS * max(1, problem.log_p.shape[1:].numel())))

    def step(self, problem: Projection, state: DenseState) -> DenseState:
        """One step of every row, and a look at what is left."""
        reads = problem.passes()
        if not state.steps.any():
            self._begin(problem, state)
        swept, step = sweep(problem, state.z, state.direction), state.direction
        columns, steps = torch.stack([swept.z - state.z, state.moved], dim=2), torch.stack([step, state.step], dim=-1)
        if not state.steps.any():
            columns, steps = columns[:, :, :1], steps[..., :1]
        a, z, value = least(problem, state.z, columns)
        # What the whole direction reaches is known without another read.
        rows = (state.value - value > _WORTH * (state.value - swept.value)).nonzero().squeeze(-1)
        if len(rows):
            swept = swept.put(rows, sweep(problem.take(rows), z[rows]))
            a = a[rows].repeat_interleave(torch.tensor(problem.widths, device=a.device), dim=1)
            step = step.index_copy(0, rows, (a * steps[rows]).sum(-1))
        after = replace(
            state,
            steps=state.steps + 1,
            nu=state.nu + step,
            z=swept.z,
            value=swept.value,
            gradient=swept.gradient,
            log_p=swept.log_p,
            log_r=swept.log_r,
            moved=swept.z - state.z,
            step=step,
        )
        near = pool_is_near(problem, after)
        if not near.all():
            self._judge(problem, state, after)
            if math.inf in problem.trust:
                look_for_a_proof(problem, state, after)
        end_by_pool(after, near)
        after.passes = state.passes + problem.passes() - reads
        return after

    def _begin(self, problem: Projection, state: DenseState) -> None:
        """The first direction: the start's, or from the gradient at the pool."""
        if problem.start is None:
            state.gradient = sweep(problem, state.z).gradient
            state.direction = direction(problem, state)

    def _judge(self, problem: Projection, before: DenseState, after: DenseState) -> None:
        """Choose the next direction, and with it look how far f is from its least value."""
        fall = before.value - after.value
        after.stalls = torch.where(fall <= 0, before.stalls + 1, 0)
        after.direction = direction(problem, after)
        estimate = -0.5 * (after.gradient * after.direction).sum(-1)
        rounding = problem.rounding(after.log_p.exp(), after.log_r.exp(), after.z, after.nu)
        known = bound_after(torch.where(before.certified, before.gap, torch.inf), fall, problem.tol)
        close = _LOOSE * estimate + rounding <= problem.tol
        rows = close.nonzero().squeeze(-1)
        if self.certify and len(rows):
            known[rows] = torch.minimum(known[rows], _bound(problem.take(rows), after.take(rows)) + rounding[rows])
        certified = known.isfinite() & self.certify
        after.gap, after.certified = torch.where(certified, known, estimate + rounding), certified
        reached = (certified if self.certify else close) & (after.gap <= problem.tol)
        given_up = (after.stalls >= _PATIENCE) & ~reached
        after.done = reached | given_up
        after.status = after.status.masked_fill(given_up, Status.NOT_CONVERGED)


def _bound(problem: Projection, state: DualState) -> Float[Tensor, " B"]:
    """On the gap: by each member's own repair, else by one of all of them together, a row at a time."""
    exact = math.inf in problem.trust
    bound = torch.full_like(state.gap, torch.inf) if exact else repaired_gap_bound(problem, state)
    for k in bound.isinf().nonzero().flatten().tolist():
        bound[k] = restricted_gap_bound(problem, k, state.log_p[k].exp(), state.log_r[k].exp(), state.gradient[k])
    return bound
