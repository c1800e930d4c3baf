"""The rules that read no head: three averages, and the optimum of the essay's linear program without its constraints.

p̂_i are the members' distributions and w_i their weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.answered import answered
from softmeet.rules.base import Rule
from softmeet.rules.problem import Problem
from softmeet.rules.recomputed import Recomputed, reach
from softmeet.simplex import entropy, kl, log_normalize, log_power_means, logit_mean, prob_mean, weighted_log_probs
from softmeet.solvers.base import Status

# From this order on the objective of a power mean is that of order 1: 1 - Z^α, divided by 1 - α, would be all rounding.
_AS_ONE = 1 - 1e-8
# Below this order the logarithm of a sum of powers, divided by the order, would be rounded in fp32 by more than 1e-5.
_ROUNDED = 0.01


class ClosedForm(Rule):
    """A rule that is a formula, which a second look computes again."""

    def verify(self, problem: Problem, answer: Answer) -> Recomputed:
        """Compute the rule's formula for every row again; return its distribution, gap 0 and status.

        That is OPTIMAL if the answer's divergence from the formula is at most ``tol``, else NOT_CONVERGED.
        """
        again = answered(self, problem)
        near = reach(again.gap, again.log_probs, answer.log_probs) <= problem.tol
        return Recomputed(again.log_probs, again.gap, again.status.masked_fill(~near, int(Status.NOT_CONVERGED)))


class LogitMean(ClosedForm):
    """minimise Σ w_i KL(p‖p̂_i) over p: p ∝ Π p̂_i^{w_i}, the weighted average of the members' logits.

    p̂_i are the members' distributions, w_i their weights. It is the baseline of the essay that proposed the rules of
    ``softmeet.essay``. With the setting ``free_weights`` the weights need not sum to one, and the objective is
    Σ w_i (-pᵀ log p̂_i) - H(p), H the entropy.

    Weights may be below 0, which moves the answer away from a member (docs/guides/contrast.md). A token to which a
    member of nonzero weight gives probability 0 has probability 0, even if that weight is negative.

    With ``plausibility`` α above 0 only tokens x with p_e(x) ≥ α max p_e are kept, p_e being the normalised average of
    the logits of those members whose weights are positive, on the support: the constraint of contrastive decoding
    (Li et al., arXiv:2210.15097, section 3.3).
    """

    plausibility: float = Field(default=0.0, ge=0, le=1)
    """The least probability of a token, as a share of the largest, by the average of the members of positive weight;
    tokens below it get probability 0.
    """

    name = "logit-mean"
    summary = "the weighted average of the members' logits"
    is_average = True
    takes_signed_weights = True

    @property
    def can_assign_zeros(self) -> bool:  # type: ignore[override]
        """Whether ``plausibility`` is above 0, so that tokens are cut."""
        return self.plausibility > 0

    def solve(self, problem: Problem) -> Answer:
        """Return softmax(Σ w_i log p̂_i) on the support, and the objective there in nats, for every row.

        Raises:
            DisjointSupportError: if a row has no token left.
        """
        scores = self._cut(problem, weighted_log_probs(problem.log_p, problem.weights))
        log_probs = problem.restricted(log_normalize(scores))
        cross = -(log_probs.exp() * scores.masked_fill(log_probs.isneginf(), 0.0)).sum(-1)
        return closed_form(problem, log_probs, cross - entropy(log_probs))

    def aggregate(self, log_p: Float[Tensor, n * b], weights: Float[Tensor, " n"]) -> Float[Tensor, "*b"] | None:
        """Return Σ w_i log p_i; None with plausibility."""
        return None if self.plausibility else weighted_log_probs(log_p[..., None], weights).squeeze(-1)

    def quick(self, logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor | None:
        """Return Σ w_i ℓ_i of logits ℓ_i, (B, v): what normalises each member is a constant; None with plausibility."""
        if self.plausibility:
            return None
        (first, *others), (w, *rest) = logits, weights
        scores = first * w
        for own, weight in zip(others, rest, strict=True):
            scores.add_(own, alpha=weight)
        return scores

    def _cut(self, problem: Problem, scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return the scores with -inf at tokens that are not plausible; ``scores`` itself if ``plausibility`` is 0."""
        if not self.plausibility:
            return scores
        expert = problem.weights.clamp_min(0)
        likely = problem.restricted(logit_mean(problem.log_p, expert / expert.sum()))
        least = likely.amax(-1, keepdim=True) + math.log(self.plausibility)
        return scores.masked_fill(likely < least, -torch.inf)


class ProbMean(ClosedForm):
    """minimise Σ w_i KL(p̂_i‖p) over p: p = Σ w_i p̂_i / Σ w_i, the weighted average of the members' probabilities.

    p̂_i are the members' distributions, w_i their weights. If a ``support`` is given, p is the average conditional on
    it; the objective, which sums over all tokens, is then infinite if a weighted member has mass outside.
    """

    name = "prob-mean"
    summary = "the weighted average of the members' probabilities"
    is_average = True

    def solve(self, problem: Problem) -> Answer:
        """Return Σ w_i p̂_i / Σ w_i on the support, and the objective there in nats, for every row."""
        log_probs = problem.restricted(prob_mean(problem.log_p, problem.weights))
        return closed_form(problem, log_probs, _divergence_from_members(problem, log_probs))

    def aggregate(self, log_p: Float[Tensor, n * b], weights: Float[Tensor, " n"]) -> Float[Tensor, "*b"]:
        """Return log Σ w_i p_i / Σ w_i."""
        return log_power_means(log_p[..., None], weights, 1.0).squeeze(-1)

    def quick(self, logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor | None:
        """Return log Σ w_i p̂_i / Σ w_i, (B, v)."""
        return _log_mean([own.log_softmax(-1) for own in logits], weights)


def _log_mean(logs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return log Σ w_i exp(logs_i) / Σ w_i; ``logs`` are changed in place."""
    total = sum(weights)
    return reduce(torch.logaddexp, (own.add_(math.log(w / total)) for own, w in zip(logs, weights, strict=True)))


def _divergence_from_members(problem: Problem, log_probs: Float[Tensor, "B v"]) -> Float[Tensor, " B"]:
    """Return Σ w_i KL(p̂_i‖p) / Σ w_i in nats."""
    total = torch.zeros_like(log_probs[:, 0])
    for member, weight in zip(problem.log_p, (problem.weights / problem.weights.sum()).tolist(), strict=True):
        if weight:
            total = total + weight * kl(member, log_probs)
    return total


class PowerMean(ClosedForm):
    """minimise Σ w_i D(p̂_i, p) over p: p ∝ (Σ w_i p̂_i^α)^{1/α}, the power mean of order α of the probabilities.

    p̂_i are the members' distributions, w_i their weights, divided by their sum, and D(p̂, p) = (1 - Σ_j p̂_j^α p_j^{1-α})
    / (α (1 - α)). That is Amari's α-divergence, whose own α is 1 - 2α here, and p his α-integration (S. Amari,
    Integration of stochastic models by minimizing α-divergence, Neural Computation 19, 2007, pp. 2780-2796). With Z =
    Σ_j (Σ_i w_i p̂_ij^α)^{1/α} the optimum is (1 - Z^α) / (α (1 - α)).

    D tends to KL(p̂‖p) as α tends to 1, where p is that of ``prob-mean``; and to KL(p‖p̂) as α tends to 0, where p is
    that of ``logit-mean``: a token to which a member of nonzero weight gives probability 0 then has probability 0. At
    any other order such a member adds nothing to the token's mean. If a ``support`` is given, p is the power mean
    conditional on it, and optimal among the distributions on it.
    """

    order: float = Field(default=0.5, ge=0, le=1)
    """The order of the power mean: 1 is prob-mean, 0 is logit-mean."""

    name = "power-mean"
    summary = "the weighted power mean of the members' probabilities, between logit-mean and prob-mean"
    reference = "https://doi.org/10.1162/neco.2007.19.10.2780"
    is_average = True

    def solve(self, problem: Problem) -> Answer:
        """Return the power mean on the support, normalised, and the objective there, for every row.

        Raises:
            DisjointSupportError: if a row has no token left.
        """
        scores = log_power_means(problem.log_p, problem.weights, self.order)
        log_probs = problem.restricted(log_normalize(scores))
        return closed_form(problem, log_probs, self._objective(problem, scores, log_probs))

    def aggregate(self, log_p: Float[Tensor, n * b], weights: Float[Tensor, " n"]) -> Float[Tensor, "*b"]:
        """Return log (Σ w_i p_i^α / Σ w_i)^{1/α}."""
        return log_power_means(log_p[..., None], weights, self.order).squeeze(-1)

    def quick(self, logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor | None:
        """Return the logarithm of the power mean; None at an order so small that fp32 would round it."""
        if self.order < _ROUNDED:
            return None
        return _log_mean([own.log_softmax(-1).mul_(self.order) for own in logits], weights).div_(self.order)

    def _objective(
        self, problem: Problem, scores: Float[Tensor, "B v"], log_probs: Float[Tensor, "B v"]
    ) -> Float[Tensor, " B"]:
        """Return (1 - Z^α) / (α (1 - α)), log Z being what ``scores`` exceed ``log_probs`` by."""
        if self.order > _AS_ONE:
            return _divergence_from_members(problem, log_probs)
        best = log_probs.argmax(-1, keepdim=True)
        log_mass = (scores.gather(-1, best) - log_probs.gather(-1, best)).squeeze(-1)
        power = self.order * log_mass
        # (1 - e^x) / α = -log Z (e^x - 1) / x, which is -log Z at order 0.
        return (-log_mass * torch.where(power == 0, 1.0, power.expm1() / power) / (1 - self.order)).clamp_min(0.0)


class OneHot(ClosedForm):
    """minimise -Σ w_i pᵀ log p̂_i over all distributions p: all mass on the token j that maximises Σ w_i log p̂_ij.

    p̂_i are the members' distributions, w_i their weights. This is the essay's linear program without its constraints.
    Of several maximal tokens the first is taken.
    """

    name = "one-hot"
    summary = "all mass on the token of the largest average logit"
    can_assign_zeros = True

    def solve(self, problem: Problem) -> Answer:
        """Return, for every row, all mass on the maximal token of the support, and the objective there in nats."""
        scores = weighted_log_probs(problem.log_p, problem.weights)
        best = problem.restricted(log_normalize(scores)).argmax(-1, keepdim=True)
        log_probs = torch.full_like(scores, -torch.inf).scatter(-1, best, 0.0)
        return closed_form(problem, log_probs, -scores.gather(-1, best).squeeze(-1))
