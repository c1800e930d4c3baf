"""Where one head makes every member's distribution, ``meet`` is an average of logits, and no head is read."""

from __future__ import annotations

import torch

from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.problem import Problem
from softmeet.simplex import kl, logit_mean
from softmeet.solvers.base import Status


def averaged(problem: Problem, trust: tuple[float, ...], weights: tuple[float, ...]) -> Answer:
    """Return the answer of ``meet`` to members p̂_i = softmax(W h_i + β) of one head, in closed form.

    With η = Σ v_i h_i, v_i = (w_i + ρ_i) / (1 + Σ ρ) and λ_i = ρ_i (h_i - η), all corrected members r_i and, but for
    the support, the answer are softmax(W η + β) = softmax(Σ v_i log p̂_i) (docs/theory/agreement.md#one-head).

    Args:
        problem: the problem, with ``states``, a logit mean of weights w_i that sum to 1 as the pool, and the
            constraints of whole heads.
        trust: ρ_i of each member, finite, not all 0.
        weights: v_i of each member.

    Returns:
        The answer, with the certified gap -Σ ρ log r(S), r(S) being the mass of r_i on the support; a row whose gap is
        above ``tol`` is NOT_CONVERGED.

    Raises:
        DisjointSupportError: if a row has no mass on the support.
    """
    log_p, rho = problem.log_p, problem.log_p.new_tensor(trust)
    log_r = logit_mean(log_p, log_p.new_tensor(weights))
    log_probs = problem.restricted(log_r)
    found = closed_form(problem, log_probs)
    if problem.support is not None:
        found.gap = -rho.sum() * log_r[:, problem.support].logsumexp(-1).clamp_max(0.0)
        found.status = found.status.masked_fill(found.gap > problem.tol, int(Status.NOT_CONVERGED))
    # p = r_i = the answer is feasible: its objective exceeds the optimum by no more than the gap.
    primal = kl(log_probs, problem.log_pool) + found.disagreement @ rho
    found.objective = (primal - found.gap).clamp_min(0.0)
    trusted = (rho > 0).expand_as(found.disagreement)
    found.disagreement = torch.where(trusted, kl(log_r.expand_as(log_p), log_p).T, found.disagreement)
    found.disagreement_is_bound = ~trusted
    states = [own.to(log_p) for own in problem.states]
    center = sum(share * own for share, own in zip(weights, states, strict=True))
    found.dual = tuple([r * (own - center) for r, own in zip(trust, states, strict=True)])
    return found
