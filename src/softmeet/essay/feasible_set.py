"""The feasible set of one row, as the essay's rules see it: tokens as columns of moments, in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.essay.matrices import MomentMatrix, mapped, token_matrix
from softmeet.heads import WhitenedHead
from softmeet.rules.problem import Problem
from softmeet.simplex import prob_mean

# Principal directions of the heads together, below this share of the largest, are rounding.
_JOINT_TOLERANCE = 1e-6
# Singular values below this share of the largest count as zero when the rank of [1, A] is decided: their squares are
# still far above the rounding of a Gram matrix.
_RANK_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class FeasibleSet:
    """The distributions with every member's moments in one row, C = { p : Gᵀp = g }, in fp64."""

    problem: Problem

    @staticmethod
    def of(problem: Problem) -> list[FeasibleSet]:
        """Split a batch into its rows' feasible sets."""
        return [FeasibleSet(one) for one in replace(problem, dtype=torch.float64).rows()]

    @cached_property
    def heads(self) -> tuple[WhitenedHead, ...]:
        """Whitened views, which count what is read."""
        return self.problem.views(range(len(self.problem.heads)))

    @cached_property
    def log_p(self) -> Float[Tensor, "n v"]:
        """The members' log-probabilities in nats."""
        return self.problem.log_p[:, 0]

    @cached_property
    def log_mean(self) -> Float[Tensor, " v"]:
        """Log p̄: the probability mean on the common support, not renormalised."""
        mean = prob_mean(self.problem.log_p, self.problem.weights)[0]
        return mean.masked_fill(~self.alive, -torch.inf)

    @cached_property
    def log_q(self) -> Float[Tensor, " v"]:
        """The pool's log-probabilities in nats."""
        return self.problem.log_pool[0]

    @cached_property
    def alive(self) -> Bool[Tensor, " v"]:
        """Tokens that may be answered."""
        shared = (~self.log_p.isneginf()).all(0)
        return shared if self.problem.support is None else shared & self.problem.support

    @cached_property
    def indistinct(self) -> float:
        """Nats: the larger of ``tol`` and of what rounding of the log-probabilities as given may make of a constant."""
        return max(self.problem.tol, 2 * self.problem.precision * float(-self.log_p[:, self.alive].min()))

    @cached_property
    def ones(self) -> Float[Tensor, "v 1"]:
        """The column that keeps the sum."""
        return torch.ones_like(self.log_q)[:, None]

    @cached_property
    def tokens(self) -> MomentMatrix:
        """G = [Q_1 | … | Q_n | 1] over all tokens."""
        return token_matrix(self.heads, self.ones)

    @cached_property
    def target(self) -> Float[Tensor, " m"]:
        """The members' own moments, and 1."""
        parts = [h.moments(p[None].exp())[0][0] for h, p in zip(self.heads, self.log_p, strict=True)]
        return torch.cat([*parts, self.ones[0]])

    @cached_property
    def joint(self) -> Float[Tensor, "m r"]:
        """T with which G T has orthonormal columns on the tokens alive, but for the last, the ones.

        Directions in which the heads agree to ``_JOINT_TOLERANCE`` count once: what one head's moment says beyond the
        other's is below ``MOMENT_TOLERANCE``, and would only spoil the conditioning.
        """
        gram = self.tokens.gram(self.alive.to(self.target))
        size = gram[-1, -1]
        moments = gram[:-1, :-1] - torch.outer(gram[:-1, -1], gram[-1, :-1]) / size
        values, vectors = torch.linalg.eigh(moments)
        keep = values > max(float(values[-1]) if len(values) else 0.0, 1e-300) * _JOINT_TOLERANCE**2
        T = vectors[:, keep] / values[keep].sqrt()
        # Centred on the tokens alive, by the column of ones.
        centre = -(gram[-1, :-1] @ T) / size
        last = torch.zeros_like(self.target)
        last[-1] = 1.0
        return torch.cat([torch.cat([T, centre[None]]), last[:, None]], dim=-1)

    @cached_property
    def system(self) -> tuple[MomentMatrix, Float[Tensor, " r"]]:
        """(G T, Tᵀg): the moments as a well conditioned system; ``joint`` takes its multipliers back."""
        return mapped(self.tokens, self.joint), self.target @ self.joint

    def excess(self, p: Float[Tensor, " v"]) -> Float[Tensor, " m"]:
        """Return Gᵀp - g, by which p's moments differ from the members'."""
        return self.tokens.sums(p) - self.target

    def raw(self, y: Float[Tensor, " m"]) -> tuple[Float[Tensor, "1 _"], ...]:
        """Return multipliers of the moments in the heads' own coordinates, without that of the sum."""
        parts = y[: len(self.target) - 1].split([h.rank for h in self.heads])
        return tuple((part @ h.whitening.factor.T)[None] for h, part in zip(self.heads, parts, strict=True))

    def whitened(self, raw: tuple[Float[Tensor, " _"], ...]) -> Float[Tensor, " m"]:
        """Return the multipliers that :meth:`raw` was given, with 0 for the sum; what is not constrained is cut."""
        parts = [h.whitening.inverse @ lam.to(self.target) for h, lam in zip(self.heads, raw, strict=True)]
        return torch.cat([*parts, torch.zeros_like(self.ones[0])])

    def scores(self, y: Float[Tensor, " m"]) -> Float[Tensor, " v"]:
        """Return Σ_i λ_iᵀ(a_ij - b_i) for every token."""
        return self.tokens.times(y) - self.target @ y

    def passes(self) -> float:
        """Return the rows of A read so far, divided by v."""
        reads = sum(int(h.rows_read[0]) * h.head.d for h in self.heads)
        return reads / sum(h.head.d for h in self.heads) / len(self.log_q)

    @cached_property
    def rank(self) -> int:
        """The numerical rank of [1, A], over the tokens that may be answered."""
        values = self._spectrum[0]
        return int((values > values[-1] * _RANK_TOLERANCE**2).sum())

    @cached_property
    def unique(self) -> bool:
        """Whether at most one p has given moments: rank [1, A] is the number of tokens that may be answered."""
        size = int(self.alive.sum())
        return len(self.target) >= size and self.rank >= size

    @cached_property
    def _spectrum(self) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"], Float[Tensor, " m"]]:
        """The scaled Gram matrix of [A, 1] over the tokens that may be answered: eigenvalues, vectors, the scale."""
        G = self.tokens.gram(self.alive.to(self.target))
        scale = G.diagonal().clamp_min(torch.finfo(G.dtype).tiny).rsqrt()
        values, vectors = torch.linalg.eigh(scale[:, None] * G * scale)
        return values, vectors, scale

    def fit(self, cost: Float[Tensor, " v"]) -> Float[Tensor, " m"]:
        """Return the multipliers y for which ``cost`` - G y is nearest to a constant over the tokens alive."""
        weight = self.alive.to(self.target)
        cost = torch.where(self.alive, cost, 0.0)
        values, vectors, scale = self._spectrum
        inverse = torch.where(values > values[-1] * _RANK_TOLERANCE**2, 1 / values, 0.0)
        y = torch.zeros_like(self.target)
        for _ in range(3):  # again for the rounding of the first
            e = scale * self.tokens.sums(weight * (cost - self.tokens.times(y)))
            y = y + scale * (vectors @ (inverse * (vectors.T @ e)))
        y[-1] = 0.0
        return y

    def range_of(self, cost: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> tuple[float, float]:
        """Return (least, largest): bounds on Σ cost_j p_j for every p in C, valid for any multipliers y."""
        reduced = (cost - self.scores(y))[self.alive]
        return float(reduced.min()), float(reduced.max())


def may_be_unique(problem: Problem) -> bool:
    """Say whether the heads are wide enough for moments to determine a distribution in some row."""
    alive = (~problem.log_p.isneginf()).all(0).sum(-1)
    return 1 + sum(head.whitening(problem.settings.rank).rank for head in problem.heads) >= int(alive.min())
