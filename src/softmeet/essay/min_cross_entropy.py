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

    Without bias, soft-cap, free direction or slack it chooses nothing: on C the objective is Σ w_i H(p̂_i). The same
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
        """Return the cost c = -Σ w_i log p̂_i of each token, (v,); it does not depend on ``p``."""
        log_p = row.log_p.masked_fill(~row.alive, 0.0)
        cost: Tensor = -(row.problem.weights[:, None] * log_p).sum(0)
        return cost

    def is_constant(self, row: FeasibleSet) -> bool:
        """Return whether the cost -Σ w_i log p̂_i is a combination of the tokens' moments, up to ``tol`` or rounding.

        Then it is constant on the feasible set. The test is a least-squares fit.
        """
        cost = self.gradient(row, row.log_q)
        low, high = row.range_of(cost, row.fit(cost))
        return high - low <= row.indistinct

    def optimum(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Optimum:
        """Solve the linear program for one row; ``member`` is some distribution in C, or None with ``slack``."""
        return self.extremes(row, self.gradient(row, row.log_q), member)

    def most(self, row: FeasibleSet, member: Float[Tensor, " v"]) -> float:
        """Return the largest cost over the feasible set C, by the linear program with the opposite cost.

        ``member`` is some distribution in C.
        """
        cost = self.gradient(row, row.log_q)
        return float(cost @ self.extremes(row, -cost, member).p)

    def bounds(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Bound the objective over C by linear duality at the multipliers ``y``; no upper bound with ``slack``."""
        cost = self.gradient(row, p)
        low, high = row.range_of(cost, y)
        paid, gained = self.off(row, p, y)
        return Bounds(float(cost @ p) + paid, low - gained, high if self.constrained(row.problem) else torch.inf)
