"""What a rule gives back for a batch of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.batched import Batched
from softmeet.rules.problem import Problem
from softmeet.simplex import kl
from softmeet.solvers.base import Status


@dataclass
class Answer(Batched):
    """A distribution per row of a problem, and what is known of it; every field has one row per row of the problem.

    ``dual`` holds, per member, λ_i in the head's own coordinates, (B, d_i); zeros for a rule without a dual. ``ray``
    holds such a λ with max_j Σ_i λ_iᵀ(a_ij - b_i) < 0 where the status is INFEASIBLE: the proof; zeros elsewhere.
    ``disagreement`` is KL(r_i‖p̂_i), or, where ``disagreement_is_bound``, its upper bound KL(p‖p̂_i).
    ``objective_range`` holds the least and the largest value of the objective over the feasible set, or bounds on
    them; NaN for a rule without such a set. ``by_pool`` says where the pool answers for a solver, proved to be near
    enough, with the dual point that proves it.
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
    """Make the answer of a rule that needs no solver: exact by definition, and no head was read.

    Args:
        problem: what the rule was given.
        log_probs: in nats, fp64.
        objective: of the rule, at them; NaN where it has none.
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
