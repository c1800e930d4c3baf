"""The output of a rule for a batch of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.rules.problem import Problem
from softmeet.simplex import kl
from softmeet.solvers.base import Status
from softmeet.solvers.batched import Batched


@dataclass
class Answer(Batched):
    """A rule's answer to the B rows of a problem with n members: a distribution p for each row, and facts about it.

    A rule makes it in ``solve``: by :func:`closed_form`, or with every field, on the device of ``problem.log_p``;
    ``status`` and ``steps`` are int64, other numbers fp64.

    Attributes:
        log_probs: log p in nats, fp64, (B, v).
        status: :class:`softmeet.Status` as int, (B,).
        gap: how far the objective can be from its optimum, in its unit (nats for most rules), (B,).
        certified: whether ``gap`` is a proved bound rather than an estimate, (B,).
        objective: the value of the rule's objective; NaN for a rule without one, (B,).
        objective_range: the least and the largest value of the objective over the feasible set, or bounds on them,
            (B, 2); NaN for a rule that does not choose from that set.
        steps: the solver's steps, those of a second attempt or of the fallback included, (B,); 0 for a closed form.
        passes: how often all heads were read, (B,): Σ_i d_i k_i / (v Σ_i d_i), with k_i rows of W_i, (v, d_i), read.
        disagreement: KL(r_i‖p̂_i) in nats, (B, n), with r_i the distribution to which the rule corrects member i.
        disagreement_is_bound: whether ``disagreement`` is the upper bound KL(p‖p̂_i) instead, (B, n).
        dual: for each member, the dual variables λ_i in the coordinates of its head's weight W_i, (B, d_i); zeros for a
            rule without a dual. If ``Rule.tilts_pool``, p ∝ q exp(Σ_i W_i λ_i) with q the pool, unless ``by_pool``.
        ray: for each member, its part λ_i of a Farkas proof that no p has every member's moments, (B, d_i):
            max_j Σ_i λ_iᵀ(a_ij - W_iᵀ p̂_i) < 0 with a_ij row j of W_i; zeros without a proof.
        by_pool: whether the pool is the answer in place of the solver's own distribution, (B,); ``dual`` is then the
            dual point from which ``gap`` follows.
    """

    log_probs: Float[Tensor, "B v"]
    status: Int[Tensor, " B"]
    gap: Float[Tensor, " B"]
    certified: Bool[Tensor, " B"]
    objective: Float[Tensor, " B"]
    objective_range: Float[Tensor, "B 2"]
    steps: Int[Tensor, " B"]
    passes: Float[Tensor, " B"]
    disagreement: Float[Tensor, "B n"]
    disagreement_is_bound: Bool[Tensor, "B n"]
    dual: tuple[Float[Tensor, "B _"], ...]
    ray: tuple[Float[Tensor, "B _"], ...]
    by_pool: Bool[Tensor, " B"]


def closed_form(
    problem: Problem, log_probs: Float[Tensor, "B v"], objective: Float[Tensor, " B"] | None = None
) -> Answer:
    """Return the answer of a rule that needs no solver: every row OPTIMAL, with certified gap 0, no step, no head read.

    ``dual`` and ``ray`` are zeros, and ``disagreement`` is the bound KL(p‖p̂_i) in nats, from ``problem.log_p``.

    Args:
        problem: the problem that the rule solved.
        log_probs: the rule's distributions as log-probabilities in nats, fp64, (B, v), on the device of
            ``problem.log_p``; the returned answer holds this tensor itself.
        objective: the value of the rule's objective at each distribution, (B,); None, which becomes NaN, if the rule
            has no objective.
    """
    B, like = len(log_probs), log_probs[:, 0]
    nothing = tuple([like.new_zeros(B, head.d) for head in problem.heads])
    members = problem.log_p.transpose(0, 1)
    disagreement = kl(log_probs[:, None].expand_as(members), members)
    zeros, yes = torch.zeros_like(like), torch.ones_like(like, dtype=torch.bool)
    whole = torch.zeros(B, dtype=torch.int64, device=like.device)
    return Answer(
        log_probs=log_probs,
        status=whole + int(Status.OPTIMAL),
        gap=zeros,
        certified=yes,
        objective=torch.full_like(like, torch.nan) if objective is None else objective,
        objective_range=like.new_full((B, 2), torch.nan),
        steps=whole,
        passes=zeros.clone(),
        disagreement=disagreement,
        disagreement_is_bound=yes[:, None].expand_as(disagreement).clone(),
        dual=nothing,
        ray=tuple([part.clone() for part in nothing]),
        by_pool=~yes,
    )
