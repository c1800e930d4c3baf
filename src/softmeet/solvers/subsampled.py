"""Newton's method on the dual of a relaxed I-projection, with a Hessian from some tokens of each row.

A step reads the heads once, for the exact dual value and gradient; everything between two steps works on gathered
tokens (:mod:`softmeet.solvers.look`). Directions remember the exact changes of the gradient (limited-memory BFGS around
the gathered Hessian), so that a few steps suffice, and the first step needs no read. Sub-sampled Newton: Roosta and
Mahoney, Math. Program. 174, 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.solvers.base import Status
from softmeet.solvers.dual import DualMethod, DualState, bound_after, start
from softmeet.solvers.gathered import gathered_bytes
from softmeet.solvers.look import Found, look
from softmeet.solvers.memory import Memory
from softmeet.solvers.parallel import in_parallel
from softmeet.solvers.projection import Projection

# Steps in a row without progress after which a row gives up.
_PATIENCE = 2
# Gathered rows that one look works on.
_GROUP_BYTES = 1 << 23


@dataclass
class SubsampledState(DualState):
    """``past_steps`` and ``past_changes`` of the gradient, as :class:`Memory` has them; ``stalls``: steps in a row
    without progress.
    """

    past_steps: Float[Tensor, "B m D"]
    past_changes: Float[Tensor, "B m D"]
    stalls: Int[Tensor, " B"]

    @property
    def memory(self) -> Memory:
        """The last steps."""
        return Memory(self.past_steps, self.past_changes)


@dataclass(frozen=True)
class SubsampledNewton(DualMethod[SubsampledState]):
    """See the module's docstring.

    Args:
        certify: end a row on a bound; else on the estimate of its gap, which saves a quarter of the time and proves
            nothing.
    """

    certify: bool = True

    def init(self, problem: Projection) -> SubsampledState:
        """The pool."""
        fields = start(problem)
        fields["certified"] &= fields["done"] | self.certify
        empty, stalls = Memory.blank(fields["nu"]), torch.zeros_like(fields["steps"])
        return SubsampledState(**fields, past_steps=empty.steps, past_changes=empty.changes, stalls=stalls)

    def rows_at_once(self, problem: Projection) -> int:
        """All of them: a step keeps vectors only."""
        return max(1, len(problem.log_q))

    def aim(self, problem: Projection, state: SubsampledState) -> None:
        """A first direction from gathered tokens alone."""
        if problem.start is None and not state.steps.any():
            state.direction = self._look(problem, state, None).direction

    def judge(
        self, problem: Projection, before: SubsampledState, after: SubsampledState, full: Float[Tensor, "B n v"]
    ) -> None:
        """Look around the new point: a certificate there if it seems near enough, and the next direction."""
        fall = before.value - after.value
        stalled = fall <= 0
        useful = (before.steps > 0) & ~stalled
        kept = before.memory.added(after.nu - before.nu, after.gradient - before.gradient, useful, forget=stalled)
        after.past_steps, after.past_changes = kept.steps, kept.changes
        rounding = problem.rounding(after.log_p.exp(), after.log_r.exp(), after.z, after.nu)
        found = self._look(problem, after, problem.tol - rounding)
        after.direction = found.direction
        known = bound_after(torch.where(before.certified, before.gap, torch.inf), fall, problem.tol)
        certified = torch.minimum(found.bound + rounding, known)
        after.certified = certified.isfinite()
        after.gap = torch.where(after.certified, certified, found.estimate + rounding)
        after.stalls = torch.where(stalled, before.stalls + 1, 0)
        enough = after.certified if self.certify else found.estimate >= 0
        reached = enough & (after.gap <= problem.tol)
        given_up = (after.stalls >= _PATIENCE) & ~reached
        after.done = reached | given_up
        after.status = after.status.masked_fill(given_up, Status.NOT_CONVERGED)

    def _look(self, problem: Projection, state: SubsampledState, goal: Float[Tensor, " B"] | None) -> Found:
        """What every row's gathered tokens say; ``goal`` is the bound at which a row is done, None before any gradient.

        On a processor rows go in groups that stay in the cache, on an accelerator all together.
        """
        step, device = int(state.steps.max()), state.z.device
        size = max(1, _GROUP_BYTES // gathered_bytes(problem)) if device.type == "cpu" else len(state.z)
        groups = torch.arange(len(state.z), device=device).split(size)

        def one(rows: Int[Tensor, " k"]) -> Found:
            here, wanted = state.take(rows), None if goal is None else goal[rows]
            return look(problem.take(rows), here, here.memory, step, wanted, self.certify)

        found = Found.empty(state.direction)
        for rows, answer in zip(groups, in_parallel(one, groups, device), strict=True):
            found.put(rows, answer)
        return found
