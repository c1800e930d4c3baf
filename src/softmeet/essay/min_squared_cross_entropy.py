"""The essay's quadratic program: the rule ``min-squared-cross-entropy``."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.essay.base import Bounds
from softmeet.essay.column_generation import Optimum
from softmeet.essay.cross_entropy import CrossEntropyRule
from softmeet.essay.feasible_set import FeasibleSet


class MinSquaredCrossEntropy(CrossEntropyRule):
    """The rule that minimises Σ w_i (pᵀ log p̂_i)² over the feasible set C: a convex quadratic program of rank n.

    Without bias, soft-cap or slack it chooses nothing, as every pᵀ log p̂_i is constant on C. The
    largest value over C is bounded by Σ w_i (largest -pᵀ log p̂_i over C)², from n linear programs; the bound is
    attained if n = 1.
    """

    name = "min-squared-cross-entropy"
    summary = "the least squares of the cross-entropies, a quadratic program; constant, or zeros, like the linear one"

    def gradient(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """Return the gradient of Σ w_i (pᵀ log p̂_i)² at ``p``, 2 Σ w_i (pᵀ log p̂_i) log p̂_i, (v,), in nats².

        Tokens that may not have mass (outside ``row.alive``) have 0.
        """
        return 2 * (row.problem.weights * (row.finite_log_p @ p)) @ row.finite_log_p

    def _ranges(self, row: FeasibleSet) -> list[tuple[float, float]]:
        """Return for every member (lower, upper) bounds on pᵀ log p̂_i over C, by its best fit by moments."""
        return [row.range_of(own, row.fit(own)) for own in row.finite_log_p]

    def _ends(self, row: FeasibleSet) -> tuple[float, float]:
        """Return (lower, upper) bounds on the objective over C, by the best fits of the log p̂_i by moments."""
        ranges, weights = self._ranges(row), row.problem.weights.tolist()
        least = sum(w * min(high, 0.0) ** 2 for w, (_, high) in zip(weights, ranges, strict=True))
        return least, sum(w * low**2 for w, (low, _) in zip(weights, ranges, strict=True))

    def is_constant(self, row: FeasibleSet) -> bool:
        """Return whether the objective is proved constant on C.

        Each log p̂_i is fitted by moments, with least squares (:meth:`FeasibleSet.fit`), which bounds pᵀ log p̂_i over C
        from both sides. The objective counts as constant if these bounds confine it to a range of at most ``tol``, or
        confine every pᵀ log p̂_i to one of at most :attr:`FeasibleSet.indistinct`.
        """
        least, most = self._ends(row)
        return most - least <= row.problem.tol or all(high - low <= row.indistinct for low, high in self._ranges(row))

    def optimum(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Optimum:
        """Minimise Σ w_i (pᵀ log p̂_i)² over the feasible set C of one row, a quadratic program; return its optimum.

        ``member`` is some distribution in C, probabilities, (v,); None with ``slack``, whose penalty is added. The
        squares enter as soft constraints, by one further column √w_i log p̂_i of G per member.
        """
        extra = (row.problem.weights.sqrt()[:, None] * row.finite_log_p).T
        return self.extremes(row, torch.zeros_like(row.log_q), member, extra)

    def most(self, row: FeasibleSet, member: Float[Tensor, " v"]) -> float:
        """Return an upper bound on the objective over the feasible set C: Σ w_i (largest -pᵀ log p̂_i over C)².

        It takes one linear program per member of the ensemble. ``member`` is some distribution in C, probabilities,
        (v,).
        """
        largest = [-float(own @ self.extremes(row, own, member).p) for own in row.finite_log_p]
        return float(sum(w * x**2 for w, x in zip(row.problem.weights.tolist(), largest, strict=True)))

    def bounds(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Bound the objective Σ w_i (pᵀ log p̂_i)² over the feasible set C; from below by multipliers ``y`` of Gᵀp = g.

        The lower bound is that of the tangent at ``p`` by linear duality, as a convex function lies above its tangents.
        The upper one, which does not depend on ``y``, follows from bounds on each pᵀ log p̂_i. With ``slack`` the terms
        of :meth:`off` are added to the value and subtracted from the lower bound, and the upper one is inf.
        """
        value = float((row.problem.weights * (row.finite_log_p @ p).square()).sum())
        low, _ = row.range_of(self.gradient(row, p), y)
        paid, gained = self.off(row, p, y)
        most = self._ends(row)[1] if self.constrained(row.problem) else torch.inf
        return Bounds(value + paid, low - value - gained, most)
