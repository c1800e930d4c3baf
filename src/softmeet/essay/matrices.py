"""The moments of tokens as a matrix with one row per variable, known by what is done with it, in fp64.

The essay's programs need products and weighted Gram matrices and nothing else of the heads. Few tokens are held as a
dense matrix; all tokens of large heads are streamed in blocks, so that no copy of a head is made.
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

# Elements of a matrix that is held rather than read again: 512 MiB in fp64.
_HELD = 1 << 26
# The share of a Gram matrix's trace that rounding hides.
_LOST = 1e-18
# Rows of a block of a Gram matrix: what stays in a core's cache.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class MomentMatrix:
    """G, (N, m): one row per variable of a program whose constraints are Gᵀx = g.

    Attributes:
        times: from y, (m,), to G y.
        sums: from x, (N,), to Gᵀ x.
        gram: from θ, (N,), to Σ_j θ_j g_j g_jᵀ, (m, m).
        rows: from the numbers of k variables to their rows of G, (k, m).
        dense: G, where it is in memory.
    """

    times: Callable[[Float[Tensor, " m"]], Float[Tensor, " N"]]
    sums: Callable[[Float[Tensor, " N"]], Float[Tensor, " m"]]
    gram: Callable[[Float[Tensor, " N"]], Float[Tensor, "m m"]]
    rows: Callable[[Int[Tensor, " k"]], Float[Tensor, "k m"]]
    dense: Float[Tensor, "N m"] | None = None


def dense_matrix(G: Float[Tensor, "N m"]) -> MomentMatrix:
    """Make a matrix that is in memory.

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
    """Return all variables but those that a Gram matrix would lose to rounding, by their weights and |g_j|²."""
    weight = theta * lengths
    smallest = weight.sort()
    lost = smallest.values.cumsum(0) <= _LOST * weight.sum()
    return smallest.indices[~lost]


def token_matrix(heads: Sequence[WhitenedHead], extra: Float[Tensor, "v k"]) -> MomentMatrix:
    """Make [Q_1 | … | Q_n | extra] over all tokens: dense where it is small, else streamed from the heads.

    Args:
        heads: whitened views of one row, in fp64; each product reads every one of them once.
        extra: further columns, such as the ones that keep the sum.
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
    """Put the rows of further variables below a matrix; ``rows`` are those of the matrix above."""
    k = len(below)
    return MomentMatrix(
        lambda y: torch.cat([base.times(y), below @ y]),
        lambda x: base.sums(x[:-k]) + x[-k:] @ below,
        lambda theta: base.gram(theta[:-k]) + (below * theta[-k:, None]).T @ below,
        base.rows,
    )


def mapped(base: MomentMatrix, T: Float[Tensor, "m k"]) -> MomentMatrix:
    """Make G T, linear combinations of a matrix's columns; dense where G is."""
    if base.dense is not None:
        return dense_matrix(base.dense @ T)
    return MomentMatrix(
        lambda y: base.times(T @ y),
        lambda x: base.sums(x) @ T,
        lambda theta: T.T @ base.gram(theta) @ T,
        lambda ids: base.rows(ids) @ T,
    )


def subset(base: MomentMatrix, variables: Int[Tensor, " k"], N: int) -> MomentMatrix:
    """Choose some variables of N, with a copy of their rows where that is small and makes Gram matrices cheaper."""
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
