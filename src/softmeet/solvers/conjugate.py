"""Preconditioned conjugate gradients, batched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Linear = Callable[[Float[Tensor, "b D"]], Float[Tensor, "b D"]]


def conjugate_gradients(
    product: Linear,
    g: Float[Tensor, "b D"],
    precondition: Linear,
    reduction: float,
    limit: int,
) -> Float[Tensor, "b D"]:
    """H⁻¹ g, until the preconditioned residual has fallen by ``reduction`` in every row.

    Args:
        product: by H, positive definite; a row that has stopped is zero in what it is given.
        g: right-hand sides.
        precondition: by an approximate inverse of H.
        reduction: of √(rᵀM⁻¹r), the residual's length in the preconditioner's metric.
        limit: of steps.
    """
    s, residual = torch.zeros_like(g), g
    y = precondition(residual)
    d, size = y, (residual * y).sum(-1)
    goal = reduction**2 * size
    for _ in range(limit):
        Hd = product(d)
        curvature = (d * Hd).sum(-1)
        going = (size > goal) & (curvature > 0)
        if not going.any():
            break
        step = torch.where(going, size / curvature, 0.0)
        s, residual = s + step[:, None] * d, residual - step[:, None] * Hd
        y = precondition(residual)
        new = (residual * y).sum(-1)
        going &= new > goal
        d = torch.where(going[:, None], y + (new / size)[:, None] * d, 0.0)
        size = torch.where(going, new, 0.0)
        if not going.any():
            break
    return s
