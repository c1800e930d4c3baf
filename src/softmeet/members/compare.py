"""How heads relate: principal angles between their column spaces."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.heads import SoftmaxHead, Whitening

# Cosines this close to 1 are the same direction, to the rounding of half-precision weights.
_SAME = 1 - 1e-4


def principal_cosines(a: SoftmaxHead, b: SoftmaxHead) -> Float[Tensor, " k"]:
    """Cosines of the principal angles between the centred column spaces of two heads, largest first, fp64.

    Rows past the shorter head are left out. Björck and Golub, Math. Comp. 27, 1973: the singular values of Q_aᵀQ_b.
    """
    v, home = min(a.v, b.v), a.weight.device
    cross = torch.zeros(a.d, b.d, dtype=torch.float64, device=home)
    for rows, block in a.blocks(torch.float64, cut=True):
        other = b.weight[rows].detach().to(home, torch.float64)
        cross += block[: len(other)].T @ other[: len(block)]
    wa, wb = _whitening(a, v), _whitening(b, v)
    inner = cross - v * torch.outer(wa.center, wb.center.to(home))
    cosines: Tensor = torch.linalg.svdvals(wa.factor.T @ inner @ wb.factor.to(home))
    return cosines.clamp(0, 1)


def _whitening(head: SoftmaxHead, v: int) -> Whitening:
    centred = SoftmaxHead(head.weight[:v].detach()) if v < head.v or head.soft_cap is not None else head
    return centred.whitening()


def same_column_space(a: SoftmaxHead, b: SoftmaxHead) -> bool:
    """Whether ``meet`` between two such members can only be averaging."""
    cosines = principal_cosines(a, b)
    ranks = a.whitening().rank, b.whitening().rank
    return ranks[0] == ranks[1] and bool((cosines > _SAME).all())
