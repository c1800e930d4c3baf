"""A head cut into bands of its principal directions, so that each band can have its own trust.

W - 1cᵀ = U S Vᵀ is the singular value decomposition of a head's matrix W (v, d) minus the mean c of its rows. Its right
singular vectors V, ordered by falling singular value, are split into consecutive groups V_k, the bands; band k is the
head W V_k. In ``meet`` with bands, each member i occurs once for each band k, with a corrected distribution r_ik of its
own and trust ρ_ik, and matches the moments of the band's directions alone (p̂_i is the member's distribution, q the
pool):

    minimise KL(p‖q) + Σ_ik ρ_ik KL(r_ik‖p̂_i)   over p, r_ik in the simplex,  V_ikᵀW_iᵀ p = V_ikᵀW_iᵀ r_ik.

So solver and certificates stay the same. Bands are copies: together as large as the head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead


def principal_directions(head: SoftmaxHead) -> Float[Tensor, "d d"]:
    """Compute the right singular vectors of a head's centred matrix W - 1cᵀ, with c the mean over tokens.

    Returns:
        (d, d) fp64, a vector in each column, that of the largest singular value first.
    """
    center = torch.zeros(head.d, dtype=torch.float64, device=head.weight.device)
    gram = center.new_zeros(head.d, head.d)
    for _, block in head.blocks(torch.float64, cut=True):
        center += block.sum(0) / head.v
        gram.addmm_(block.T, block)
    vectors: Tensor = torch.linalg.eigh(gram - head.v * torch.outer(center, center)).eigenvectors
    return vectors.flip(-1)


def bands(head: SoftmaxHead, count: int) -> list[SoftmaxHead]:
    """Cut a head into ``count`` heads W V_k of its principal directions, as equal in width as possible.

    W (v, d) is the head's matrix, and V_k are consecutive groups of the right singular vectors of W - 1cᵀ, W minus the
    mean c of its rows (:func:`principal_directions`).

    Returns:
        The bands, that of the largest singular values first, in fp32 (fp64 for a head in fp64), with no bias, scale 1
        and the head's soft-cap; for ``count`` = 1 the head itself, unchanged.

    Raises:
        InvalidInputError: if ``count`` is not from 1 to d.
    """
    if not 1 <= count <= head.d:
        raise InvalidInputError(f"expected from 1 to {head.d} bands of principal directions, got {count}")
    if count == 1:
        return [head]
    parts = principal_directions(head).tensor_split(count, dim=-1)
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    return [
        SoftmaxHead(torch.cat([block @ V.to(dtype) for _, block in head.blocks(dtype)]), None, 1.0, head.soft_cap)
        for V in parts
    ]
