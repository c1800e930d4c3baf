"""The essay's quadratic program."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.essay.base import Bounds
from softmeet.essay.column_generation import Optimum, solve_program
from softmeet.essay.cross_entropy import CrossEntropyRule
from softmeet.essay.feasible_set import FeasibleSet


class MinSquaredCrossEntropy(CrossEntropyRule):
    """minimise Σ w_i (pᵀ log p̂_i)² over C: a convex quadratic program, of rank n.

    Without bias, soft-cap, free direction or slack it chooses nothing, as every pᵀ log p̂_i is constant on C. The upper
    end of its range is Σ w_i (largest -pᵀ log p̂_i over C)², by n linear programs: a bound, attained if n = 1.
    """

    name = "min-squared-cross-entropy"
    summary = "the least squares of the cross-entropies, a quadratic program; constant, or zeros, like the linear one"

    def _sums(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> tuple[Float[Tensor, "n v"], Float[Tensor, " n"]]:
        """Return (log p̂_i on the tokens alive, pᵀ log p̂_i)."""
        log_p = row.log_p.masked_fill(~row.alive, 0.0)
        return log_p, log_p @ p

    def gradient(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """Return the gradient 2 Σ w_i (pᵀ log p̂_i) log p̂_i."""
        log_p, sums = self._sums(row, p)
        return 2 * (row.problem.weights * sums) @ log_p

    def _ranges(self, row: FeasibleSet) -> list[tuple[float, float]]:
        log_p, _ = self._sums(row, row.log_q.exp())
        return [row.range_of(own, row.fit(own)) for own in log_p]

    def _ends(self, row: FeasibleSet) -> tuple[float, float]:
        """Return (least, largest): bounds on the objective over C, by the best fits of the log p̂_i by moments."""
        ranges, weights = self._ranges(row), row.problem.weights.tolist()
        least = sum(w * min(high, 0.0) ** 2 for w, (_, high) in zip(weights, ranges, strict=True))
        return least, sum(w * low**2 for w, (low, _) in zip(weights, ranges, strict=True))

    def is_constant(self, row: FeasibleSet) -> bool:
        """Say so if every log p̂_i is a combination of moments."""
        least, most = self._ends(row)
        return most - least <= row.problem.tol or all(high - low <= row.indistinct for low, high in self._ranges(row))

    def optimum(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Optimum:
        """Solve the quadratic program, with one soft column √w_i log p̂_i per member."""
        log_p, _ = self._sums(row, row.log_q.exp())
        extra = (row.problem.weights.sqrt()[:, None] * log_p).T
        return solve_program(
            self.program(row, torch.zeros_like(row.log_q), member, extra), row.problem.settings.max_steps
        )

    def most(self, row: FeasibleSet, member: Float[Tensor, " v"]) -> float:
        """Return a bound on the largest value over C, member by member."""
        log_p, _ = self._sums(row, row.log_q.exp())
        largest = [-float(own @ self.extremes(row, own, member).p) for own in log_p]
        return float(sum(w * x**2 for w, x in zip(row.problem.weights.tolist(), largest, strict=True)))

    def bounds(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Bound the objective by linear duality at the tangent, which lies below it."""
        _, sums = self._sums(row, p)
        value = float((row.problem.weights * sums.square()).sum())
        low, _ = row.range_of(self.gradient(row, p), y)
        paid, gained = self.off(row, p, y)
        most = self._ends(row)[1] if self.constrained(row.problem) else torch.inf
        return Bounds(value + paid, low - value - gained, most)
