"""The solution that ``combine`` returns, and what is known about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead
from softmeet.rules.answer import Answer
from softmeet.rules.problem import Problem, Start
from softmeet.rules.settings import rule_of
from softmeet.rules.validate import restate
from softmeet.rules.verify import Verification, residuals, verify
from softmeet.simplex import log_normalize
from softmeet.solvers.base import Status, StoppedBy


@dataclass(frozen=True, eq=False)
class Solution:
    """A next-token distribution per row, and what is known about it. Everything is in nats.

    Attributes:
        log_probs: (*batch, v), in the dtype of the input (fp32 for half precision).
        status: :class:`softmeet.Status` as int, (*batch).
        fallback: rows that had no answer and were answered by ``on_infeasible``, (*batch).
        gap: how far the objective can be from its optimum, (*batch); of the fallback's problem where it answered.
        gap_is_certified: whether ``gap`` is a proved bound, to round-off, or an estimate, (*batch).
        objective: the rule's objective; for ``meet`` and ``max-entropy`` a lower bound within ``gap``, (*batch). For
            ``least-squares`` a squared distance, for ``min-squared-cross-entropy`` squared nats, for
            ``min-underestimation`` log t.
        objective_range: the least and the largest value of the objective over the feasible set, (2, *batch): proved
            bounds, inf where none is known; NaN for rules without such a set.
        num_steps: the solver's steps, (*batch).
        num_passes: rows of A = [W_1 | … | W_n] read, divided by v, weighted by width, (*batch); what a fallback
            read is included, what ``residual`` and ``verify`` read is not.
        disagreement: KL(r_i‖p̂_i), member i's correction, (n, *batch).
        disagreement_is_bound: where the rule has no r_i, or the row or its trust needed none: ``disagreement`` is then
            the upper bound KL(p‖p̂_i), (n, *batch).
        gated: rows that a gate closed, (*batch): its answer stands in the rule's place, and ``status``, ``gap`` (inf
            where nothing is known) and ``objective`` are of that answer; ``verify`` holds it against the rule.
        stopped_by: :class:`softmeet.StoppedBy` as int, (*batch): ``GAP`` where the answer is the rule's own, ``POOL``
            where the pool was proved to be within ``tol`` nats of it, KL(q‖p°), and answers, ``GATE``, or ``BUDGET``
            where the steps ended first.
        seconds: that the rule took, for the whole batch.
    """

    log_probs: Float[Tensor, "*batch v"]
    status: Int[Tensor, "*batch"]
    fallback: Bool[Tensor, "*batch"]
    gap: Float[Tensor, "*batch"]
    gap_is_certified: Bool[Tensor, "*batch"]
    objective: Float[Tensor, "*batch"]
    objective_range: Float[Tensor, 2 * batch]
    num_steps: Int[Tensor, "*batch"]
    num_passes: Float[Tensor, "*batch"]
    disagreement: Float[Tensor, n * batch]
    disagreement_is_bound: Bool[Tensor, n * batch]
    gated: Bool[Tensor, "*batch"]
    stopped_by: Int[Tensor, "*batch"]
    seconds: float
    _answer: Answer = field(repr=False)
    _problem: Problem = field(repr=False)

    @cached_property
    def residual(self) -> Float[Tensor, n * batch]:
        """‖Q_iᵀ(p - p̂_i)‖ in whitened coordinates, (n, *batch). Reads every head once, when first asked for."""
        return residuals(self._problem, self._answer.log_probs).reshape(len(self.disagreement), *self.status.shape)

    @property
    def rule(self) -> str:
        """The rule's text, such as ``meet`` or ``least-squares:metric=raw``."""
        return str(self._problem.settings.rule)

    @property
    def proof(self) -> tuple[Float[Tensor, "*batch _"], ...]:
        """Per member λ_i, (*batch, d_i), in the head's own coordinates, with max_j Σ_i λ_iᵀ(a_ij - W_iᵀp̂_i) < 0, rows
        scaled by the slope of a soft-cap: no distribution has the members' moments. Zeros where none was found.
        """
        return tuple(ray.reshape(*self.status.shape, -1) for ray in self._answer.ray)

    @property
    def remark(self) -> str:
        """Why nothing was chosen, in a sentence, if a row is DEGENERATE; else empty."""
        degenerate = bool((self.status == Status.DEGENERATE).any())
        return self._problem.settings.rule.why_degenerate(self._problem) if degenerate else ""

    @property
    def relaxed(self) -> bool:
        """Whether ``rank``, ``free_radial`` or ``slack`` asked the rule for less than every member's moments."""
        return self._problem.settings.rule.relaxes(self._problem)

    @property
    def problem(self) -> Problem:
        """What the rule was given, with one batch dimension, in fp64."""
        return self._problem

    @property
    def pool(self) -> Float[Tensor, "*batch v"]:
        """Log q: the pool that ``meet`` and ``max-entropy`` start from."""
        return self._problem.log_pool.to(self.log_probs.dtype).reshape(self.log_probs.shape)

    def as_start(self, heads: Sequence[SoftmaxHead], log_p: Float[Tensor, "n B v"]) -> Start:
        """Return where the search for another problem's answer, with these heads, may begin.

        Raises:
            InvalidInputError: the rule has no dual, or rows or heads are not as many or as wide.
        """
        given = [tuple(part.shape) for part in self._answer.dual]
        expected = [(log_p.shape[1], head.d) for head in heads]
        if not self._problem.settings.rule.tilts_pool or given != expected:
            raise InvalidInputError(
                f"start= takes a solution by meet or max-entropy of the same rows and heads, λ of shapes {expected}, "
                f"got one by {self.rule} with {given}: leave it out to start from the pool"
            )
        dual, ray = (tuple(part.to(log_p) for part in parts) for parts in (self._answer.dual, self._answer.ray))
        return Start(dual, ray, self._problem.trust)

    def as_fallback(self, problem: Problem) -> Answer:
        """Return what answers rows of a problem without a feasible distribution, reading no head for it.

        Raises:
            InvalidInputError: this is not the solution of that problem, relaxed, by ``meet``.
        """
        mine, other = self._problem, problem.relaxed()
        fallback = rule_of(problem.settings.on_infeasible)
        if self._problem.settings.rule != fallback or bool(self.gated.any()) or not mine.met_alike(other):
            raise InvalidInputError(
                f"on_infeasible= takes the solution by meet of the same rows and settings, with trusts {other.trust}, "
                f"no gate, got one by {self.rule} with trusts {mine.trust}: 'meet' solves what is needed"
            )
        nothing = torch.zeros_like(self._answer.passes)
        return replace(self._answer, passes=nothing, steps=torch.zeros_like(self._answer.steps))

    def at_temperature(self, temperature: float) -> Solution:
        """Return a copy with ``log_probs`` ∝ p^(1/temperature); all else is of the answer before."""
        return replace(self, log_probs=log_normalize(self.log_probs / temperature))

    def by_member(self, count: int) -> Solution:
        """Return a copy with the ``disagreement`` of each member's ``count`` copies added up."""
        split = (-1, count, *self.disagreement.shape[1:])
        total, is_bound = self.disagreement.reshape(split).sum(1), self.disagreement_is_bound.reshape(split).any(1)
        return replace(self, disagreement=total, disagreement_is_bound=is_bound)

    def verify(
        self,
        heads: Sequence[SoftmaxHead | Tensor],
        log_probs: Float[Tensor, "n *batch v"],
        *,
        logits: Tensor | None = None,
        hidden: Sequence[Tensor] | None = None,
    ) -> Verification:
        """Compute residual, gap and status again, in fp64, from the members and this answer, without the solver.

        ``log_probs`` are taken as they are here, changed or not, and with them the multipliers and proofs.

        Args:
            heads, log_probs, logits, hidden: what ``combine`` was given.

        Raises:
            InvalidInputError: as ``combine``.
        """
        problem = restate(self._problem, heads, log_probs, logits, hidden)
        answer, given = self._answer, self.log_probs.reshape(self._answer.log_probs.shape)
        # Of what is as the rule gave it, there are more digits.
        same = (given == answer.log_probs.to(given.dtype)).all(-1, keepdim=True)
        answer = replace(answer, log_probs=torch.where(same, answer.log_probs, given.double()))
        return verify(problem, answer, self.fallback.reshape(-1)).reshape(self.status.shape)


def from_answer(
    problem: Problem,
    answer: Answer,
    which: tuple[Bool[Tensor, " B"], Bool[Tensor, " B"]],
    seconds: float,
    shape: torch.Size,
    dtype: torch.dtype,
) -> Solution:
    """Give an answer its batch dimensions back; ``which`` says which rows fell back, and which were gated."""
    fallback, gated = which
    return Solution(
        log_probs=answer.log_probs.to(dtype).reshape(*shape, problem.log_p.shape[-1]),
        status=answer.status.reshape(shape),
        fallback=fallback.reshape(shape),
        gap=answer.gap.reshape(shape),
        gap_is_certified=answer.certified.reshape(shape),
        objective=answer.objective.reshape(shape),
        objective_range=answer.objective_range.T.reshape(2, *shape),
        num_steps=answer.steps.reshape(shape),
        num_passes=answer.passes.reshape(shape),
        disagreement=answer.disagreement.T.reshape(len(problem.log_p), *shape),
        disagreement_is_bound=answer.disagreement_is_bound.T.reshape(len(problem.log_p), *shape),
        gated=gated.reshape(shape),
        stopped_by=_stopped_by(answer, gated).reshape(shape),
        seconds=seconds,
        _answer=answer,
        _problem=problem,
    )


def _stopped_by(answer: Answer, gated: Bool[Tensor, " B"]) -> Int[Tensor, " B"]:
    late = (answer.status == Status.NOT_CONVERGED) | (answer.status == Status.BUDGET)
    found = torch.where(answer.by_pool, int(StoppedBy.POOL), int(StoppedBy.GAP))
    found = torch.where(late, int(StoppedBy.BUDGET), found)
    return torch.where(gated, int(StoppedBy.GATE), found)
