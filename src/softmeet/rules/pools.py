"""The rules that read no head: two averages and the essay's unconstrained optimum."""

from __future__ import annotations

import torch

from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.answered import answered
from softmeet.rules.base import Rule
from softmeet.rules.problem import Problem
from softmeet.rules.verify import Recomputed
from softmeet.simplex import kl, log_normalize, prob_mean, weighted_log_probs


class _ClosedForm(Rule):
    def verify(self, problem: Problem, answer: Answer) -> Recomputed:
        """Evaluate the formula again."""
        again = answered(self, problem)
        return Recomputed(again.log_probs, again.gap, again.status)


class LogitMean(_ClosedForm):
    """minimise Σ w_i KL(p‖p̂_i): p ∝ Π p̂_i^{w_i}, the weighted average of logits. The essay's baseline.

    With ``free_weights`` the weights need not sum to one, and the objective is Σ w_i (-pᵀ log p̂_i) - H(p).
    """

    name = "logit-mean"
    summary = "the weighted average of the members' logits"
    is_average = True

    def solve(self, problem: Problem) -> Answer:
        """Answer in closed form."""
        scores = weighted_log_probs(problem.log_p, problem.weights)
        log_probs = problem.restricted(log_normalize(scores))
        safe = log_probs.masked_fill(log_probs.isneginf(), 0.0)
        cross = -(log_probs.exp() * scores.masked_fill(log_probs.isneginf(), 0.0)).sum(-1)
        return closed_form(problem, log_probs, cross + (log_probs.exp() * safe).sum(-1))


class ProbMean(_ClosedForm):
    """minimise Σ w_i KL(p̂_i‖p): p = Σ w_i p̂_i / Σ w_i, the weighted average of probabilities.

    Where a support is given, the average is conditioned on it, and the objective, over all tokens, is infinite.
    """

    name = "prob-mean"
    summary = "the weighted average of the members' probabilities"
    is_average = True

    def solve(self, problem: Problem) -> Answer:
        """Answer in closed form."""
        log_probs = problem.restricted(prob_mean(problem.log_p, problem.weights))
        objective = torch.zeros_like(log_probs[:, 0])
        for member, weight in zip(problem.log_p, (problem.weights / problem.weights.sum()).tolist(), strict=True):
            if weight:
                objective = objective + weight * kl(member, log_probs)
        return closed_form(problem, log_probs, objective)


class OneHot(_ClosedForm):
    """minimise -Σ w_i pᵀ log p̂_i over the simplex: one-hot at argmax_j Σ w_i log p̂_ij.

    The essay's linear program without its constraints. The first of several maximal tokens is taken.
    """

    name = "one-hot"
    summary = "all mass on the token of the largest average logit"
    can_assign_zeros = True

    def solve(self, problem: Problem) -> Answer:
        """Answer in closed form."""
        scores = weighted_log_probs(problem.log_p, problem.weights)
        best = problem.restricted(log_normalize(scores)).argmax(-1, keepdim=True)
        log_probs = torch.full_like(scores, -torch.inf).scatter(-1, best, 0.0)
        return closed_form(problem, log_probs, -scores.gather(-1, best).squeeze(-1))
