"""A head cut into bands of its principal directions, so that each band can have a trust of its own.

W - 1cᵀ = U S Vᵀ; band k takes a share of the right singular vectors V, those of the largest singular values first, and
is the head W V_k. ``meet`` over bands is ``meet`` with a copy of the member for each, which constrains only the band's
own directions:

    minimise KL(p‖q) + Σ_ik ρ_ik KL(r_ik‖p̂_i)   over p, r_ik in the simplex,  V_ikᵀW_iᵀ p = V_ikᵀW_iᵀ r_ik.

So nothing in the solver or its certificates changes. Bands are copies: together as large as the head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead


def principal_directions(head: SoftmaxHead) -> Float[Tensor, "d d"]:
    """Return the right singular vectors of the centred head in columns, (d, d) fp64, largest singular value first."""
    center = torch.zeros(head.d, dtype=torch.float64, device=head.weight.device)
    gram = center.new_zeros(head.d, head.d)
    for _, block in head.blocks(torch.float64, cut=True):
        center += block.sum(0) / head.v
        gram.addmm_(block.T, block)
    vectors: Tensor = torch.linalg.eigh(gram - head.v * torch.outer(center, center)).eigenvectors
    return vectors.flip(-1)


def bands(head: SoftmaxHead, count: int) -> list[SoftmaxHead]:
    """Cut a head into bands of its principal directions, as equal in width as can be.

    Args:
        head: of d directions.
        count: how many bands.

    Returns:
        the bands, those of the largest singular values first; the head itself for one band.

    Raises:
        InvalidInputError: there are more bands than directions.
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
