"""The solution that ``combine`` returns: distributions with their status, gap and costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead
from softmeet.rules.answer import Answer
from softmeet.rules.problem import Problem, Start
from softmeet.rules.settings import rule_of
from softmeet.rules.validate import restate
from softmeet.rules.verify import Verification, residuals, verify
from softmeet.simplex import log_normalize
from softmeet.solvers.base import Status, StoppedBy, unfinished


@dataclass(frozen=True, eq=False)
class Solution:
    """The next-token distribution p of each row, with its status, gap and costs; in nats unless said otherwise.

    Attributes:
        log_probs: log p, (*batch, v), in the dtype of the input (fp32 for half precision).
        status: :class:`softmeet.Status` as int, (*batch); in rows with ``fallback`` INFEASIBLE, or
            NOT_CONVERGED or BUDGET if the fallback did not reach ``tol``.
        fallback: whether the row has no feasible distribution and ``on_infeasible`` answered it, (*batch).
        gap: how far the objective can be from its optimum, (*batch); in rows with ``fallback``, the fallback's.
        gap_is_certified: whether ``gap`` is a bound, proved up to round-off, rather than an estimate, (*batch).
        objective: the value of the rule's objective, (*batch); for ``meet`` and ``max-entropy`` a lower bound of it
            within ``gap``. A squared distance for ``least-squares``, squared nats for ``min-squared-cross-entropy``,
            log t for ``min-underestimation``.
        objective_range: proved bounds on the least and the largest value of the objective over the feasible set,
            (2, *batch); infinite if none is known, NaN for rules that do not choose from that set.
        num_steps: the solver's steps, the fallback's included, (*batch); 0 in gated rows and for closed forms.
        num_passes: how often all heads were read, (*batch): Σ_i d_i k_i / (v Σ_i d_i), with k_i rows of W_i, (v, d_i),
            read. The fallback's reads count; reads by ``residual`` and ``verify`` do not. 0 in gated rows.
        disagreement: KL(r_i‖p̂_i), with r_i member i's corrected distribution, (n, *batch).
        disagreement_is_bound: whether there is no r_i and ``disagreement`` is the upper bound KL(p‖p̂_i), (n, *batch).
        gated: whether a gate was closed, (*batch): ``status``, ``gap`` (inf if unknown) and ``objective`` then describe
            the gate's answer; ``verify`` checks it against the rule.
        stopped_by: :class:`softmeet.StoppedBy` as int, (*batch): ``GAP`` if the rule's own distribution is the answer,
            ``POOL`` if the pool q is, being proved to be within ``tol`` of the optimum p° by KL(q‖p°), ``GATE`` if a
            gate was closed, ``BUDGET`` if the steps or the time ended first.
        seconds: the time that the rule took for all rows that no gate closed, without the gate's and the fallback's.
        claims: of m readers that know when they know, the share that each took of the rule's answer, (m, *batch), which
            ``log_probs`` contain and all else leaves out; None if there are none.
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
    disagreement: Float[Tensor, " n *batch"]
    disagreement_is_bound: Bool[Tensor, " n *batch"]
    gated: Bool[Tensor, "*batch"]
    stopped_by: Int[Tensor, "*batch"]
    seconds: float
    _answer: Answer = field(repr=False)
    _problem: Problem = field(repr=False)
    claims: Float[Tensor, " m *batch"] | None = None

    def __repr__(self) -> str:
        """Return the rule, the shape, the number of rows of each status and of fallbacks, and the largest gap."""
        counts = Counter(Status(k).name for k in self.status.flatten().tolist())
        ends = ", ".join(f"{n} {name}" for name, n in counts.items())
        instead = f", {int(self.fallback.sum())} answered by the fallback" if self.fallback.any() else ""
        shape, gap = tuple(self.log_probs.shape), self.gap.max().item() if self.gap.numel() else 0.0
        return f"Solution({self.rule!r}, log_probs {shape}: {ends}{instead}, gap at most {gap:.1e} nats)"

    @cached_property
    def residual(self) -> Float[Tensor, " n *batch"]:
        """The distance ‖Q_iᵀ(p - p̂_i)‖ of p from each member's moments, (n, *batch), Q_i being its whitened head.

        Computed when first used, by reading every head once.
        """
        return residuals(self._problem, self._answer.log_probs).reshape(len(self.disagreement), *self.status.shape)

    @property
    def rule(self) -> str:
        """The rule's text, such as ``meet`` or ``least-squares:metric=raw``."""
        return str(self._problem.settings.rule)

    @property
    def proof(self) -> tuple[Float[Tensor, "*batch _"], ...]:
        """For each member i, its part λ_i of a Farkas proof that no p has the moments of all members, (*batch, d_i).

        It proves this by max_j Σ_i λ_iᵀ(a_ij - W_iᵀp̂_i) < 0, with a_ij row j of the head W_i, scaled by the slope of a
        soft-cap. Zeros in rows without a proof.
        """
        return tuple(ray.reshape(*self.status.shape, -1) for ray in self._answer.ray)

    @property
    def remark(self) -> str:
        """A sentence on why the objective is constant on the feasible set, if a row is DEGENERATE; else empty."""
        degenerate = bool((self.status == Status.DEGENERATE).any())
        return self._problem.settings.rule.why_degenerate(self._problem) if degenerate else ""

    @property
    def relaxed(self) -> bool:
        """Whether an option ``slack`` of the rule loosens the constraint of moments."""
        return getattr(self._problem.settings.rule, "slack", 0) > 0

    @property
    def problem(self) -> Problem:
        """The problem that the rule solved, with one batch dimension of B rows, in fp64."""
        return self._problem

    @property
    def pool(self) -> Float[Tensor, "*batch v"]:
        """The pool q as log-probabilities in nats: the weighted average that ``meet`` and ``max-entropy`` tilt.

        Raises:
            DisjointSupportError: if in some row no token of the support has positive probability under every member.
        """
        return self._problem.log_pool.to(self.log_probs.dtype).reshape(self.log_probs.shape)

    def as_start(self, heads: Sequence[SoftmaxHead], log_p: Float[Tensor, "n B v"]) -> Start:
        """Return this solution's dual variables, from which solvers of another problem may begin.

        Args:
            heads: the other problem's heads, used for their number and widths d_i alone.
            log_p: the other problem's log-probabilities in nats, for their shape, dtype and device alone.

        Raises:
            InvalidInputError: if this solution's rule has ``Rule.tilts_pool`` False (its answers are not proportional
                to q exp(Σ_i W_i λ_i)), or the other problem differs in the number of rows or members, or in the widths
                of heads.
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
        """Return this solution's answer, with steps and passes 0, to serve as the fallback of another problem.

        Args:
            problem: the other problem, some of whose rows may have no feasible distribution. It has to have the same
                heads, which is not checked.

        Raises:
            InvalidInputError: if this solution's rule is not the one that ``problem.settings.on_infeasible`` names
                (``meet`` without options), a gate was closed in one of its rows, its log-probabilities, support,
                weights, trusts or ``pool`` differ from the other problem's with infinite
                trusts replaced by 0.3, or its ``tol`` is larger.
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
        """Return a copy with ``log_probs`` of p^(1/temperature), normalised; all other fields still describe p.

        ``temperature`` is a positive number, which is not checked. At one that is too small for floating-point numbers
        all mass is on the most probable tokens.
        """
        return replace(self, log_probs=_powered(self.log_probs, 1 / self.gap.new_tensor(temperature)))

    def _plain(self) -> Float[Tensor, "B v"]:
        """Return the distributions at temperature 1, log p in nats, fp64, as :meth:`verify` judges them.

        Rows that were not altered are the answer's own, from before they were rounded to the dtype of the input.
        """
        own, given = self._answer.log_probs, self.log_probs.reshape(self._answer.log_probs.shape)
        settings = self._problem.settings
        # The first member alone answers at temperature 1.
        alone = settings.gate is not None and settings.gate.first_alone
        plain = self.gated.reshape(-1, 1) if alone else torch.zeros_like(own[:, :1]) > 0
        temperature = own.new_tensor(settings.rule_temperature).where(~plain, torch.ones_like(own[:, :1]))
        same = (given == _powered(own.to(given.dtype), 1 / temperature)).all(-1, keepdim=True)
        return torch.where(same, own, _powered(given.double(), temperature))

    def verify(
        self,
        heads: Sequence[SoftmaxHead | Tensor | ArrayLike],
        log_probs: Float[Tensor, "n *batch v"] | ArrayLike,
        *,
        logits: Tensor | ArrayLike | None = None,
    ) -> Verification:
        """Compute residual, gap and status again, in fp64, from the members and this solution, without the solver.

        The solution's distributions, dual variables and proofs are checked as they stand, even if ``self.log_probs``
        was altered; all figures are those of the distributions before ``rule_temperature`` was applied.

        Args:
            heads: those that :func:`softmeet.combine` was given for this solution.
            log_probs: those that it was given.
            logits: those that it was given, if any.

        Returns:
            The figures of each row, (*batch). Rows with ``fallback`` are checked by the fallback, all others, gated
            ones included, by the rule.

        Raises:
            InvalidInputError: if an argument is one that ``combine`` would refuse, or the number of members, rows or
                tokens, or a head's width, differs from this solution's.
            RuleError: if the rule fails in recomputing its answer.
        """
        problem = restate(self._problem, heads, log_probs, logits)
        answer = replace(self._answer, log_probs=self._plain())
        return verify(problem, answer, self.fallback.reshape(-1)).reshape(self.status.shape)


def _powered(log_p: Float[Tensor, "*b v"], power: Float[Tensor, "*b 1"]) -> Float[Tensor, "*b v"]:
    """Return the log-probabilities of p^power, normalised, in nats and in the dtype of ``log_p``; at power 1 p itself.

    ``power``, fp64, is positive and may be inf; where it is huge all mass is on the most probable tokens.
    """
    scores = log_p.double()
    scores = scores - scores.amax(-1, keepdim=True)
    found = log_normalize(torch.where(scores == 0, 0.0, scores * power)).to(log_p.dtype)
    return torch.where(power == 1, log_p, found)


def from_answer(
    problem: Problem,
    answer: Answer,
    which: tuple[Bool[Tensor, " B"], Bool[Tensor, " B"]],
    seconds: float,
    shape: torch.Size,
    dtype: torch.dtype,
) -> Solution:
    """Build the solution from an answer, whose B rows get the caller's batch dimensions back.

    Args:
        problem: the problem that was solved.
        answer: the answer to its B rows.
        which: two bool masks, (B,): (True in rows that the fallback answered, True in rows that the gate closed).
        seconds: the time that the rule took for all rows.
        shape: the batch dimensions, of B elements in all.
        dtype: the dtype of the solution's ``log_probs``; other floating fields keep that of ``answer``.
    """
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
    found = torch.where(answer.by_pool, int(StoppedBy.POOL), int(StoppedBy.GAP))
    found = torch.where(unfinished(answer.status), int(StoppedBy.BUDGET), found)
    return torch.where(gated, int(StoppedBy.GATE), found)
