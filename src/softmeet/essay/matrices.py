"""The moments of tokens as a matrix with one row per variable: products, and the weighted Gram matrix, in fp64.

Interior-point methods need nothing else of the heads. Few tokens are held as a matrix; all tokens of large heads are
read in blocks, so that no copy of a head is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from softmeet.heads import WhitenedHead
from softmeet.solvers.linalg import gram

# Elements of a matrix that is held rather than read again: 512 MiB in fp64.
_HELD = 1 << 26
# The share of a Gram matrix's trace that rounding hides.
_LOST = 1e-18
# Rows of a block of a Gram matrix: what stays in a core's cache.
_ROWS = 4096


class MomentMatrix(ABC):
    """G, (N, m): one row per variable of a program whose constraints are Gᵀx = g."""

    @abstractmethod
    def times(self, y: Float[Tensor, " m"]) -> Float[Tensor, " N"]:
        """Return G y."""

    @abstractmethod
    def sums(self, x: Float[Tensor, " N"]) -> Float[Tensor, " m"]:
        """Return Gᵀ x."""

    @abstractmethod
    def gram(self, theta: Float[Tensor, " N"]) -> Float[Tensor, "m m"]:
        """Return Σ_j θ_j g_j g_jᵀ."""

    @abstractmethod
    def rows(self, variables: Int[Tensor, " k"]) -> Float[Tensor, "k m"]:
        """Return some rows of G."""


class DenseMatrix(MomentMatrix):
    """A matrix in memory."""

    def __init__(self, matrix: Float[Tensor, "N m"]) -> None:
        self.matrix = matrix

    def times(self, y: Float[Tensor, " m"]) -> Float[Tensor, " N"]:
        """Return G y."""
        return self.matrix @ y

    def sums(self, x: Float[Tensor, " N"]) -> Float[Tensor, " m"]:
        """Return Gᵀ x."""
        return x @ self.matrix

    def gram(self, theta: Float[Tensor, " N"]) -> Float[Tensor, "m m"]:
        """Return Σ_j θ_j g_j g_jᵀ."""
        matrix, some = self.matrix, _counting(theta, self.lengths)
        if 2 * len(some) <= len(theta):
            matrix, theta = matrix[some], theta[some]
        total = matrix.new_zeros(matrix.shape[1], matrix.shape[1])
        for block, weight in zip(matrix.split(_ROWS), theta.sqrt().split(_ROWS), strict=True):
            total += gram(block * weight[:, None])
        return total

    @cached_property
    def lengths(self) -> Float[Tensor, " N"]:
        """|g_j|²."""
        lengths: Tensor = torch.linalg.vecdot(self.matrix, self.matrix)
        return lengths

    def rows(self, variables: Int[Tensor, " k"]) -> Float[Tensor, "k m"]:
        """Return some rows of G."""
        return self.matrix[variables]


def _counting(theta: Float[Tensor, " N"], lengths: Float[Tensor, " N"]) -> Int[Tensor, " k"]:
    """Return all variables but those that a Gram matrix would lose to rounding."""
    weight = theta * lengths
    smallest = weight.sort()
    lost = smallest.values.cumsum(0) <= _LOST * weight.sum()
    return smallest.indices[~lost]


class StreamedMatrix(MomentMatrix):
    """[Q_1 | … | Q_n | extra] over all tokens, read from the heads of one row.

    Args:
        heads: whitened views of one row, in fp64.
        extra: further columns, (v, k), such as the ones that keep the sum.
    """

    def __init__(self, heads: Sequence[WhitenedHead], extra: Float[Tensor, "v k"]) -> None:
        self.heads, self.extra = tuple(heads), extra
        self.widths = [h.rank for h in heads]

    def times(self, y: Float[Tensor, " m"]) -> Float[Tensor, " N"]:
        """Return G y, by one read of every head."""
        *parts, last = y.split([*self.widths, self.extra.shape[1]])
        total: Tensor = self.extra @ last
        for h, part in zip(self.heads, parts, strict=True):
            total = total + h.scores(part[None])[0]
        return total

    def sums(self, x: Float[Tensor, " N"]) -> Float[Tensor, " m"]:
        """Return Gᵀ x, by one read of every head."""
        return torch.cat([*(h.moments(x[None])[0][0] for h in self.heads), x @ self.extra])

    def gram(self, theta: Float[Tensor, " N"]) -> Float[Tensor, "m m"]:
        """Return Σ_j θ_j g_j g_jᵀ, by one read of every head."""
        m = sum(self.widths) + self.extra.shape[1]
        total = theta.new_zeros(m, m)
        for tokens, block in self._blocks():
            total += gram(block * theta[tokens, None].sqrt())
        return total

    def rows(self, variables: Int[Tensor, " k"]) -> Float[Tensor, "k m"]:
        """Gather some rows of G."""
        return torch.cat([*(h.gather(variables[None])[0].double() for h in self.heads), self.extra[variables]], dim=-1)

    def held(self) -> MomentMatrix:
        """Return the same as a matrix, where it is small enough to hold."""
        if len(self.extra) * (sum(self.widths) + self.extra.shape[1]) > _HELD:
            return self
        return DenseMatrix(torch.cat([block for _, block in self._blocks()]))

    def _blocks(self) -> Iterator[tuple[slice, Float[Tensor, "b m"]]]:
        v = len(self.extra)
        for start in range(0, v, _ROWS):
            tokens = slice(start, min(start + _ROWS, v))
            parts = []
            for h in self.heads:
                raw = h.block(tokens).double().to(self.extra.device) - h.whitening.center
                white = pad(raw @ h.whitening.factor, (0, 0, 0, tokens.stop - tokens.start - len(raw)))
                parts.append(white if h.slope is None else white * h.slope[0, tokens, None])
            yield tokens, torch.cat([*parts, self.extra[tokens]], dim=-1)
        for h in self.heads:
            h.rows_read[h.at] += h.head.v


class StackedMatrix(MomentMatrix):
    """Further variables below those of another matrix."""

    def __init__(self, base: MomentMatrix, below: Float[Tensor, "k m"]) -> None:
        self.base, self.below = base, below

    def times(self, y: Float[Tensor, " m"]) -> Float[Tensor, " N"]:
        """Return G y."""
        return torch.cat([self.base.times(y), self.below @ y])

    def sums(self, x: Float[Tensor, " N"]) -> Float[Tensor, " m"]:
        """Return Gᵀ x."""
        k = len(self.below)
        return self.base.sums(x[:-k]) + x[-k:] @ self.below

    def gram(self, theta: Float[Tensor, " N"]) -> Float[Tensor, "m m"]:
        """Return Σ_j θ_j g_j g_jᵀ."""
        k = len(self.below)
        return self.base.gram(theta[:-k]) + (self.below * theta[-k:, None]).T @ self.below

    def rows(self, variables: Int[Tensor, " k"]) -> Float[Tensor, "k m"]:
        """Return some rows of the matrix above."""
        return self.base.rows(variables)


def mapped(base: MomentMatrix, matrix: Float[Tensor, "m k"]) -> MomentMatrix:
    """Return the columns G T, held in memory where G is."""
    return DenseMatrix(base.matrix @ matrix) if isinstance(base, DenseMatrix) else MappedMatrix(base, matrix)


class MappedMatrix(MomentMatrix):
    """G T: linear combinations of another matrix's columns."""

    def __init__(self, base: MomentMatrix, matrix: Float[Tensor, "m k"]) -> None:
        self.base, self.matrix = base, matrix

    def times(self, y: Float[Tensor, " k"]) -> Float[Tensor, " N"]:
        """Return G T y."""
        return self.base.times(self.matrix @ y)

    def sums(self, x: Float[Tensor, " N"]) -> Float[Tensor, " k"]:
        """Return Tᵀ Gᵀ x."""
        return self.base.sums(x) @ self.matrix

    def gram(self, theta: Float[Tensor, " N"]) -> Float[Tensor, "k k"]:
        """Return Tᵀ Gᵀ diag(θ) G T."""
        return self.matrix.T @ self.base.gram(theta) @ self.matrix

    def rows(self, variables: Int[Tensor, " j"]) -> Float[Tensor, "j k"]:
        """Return some rows of G T."""
        return self.base.rows(variables) @ self.matrix


class SubsetMatrix(MomentMatrix):
    """Some variables of another matrix, without a copy of their rows."""

    def __init__(self, base: MomentMatrix, variables: Int[Tensor, " k"], N: int) -> None:
        self.base, self.variables, self.N = base, variables, N

    def _spread(self, x: Float[Tensor, " k"]) -> Float[Tensor, " N"]:
        return x.new_zeros(self.N).index_copy(0, self.variables, x)

    def times(self, y: Float[Tensor, " m"]) -> Float[Tensor, " k"]:
        """Return G y on the chosen variables."""
        return self.base.times(y)[self.variables]

    def sums(self, x: Float[Tensor, " k"]) -> Float[Tensor, " m"]:
        """Return Gᵀ x."""
        return self.base.sums(self._spread(x))

    def gram(self, theta: Float[Tensor, " k"]) -> Float[Tensor, "m m"]:
        """Return Σ_j θ_j g_j g_jᵀ over the chosen variables."""
        return self.base.gram(self._spread(theta))

    def rows(self, variables: Int[Tensor, " j"]) -> Float[Tensor, "j m"]:
        """Return some rows of G."""
        return self.base.rows(self.variables[variables])


def subset(base: MomentMatrix, variables: Int[Tensor, " k"], N: int) -> MomentMatrix:
    """Choose some variables of N, with a copy of their rows where that is small and makes Gram matrices cheaper."""
    few = 2 * len(variables) <= N and len(variables) * base.rows(variables[:1]).shape[1] <= _HELD
    return DenseMatrix(base.rows(variables)) if few else SubsetMatrix(base, variables, N)
