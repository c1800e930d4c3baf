"""The rule ``min-reverse-cross-entropy``: empirical likelihood over the feasible set."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.essay.base import Bounds, Choice, ExactRule
from softmeet.essay.feasible_set import FeasibleSet
from softmeet.essay.points import interior_masses, with_what_is_left
from softmeet.simplex import log_normalize
from softmeet.solvers.base import Status


class MinReverseCrossEntropy(ExactRule):
    """The rule that minimises -Σ w_i p̂_iᵀ log p over the feasible set C: empirical likelihood of p̄ = Σ w_i p̂_i.

    p_j = p̄_j / (1 + λᵀ(g_j - g)), where λ maximises Σ p̄_j log(1 + λᵀ(g_j - g)), g_j being token j's moments and g the
    members' (Owen, *Empirical likelihood*, 2001, §2.9). With z_j = 1 + λᵀ(g_j - g) > 0 for every token the conditions
    are p_j z_j = p̄_j: those of a logarithmic barrier with weights p̄, so an interior-point method keeps z positive
    however small p̄_j is. p̄ is renormalised over the tokens that may have mass. If C has no point that is positive
    on them, the objective is infinite: the row is NOT_CONVERGED, and the answer is the I-projection of the pool.
    """

    name = "min-reverse-cross-entropy"
    summary = "the least cross-entropy of the members to the answer: empirical likelihood around the probability mean"

    def choose(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Choice:
        """Choose p by interior-point steps towards the optimality conditions p_j (1 + λᵀ(g_j - g)) = p̄_j.

        If the result is NOT_CONVERGED by :meth:`status`, ``member``, the I-projection of the pool onto C, is chosen.
        """
        mean = log_normalize(row.log_mean[row.alive]).exp().clamp_min(torch.finfo(row.log_q.dtype).tiny)
        target = row.system[1]
        p, found = interior_masses(row, row.alive, target, mean, barrier=mean)
        p, y = p / p.sum(), row.joint @ found.y / (target @ found.y)
        unsolved = self.status(row, p, self.proved(row, p, y)) == Status.NOT_CONVERGED
        return Choice(member if unsolved and member is not None else p, y, found.steps)

    def reached(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> float:
        """Return the objective where the moments of ``p``, (v,), are repaired, with what the rest may add to it."""
        repaired, left = with_what_is_left(row, p)
        own, mean = repaired[row.alive], log_normalize(row.log_mean[row.alive]).exp()
        steepest = float((mean / own).norm()) if left else 0.0
        return left * steepest - float(torch.special.xlogy(mean, own).sum())

    def bounds(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Bound the objective over C from below, by multipliers ``y``: Σ p̄ log(z / p̄), in nats.

        z_j = 1 + yᵀ(g_j - g); p̄ is the members' weighted mean, g_j and g are the moments of token j and of the
        members. The bound holds by Gibbs' inequality, Σ p̄ log(p z / p̄) ≤ 0, as Σ p z = 1 for p in C; it is -inf
        unless every z_j is positive. No bound from above is given: ``most`` is inf. The value, -Σ p̄ log p, is inf if
        ``p`` is 0 at a token with p̄_j > 0. Sums are over the tokens that may have mass.
        """
        log_mean = log_normalize(row.log_mean[row.alive])
        mean, z = log_mean.exp(), 1 + row.scores(y)[row.alive]
        value = -float(torch.special.xlogy(mean, p[row.alive]).sum())
        if bool((z <= 0).any()):
            return Bounds(value, -torch.inf)
        return Bounds(value, float((mean * (z.log() - log_mean)).sum()))
