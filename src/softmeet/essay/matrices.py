"""The matrix G of a program's constraints Gᵀx = g, given by the four operations that solvers need of it, in fp64.

G has one row per variable (token). Solvers need its products, weighted Gram matrices and some rows, nothing else of the
heads. For few tokens G is held in memory; for all tokens of large heads it is streamed in blocks, so that no head is
copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from softmeet.heads import WhitenedHead
from softmeet.solvers.linalg import gram

# The most elements of a matrix that is kept in memory: 512 MiB in fp64.
_HELD = 1 << 26
# A share of a Gram matrix's trace that is below its rounding.
_LOST = 1e-18
# Rows that are read at once: a block that a core's cache holds.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class MomentMatrix:
    """A matrix G, (N, m), given by functions; it has a row g_j for each variable of a program with constraints Gᵀx = g.

    :func:`dense_matrix` makes one from a tensor, :func:`token_matrix` from heads. Rules use fp64 tensors only.

    Attributes:
        times: a function from y, (m,), to G y, (N,).
        sums: a function from x, (N,), to Gᵀx, (m,).
        gram: a function from weights θ ≥ 0, (N,), to Σ_j θ_j g_j g_jᵀ, (m, m).
        rows: a function from the indices of k variables, (k,), int64, to their rows of G, (k, m).
        dense: G itself if it is in memory, else None.
    """

    times: Callable[[Float[Tensor, " m"]], Float[Tensor, " N"]]
    sums: Callable[[Float[Tensor, " N"]], Float[Tensor, " m"]]
    gram: Callable[[Float[Tensor, " N"]], Float[Tensor, "m m"]]
    rows: Callable[[Int[Tensor, " k"]], Float[Tensor, "k m"]]
    dense: Float[Tensor, "N m"] | None = None


def dense_matrix(G: Float[Tensor, "N m"]) -> MomentMatrix:
    """Return the :class:`MomentMatrix` of a matrix ``G`` that is in memory; ``G`` is not copied.

    Example:
        >>> import torch
        >>> dense_matrix(torch.eye(2)).gram(torch.tensor([1.0, 4.0]))
        tensor([[1., 0.],
                [0., 4.]])
    """
    lengths = cache(lambda: torch.linalg.vecdot(G, G))

    def weighted(theta: Float[Tensor, " N"]) -> Float[Tensor, "m m"]:
        part, some = G, _counting(theta, lengths())
        if 2 * len(some) <= len(theta):
            part, theta = G[some], theta[some]
        blocks = zip(part.split(_ROWS), theta.sqrt().split(_ROWS), strict=True)
        return sum((gram(block * weight[:, None]) for block, weight in blocks), G.new_zeros(G.shape[1], G.shape[1]))

    return MomentMatrix(lambda y: G @ y, lambda x: x @ G, weighted, lambda ids: G[ids], G)


def _counting(theta: Float[Tensor, " N"], lengths: Float[Tensor, " N"]) -> Int[Tensor, " k"]:
    """Return the indices of the variables that a weighted Gram matrix does not lose to rounding: large θ_j |g_j|²."""
    weight = theta * lengths
    smallest = weight.sort()
    lost = smallest.values.cumsum(0) <= _LOST * weight.sum()
    return smallest.indices[~lost]


def token_matrix(heads: Sequence[WhitenedHead], extra: Float[Tensor, "v k"]) -> MomentMatrix:
    """Return the matrix [Q_1 | … | Q_n | extra] over all v tokens: in memory if it is small, else streamed.

    Small means at most 2²⁶ numbers (v m). In memory, every head is read once, now; streamed, every later call of
    ``times``, ``sums`` and ``gram`` reads all heads once, and ``rows`` the rows that are asked for.

    Args:
        heads: the n whitened heads Q_i of one row, as :attr:`FeasibleSet.heads` has them; products are fp64.
        extra: k further columns, (v, k), fp64, such as the column of ones for Σp = 1.
    """
    v, m = len(extra), sum(h.rank for h in heads) + extra.shape[1]

    def blocks() -> Iterator[tuple[slice, Float[Tensor, "b m"]]]:
        for start in range(0, v, _ROWS):
            tokens = slice(start, min(start + _ROWS, v))
            parts = []
            for h in heads:
                raw = h.block(tokens).double().to(extra.device) - h.whitening.center
                white = pad(raw @ h.whitening.factor, (0, 0, 0, tokens.stop - tokens.start - len(raw)))
                parts.append(white if h.slope is None else white * h.slope[0, tokens, None])
            yield tokens, torch.cat([*parts, extra[tokens]], dim=-1)
        for h in heads:
            h.rows_read[h.at] += h.head.v

    if v * m <= _HELD:
        return dense_matrix(torch.cat([block for _, block in blocks()]))

    def times(y: Float[Tensor, " m"]) -> Float[Tensor, " v"]:
        *parts, last = y.split([*(h.rank for h in heads), extra.shape[1]])
        return sum((h.scores(part[None])[0] for h, part in zip(heads, parts, strict=True)), extra @ last)

    def weighted(theta: Float[Tensor, " v"]) -> Float[Tensor, "m m"]:
        return sum((gram(block * theta[tokens, None].sqrt()) for tokens, block in blocks()), theta.new_zeros(m, m))

    return MomentMatrix(
        times,
        lambda x: torch.cat([*(h.moments(x[None])[0][0] for h in heads), x @ extra]),
        weighted,
        lambda ids: torch.cat([*(h.gather(ids[None])[0].double() for h in heads), extra[ids]], dim=-1),
    )


def stacked(base: MomentMatrix, below: Float[Tensor, "k m"]) -> MomentMatrix:
    """Return the matrix, (N + k, m), that has the N rows of ``base`` and then the k rows of ``below``.

    Its ``rows`` accepts the indices 0 … N - 1 of rows of ``base`` only.
    """
    k = len(below)
    return MomentMatrix(
        lambda y: torch.cat([base.times(y), below @ y]),
        lambda x: base.sums(x[:-k]) + x[-k:] @ below,
        lambda theta: base.gram(theta[:-k]) + (below * theta[-k:, None]).T @ below,
        base.rows,
    )


def mapped(base: MomentMatrix, T: Float[Tensor, "m k"]) -> MomentMatrix:
    """Return the product ``base`` T, (N, k), of the matrix ``base``, (N, m), and ``T``, (m, k), of the same dtype.

    It is in memory if ``base`` is; else every operation goes through ``base``.
    """
    if base.dense is not None:
        return dense_matrix(base.dense @ T)
    return MomentMatrix(
        lambda y: base.times(T @ y),
        lambda x: base.sums(x) @ T,
        lambda theta: T.T @ base.gram(theta) @ T,
        lambda ids: base.rows(ids) @ T,
    )


def subset(base: MomentMatrix, variables: Int[Tensor, " k"], N: int) -> MomentMatrix:
    """Return the matrix, (k, m), of some rows of ``base``, in the order in which ``variables`` names them.

    They are copied into memory if they are at most half of ``base`` and at most 2²⁶ numbers; else each operation runs
    through ``base``, with zeros for the other rows.

    Args:
        base: the matrix, (N, m).
        variables: the indices of the k rows, (k,), int64, from 0 to N - 1, all different.
        N: the number of rows of ``base``.
    """
    if 2 * len(variables) <= N and len(variables) * base.rows(variables[:1]).shape[1] <= _HELD:
        return dense_matrix(base.rows(variables))

    def spread(x: Float[Tensor, " k"]) -> Float[Tensor, " N"]:
        return x.new_zeros(N).index_copy(0, variables, x)

    return MomentMatrix(
        lambda y: base.times(y)[variables],
        lambda x: base.sums(spread(x)),
        lambda theta: base.gram(spread(theta)),
        lambda ids: base.rows(variables[ids]),
    )
