"""The essay's linear program: the rule ``min-cross-entropy``."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.essay.base import Bounds
from softmeet.essay.column_generation import Optimum
from softmeet.essay.cross_entropy import CrossEntropyRule
from softmeet.essay.feasible_set import FeasibleSet


class MinCrossEntropy(CrossEntropyRule):
    """The rule that minimises -Σ w_i pᵀ log p̂_i over the feasible set C, w the members' weights: a linear program.

    Without bias, soft-cap or slack it chooses nothing: on C the objective is Σ w_i H(p̂_i). The same
    holds if Σ w_i log p̂_i is in the span of [1, A], A = [W_1 | … | W_n], for any other reason. Such rows are
    DEGENERATE, which is proved by evaluation: for any multipliers y the objective lies between the least and the
    largest entry of c - G y, where c = -Σ w_i log p̂_i and G holds the tokens' moments less the members', and these are
    nearly equal for some y.
    """

    name = "min-cross-entropy"
    summary = (
        "the least cross-entropies to the members, a linear program; constant without bias, soft-cap or slack, else "
        "gives most tokens probability 0"
    )

    def gradient(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """Return the cost c = -Σ w_i log p̂_i of each token, (v,), in nats; it does not depend on ``p``.

        Tokens that may not have mass (outside ``row.alive``) have 0.
        """
        return -(row.problem.weights[:, None] * row.finite_log_p).sum(0)

    def is_constant(self, row: FeasibleSet) -> bool:
        """Return whether the objective is proved constant on the feasible set, up to :attr:`FeasibleSet.indistinct`.

        It is if the costs c = -Σ w_i log p̂_i of the tokens j that may have mass are nearly a + yᵀg_j, g_j the tokens'
        moments; a and y are found by least squares.
        """
        cost = self.gradient(row, row.log_q)
        low, high = row.range_of(cost, row.fit(cost))
        return high - low <= row.indistinct

    def optimum(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Optimum:
        """Minimise -Σ w_i pᵀ log p̂_i over the feasible set C of one row, a linear program; return its optimum.

        ``member`` is some distribution in C, probabilities, (v,); None with ``slack``, whose penalty is added.
        """
        return self.extremes(row, self.gradient(row, row.log_q), member)

    def most(self, row: FeasibleSet, member: Float[Tensor, " v"]) -> float:
        """Return the largest -Σ w_i pᵀ log p̂_i over the feasible set C, in nats, by a linear program.

        ``member`` is some distribution in C, probabilities, (v,).
        """
        cost = self.gradient(row, row.log_q)
        return float(cost @ self.extremes(row, -cost, member).p)

    def bounds(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Bound the objective over C from both sides by multipliers ``y``, (m,), of Gᵀp = g, in nats.

        The value is the objective at ``p``, probabilities, (v,). The bounds are the least and the largest c_j - yᵀ(g_j
        - g) over tokens j, c = -Σ w_i log p̂_i and g_j token j's moments. With ``slack`` the terms of :meth:`off` are
        added to the value and subtracted from the lower bound, and the upper one is inf.
        """
        cost = self.gradient(row, p)
        low, high = row.range_of(cost, y)
        paid, gained = self.off(row, p, y)
        return Bounds(float(cost @ p) + paid, low - gained, high if self.constrained(row.problem) else torch.inf)
