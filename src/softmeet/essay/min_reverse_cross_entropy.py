"""Empirical likelihood: the member of C under which the members' own distributions are least surprising."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.essay.base import Bounds, Choice, ExactRule
from softmeet.essay.feasible_set import FeasibleSet
from softmeet.essay.interior import Program, interior_point
from softmeet.essay.matrices import subset
from softmeet.essay.max_entropy import members_of
from softmeet.simplex import log_normalize
from softmeet.solvers.base import Status


class MinReverseCrossEntropy(ExactRule):
    """minimise -Σ w_i p̂_iᵀ log p over C: empirical likelihood, with the probability mean p̄ for the data.

    p_j = p̄_j / (1 + λᵀ(g_j - g)), where λ maximises Σ p̄_j log(1 + λᵀ(g_j - g)), one domain constraint per token (Owen,
    *Empirical likelihood*, 2001, §2.9). With z_j = 1 + λᵀ(g_j - g) the conditions are p_j z_j = p̄_j: those of a
    logarithmic barrier with weights p̄, so an interior-point method stays in the domain by itself, however small p̄_j is.
    Over the tokens that may be answered, p̄ is renormalised. Where C has no positive point there is no finite value: the
    row is NOT_CONVERGED, with the I-projection of the pool for an answer.
    """

    name = "min-reverse-cross-entropy"
    summary = "the least cross-entropy of the members to the answer: empirical likelihood around the probability mean"
    exactness = 1e-2  # only whether there is one

    def choose(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Choice:
        """Choose by Newton steps towards p z = p̄."""
        ids = row.alive.nonzero().squeeze(-1)
        mean = log_normalize(row.log_mean[ids]).exp().clamp_min(torch.finfo(row.log_q.dtype).tiny)
        columns, target = row.system
        columns = columns if len(ids) == len(row.log_q) else subset(columns, ids, len(row.log_q))
        nothing = torch.zeros_like(target)
        program = Program(columns, target, torch.zeros_like(mean), nothing, mean, len(nothing) - 1, barrier=mean)
        found = interior_point(program, row.problem.settings.max_steps)
        p = torch.zeros_like(row.log_q).index_copy(0, ids, found.x)
        p, y = p / p.sum(), row.joint @ found.y / (target @ found.y)
        if member is not None and self.status(row, p, self.proved(row, p, y)) == Status.NOT_CONVERGED:
            projected = members_of(row.problem)
            return Choice(projected.log_probs[0].exp(), y, found.steps + int(projected.steps[0]))
        return Choice(p, y, found.steps)

    def bounds(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Bound the objective by Gibbs' inequality: Σ p̄ log(p z / p̄) ≤ 0 for p in C, as Σ p z = 1."""
        log_mean = log_normalize(row.log_mean[row.alive])
        mean, z = log_mean.exp(), 1 + row.scores(y)[row.alive]
        value = -float(torch.special.xlogy(mean, p[row.alive]).sum())
        if bool((z <= 0).any()):
            return Bounds(value, -torch.inf)
        return Bounds(value, float((mean * (z.log() - log_mean)).sum()))
