"""The feasible set of one row in the form that the essay's rules use: a linear system Gᵀp = g in fp64.

G = [Q_1 | … | Q_n | 1] has one row g_j per token and m columns: those of the whitened heads Q_i, and a column of ones
for Σp = 1. g holds the members' moments Q_iᵀp̂_i and 1. Multipliers y of this system are m numbers, the last for Σp =
1.
"""

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

# Singular values of all heads together below this share of the largest are rounding.
_JOINT_TOLERANCE = 1e-6
# Singular values below this share of the largest count as zero when the rank of [1, A] is decided: their squares are
# still far above the rounding of a Gram matrix.
_RANK_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class FeasibleSet:
    """The feasible set of one row, C = { p ≥ 0 : Gᵀp = g }: the distributions with every member's moments; fp64.

    G = [Q_1 | … | Q_n | 1], (v, m), holds the whitened heads Q_i and a column of ones; g, (m,), the members' moments
    and 1. g_j is token j's row of G. Multipliers y are one number per column of G.

    :meth:`of` makes the sets of a whole batch. The tensors are computed when first asked for, and kept.

    Args:
        problem: the problem, of exactly one row, with ``dtype`` fp64, so that products with heads are exact enough: one
            of ``Problem.rows()`` of the problem that a rule's ``solve`` is given.
    """

    problem: Problem

    @staticmethod
    def of(problem: Problem) -> list[FeasibleSet]:
        """Return the feasible sets of a batch of B rows, B of them in the order of the rows, in fp64.

        ``problem`` is such as a rule's ``solve`` is given, with products of any dtype. Nothing is computed yet.
        """
        return [FeasibleSet(one) for one in replace(problem, dtype=torch.float64).rows()]

    @cached_property
    def heads(self) -> tuple[WhitenedHead, ...]:
        """The n whitened heads Q_i of this row, in the members' order; ``rows_read`` of each counts its reads.

        Raises:
            InvalidInputError: if a head's weight, or its squares, are not finite.
        """
        return self.problem.views(range(len(self.problem.heads)))

    @cached_property
    def log_p(self) -> Float[Tensor, "n v"]:
        """The members' log-probabilities in this row, (n, v), in nats."""
        return self.problem.log_p[:, 0]

    @cached_property
    def finite_log_p(self) -> Float[Tensor, "n v"]:
        """The members' log-probabilities, (n, v), in nats, with 0 for tokens outside :attr:`alive`."""
        return self.log_p.masked_fill(~self.alive, 0.0)

    @cached_property
    def log_mean(self) -> Float[Tensor, " v"]:
        """The logarithm of the members' weighted mean Σ w_i p̂_i, (v,), in nats.

        Tokens outside :attr:`alive` have -inf; the others are not renormalised.
        """
        mean = prob_mean(self.problem.log_p, self.problem.weights)[0]
        return mean.masked_fill(~self.alive, -torch.inf)

    @cached_property
    def log_q(self) -> Float[Tensor, " v"]:
        """The pool's log-probabilities, (v,), in nats; -inf outside :attr:`alive`.

        Raises:
            DisjointSupportError: if no token is in :attr:`alive`.
        """
        return self.problem.log_pool[0]

    @cached_property
    def alive(self) -> Bool[Tensor, " v"]:
        """The tokens that may have mass, a mask (v,): those to which every member gives more than 0.

        If ``problem.support`` is given, they must also be in it.
        """
        shared = (~self.log_p.isneginf()).all(0)
        return shared if self.problem.support is None else shared & self.problem.support

    @cached_property
    def indistinct(self) -> float:
        """The largest range, in nats, over which an objective still counts as constant.

        It is the setting ``tol`` or, if larger, an estimate of the range that a constant objective gets from rounding
        of the given log-probabilities: 2 · ``problem.precision`` · the largest -log p̂_ij of tokens in :attr:`alive`.
        """
        return max(self.problem.tol, 2 * self.problem.precision * float(-self.log_p[:, self.alive].min()))

    @cached_property
    def ones(self) -> Float[Tensor, "v 1"]:
        """The column of ones, (v, 1), whose constraint is Σp = 1."""
        return torch.ones_like(self.log_q)[:, None]

    @cached_property
    def tokens(self) -> MomentMatrix:
        """The matrix G = [Q_1 | … | Q_n | 1], (v, m), of all tokens."""
        return token_matrix(self.heads, self.ones)

    @cached_property
    def target(self) -> Float[Tensor, " m"]:
        """The right-hand side g of Gᵀp = g, (m,): the members' moments Q_iᵀp̂_i, from member 0 on, and 1 at the end."""
        parts = [h.moments(p[None].exp())[0][0] for h, p in zip(self.heads, self.log_p, strict=True)]
        return torch.cat([*parts, self.ones[0]])

    @cached_property
    def joint(self) -> Float[Tensor, "m r"]:
        """A matrix T, (m, r), that makes G = [Q_1 | … | Q_n | 1] well conditioned when multiplied from the right.

        On the tokens that may have mass G T has orthonormal columns, followed by the column of ones as the last, to
        which they are orthogonal. Directions in which the heads agree to a relative 1e-6 count once, so r may be less
        than m: the difference of their moments is below ``MOMENT_TOLERANCE``, and would only make the system
        ill-conditioned.
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
        """The constraints Gᵀp = g as a well-conditioned system of r ≤ m equations, (G T)ᵀp = Tᵀg: (G T, Tᵀg).

        T, (m, r), is :attr:`joint`, G is :attr:`tokens`, [Q_1 | … | Q_n | 1], and g is :attr:`target`. The last
        equation is Σp = 1 here, too. If y are multipliers of this system, T y are multipliers of the original one.
        """
        return mapped(self.tokens, self.joint), self.target @ self.joint

    def excess(self, p: Float[Tensor, " v"]) -> Float[Tensor, " m"]:
        """Return Gᵀp - g, (m,): the whitened moments of ``p``, (v,), less the members', and at the end Σp - 1."""
        return self.tokens.sums(p) - self.target

    def raw(self, y: Float[Tensor, " m"]) -> tuple[Float[Tensor, "1 _"], ...]:
        """Convert multipliers ``y`` of Gᵀp = g, (m,), to multipliers λ_i, (1, d_i), of each member's moments W_iᵀp.

        λ_i = R_i y_i, Q_i = (W_i - 1c_iᵀ) R_i being member i's whitened head and y_i its part of ``y``. The last entry
        of ``y``, of Σp = 1, is dropped.
        """
        parts = y[: len(self.target) - 1].split([h.rank for h in self.heads])
        return tuple((part @ h.whitening.factor.T)[None] for h, part in zip(self.heads, parts, strict=True))

    def write(self, y: Float[Tensor, " m"], parts: tuple[Float[Tensor, "B _"], ...], k: int) -> None:
        """Write multipliers ``y``, as :meth:`raw` converts them, into row ``k`` of each member's part, in place."""
        for part, lam in zip(parts, self.raw(y), strict=True):
            part[k] = lam[0]

    def whitened(self, parts: tuple[Float[Tensor, "B _"], ...], k: int) -> Float[Tensor, " m"]:
        """Convert multipliers λ_i, (d_i,), of each member's moments W_iᵀp to those of Gᵀp = g, (m,), 0 at the end.

        λ_i is row ``k`` of member i's part. This inverts :meth:`write`, up to the multiplier of Σp = 1. Parts of λ_i in
        directions that the whitened head does not have are dropped.
        """
        white = [h.whitening.inverse @ part[k].to(self.target) for h, part in zip(self.heads, parts, strict=True)]
        return torch.cat([*white, torch.zeros_like(self.ones[0])])

    def scores(self, y: Float[Tensor, " m"]) -> Float[Tensor, " v"]:
        """Return yᵀ(g_j - g) for every token j, (v,): its whitened moments less the members', weighted by ``y``.

        ``y`` are multipliers of Gᵀp = g; the last, for Σp = 1, adds 0. The scores have the mean 0 under every p of the
        feasible set.
        """
        return self.tokens.times(y) - self.target @ y

    def passes(self) -> float:
        """Return how often all heads were read through :attr:`heads` since this object was made.

        Reads that build :attr:`tokens` or use it count. The result is the number of entries of [W_1 | … | W_n] that
        were read, divided by the number of all its entries.
        """
        reads = sum(int(h.rows_read[0]) * h.head.d for h in self.heads)
        return reads / sum(h.head.d for h in self.heads) / len(self.log_q)

    @cached_property
    def unique(self) -> bool:
        """Whether at most one p can have the members' moments: [1, W_1 | … | W_n] has linearly independent rows.

        Only rows of tokens that may have mass (:attr:`alive`) count. Such a p need not exist.
        """
        size = int(self.alive.sum())
        return len(self.target) >= size and int(self._spectrum[0].count_nonzero()) >= size

    @cached_property
    def _spectrum(self) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"], Float[Tensor, " m"]]:
        """(1 / eigenvalues, eigenvectors, scale) of G's Gram matrix on tokens that may have mass, at unit diagonal.

        Eigenvalues that are rounding have 0 in place of their inverses.
        """
        G = self.tokens.gram(self.alive.to(self.target))
        scale = G.diagonal().clamp_min(torch.finfo(G.dtype).tiny).rsqrt()
        values, vectors = torch.linalg.eigh(scale[:, None] * G * scale)
        return torch.where(values > values[-1] * _RANK_TOLERANCE**2, 1 / values, 0.0), vectors, scale

    def fit(self, cost: Float[Tensor, " v"]) -> Float[Tensor, " m"]:
        """Return multipliers y, (m,), for which ``cost`` - G y is nearest to a constant for all tokens (least squares).

        The multiplier of the column of ones is fitted, too, and then replaced by 0. Only tokens that may have mass
        (:attr:`alive`) count.

        Args:
            cost: a number for each token, (v,), fp64, finite on :attr:`alive`; values at other tokens are ignored.
        """
        weight = self.alive.to(self.target)
        cost = torch.where(self.alive, cost, 0.0)
        inverse, vectors, scale = self._spectrum
        y = torch.zeros_like(self.target)
        for _ in range(3):  # again for the rounding of the first
            e = scale * self.tokens.sums(weight * (cost - self.tokens.times(y)))
            y = y + scale * (vectors @ (inverse * (vectors.T @ e)))
        y[-1] = 0.0
        return y

    def range_of(self, cost: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> tuple[float, float]:
        """Return (lower, upper) bounds on Σ_j cost_j p_j over every p in the feasible set, valid for any multipliers y.

        They are the least and the largest entry of ``cost`` - ``scores(y)`` over the tokens that may have mass
        (:attr:`alive`), in the unit of ``cost``. ``cost``, (v,), is a number for each token, and ``y``, (m,), are
        multipliers of Gᵀp = g; :meth:`fit` finds a y for which the bounds are close.
        """
        reduced = (cost - self.scores(y))[self.alive]
        return float(reduced.min()), float(reduced.max())


def may_be_unique(problem: Problem) -> bool:
    """Return whether :attr:`FeasibleSet.unique` is possible in some row of the batch, judged by ranks alone.

    It is possible only if 1 + Σ_i rank(Q_i), Q_i the whitened heads, is at least the number of
    tokens to which every member gives more than 0 in the row with the fewest of them. ``problem`` must have a row.
    """
    alive = (~problem.log_p.isneginf()).all(0).sum(-1)
    return 1 + sum(head.whitening().rank for head in problem.heads) >= int(alive.min())
