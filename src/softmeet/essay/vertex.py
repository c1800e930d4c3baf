"""The way from any point of {x ≥ 0 : Gᵀx = g} to a vertex, which has at most rank G positive entries.

As long as more tokens have mass than G has columns, some combination of their rows of G vanishes; masses move along it
until one is zero, and the moments Gᵀx stay (Carathéodory's theorem, as an algorithm). Tokens are taken 2m at a time,
with one null space for m eliminations, so that the whole costs about N m² operations.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.essay.matrices import MomentMatrix
from softmeet.solvers.clock import time_is_over

# Singular values and entries below this share of the largest are zero.
_TINY = 1e-10


def vertex(columns: MomentMatrix, x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return masses, (N,), with the same moments Gᵀx as ``x``, of which at most rank G are positive.

    They are a vertex of the polytope { x ≥ 0 : Gᵀx = g } with the g that ``x`` has. Some of the 2m + 1 smallest
    positive masses become 0 and the others among them change, so that the moments stay; this is repeated. If the time
    is over first (:func:`softmeet.time_is_over`), the masses at that moment are returned: with the same moments, but
    more of them positive.

    Args:
        columns: G, (N, m), such as :attr:`FeasibleSet.tokens`; some combination of its columns is 1 for every token, so
            that the sum of ``x`` is kept.
        x: masses of N tokens, not negative, (N,), fp64; not changed.
    """
    x, m = x.clone(), columns.sums(x).shape[0]
    while not time_is_over():
        support = x.nonzero().squeeze(-1)
        block = support[x[support].argsort()[: 2 * m + 1]]
        null = _null_space(columns.rows(block))
        if not null.shape[1]:
            break
        x[block] = _eliminated(x[block], null)
    return x


def _null_space(G: Float[Tensor, "k m"]) -> Float[Tensor, "k r"]:
    """Return an orthonormal basis of { n : Gᵀn = 0 }, as columns."""
    found = torch.linalg.svd(G, full_matrices=True)
    rank = int(torch.count_nonzero(_TINY * found.S.max() < found.S))
    basis: Tensor = found.U[:, rank:]
    return basis


def _eliminated(x: Float[Tensor, " k"], null: Float[Tensor, "k r"]) -> Float[Tensor, " k"]:
    """Return masses with the moments of ``x`` and one more zero for every column of ``null``.

    Args:
        x: positive masses of k tokens.
        null: independent directions, as columns, that keep the moments, as :func:`_null_space` gives them.
    """
    x, null = x.clone(), null.clone()
    while null.shape[1]:
        n = null[:, 0] if null[:, 0].max() >= -null[:, 0].min() else -null[:, 0]
        falling = n > _TINY * n.max()
        ratios = torch.where(falling, x / torch.where(falling, n, 1.0), torch.inf)
        k = int(ratios.argmin())
        x = (x - ratios[k] * n).clamp_min(0.0)
        x[k] = 0.0
        # The other directions may not change the mass of token k.
        null = null[:, 1:] - torch.outer(n, null[k, 1:] / n[k])
        null[k] = 0.0
    return x
