"""Linear algebra that several methods share: ridged Cholesky factors, Gram products, conjugate gradients, line search.

Everything is batched but :class:`Factored`, which solves one system.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Elements that stay in a processor's cache while they are worked on, and that an accelerator takes at once; elements
# of matrices made for a batch, of which memory has room for a few.
_CACHED, _CACHED_ON_ACCELERATORS, _HELD = 1 << 19, 1 << 26, 1 << 23
# The share of a right-hand side that a solution may leave over before it is refined.
_SOLVED = 1e-7
# The longest solution: scores of single precision do not overflow yet.
_LONGEST = 1e30
# Columns of a Gram matrix that are formed together.
_STRIP = 192

Linear = Callable[[Float[Tensor, "b D"]], Float[Tensor, "b D"]]


def some(rows: Bool[Tensor, " B"]) -> bool:
    """Return whether a mask holds any row; taken for granted on an accelerator, where looking would wait for it."""
    return rows.device.type != "cpu" or bool(rows.any())


def cached(elements: int, device: torch.device, least: int = 1) -> int:
    """Return how many things of so many elements to work on at once for speed, at least ``least``."""
    budget = _CACHED if device.type == "cpu" else _CACHED_ON_ACCELERATORS
    return max(least, budget // max(1, elements))


def held(elements: int) -> int:
    """Return how many things of so many elements memory has room for, at least 1."""
    return max(1, _HELD // max(1, elements))


def add_ridge(H: Float[Tensor, "*b D D"], share: float) -> Float[Tensor, "*b D D"]:
    """Add a share of the mean of its diagonal to the diagonal of each matrix, in place; return them."""
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    diagonal += share * diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(H.dtype).tiny)
    return H


def solve_ridged(H: Float[Tensor, "B D D"], g: Float[Tensor, "B D"], eps: float) -> Float[Tensor, "B D"]:
    """Return H⁻¹ g by Cholesky with a ridge of ``eps``, the rounding of H, refined twice.

    A row whose factorisation fails gets a larger ridge. Where the solution is not a number, or too long for scores in
    single precision, as where H all but vanishes, g is returned: still a direction of descent.
    """
    scale = H.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(H.dtype).tiny)
    ridged, ridge = H.clone(), eps * scale
    for _ in range(12):
        ridged.diagonal(dim1=-2, dim2=-1).copy_(H.diagonal(dim1=-2, dim2=-1) + ridge[:, None])
        L, info = torch.linalg.cholesky_ex(ridged)
        if not info.any():
            break
        ridge = torch.where(info > 0, 10 * ridge, ridge)
    s, residual, going = torch.zeros_like(g), g, torch.ones_like(g[..., :1], dtype=torch.bool)
    for _ in range(3):
        # A row that is solved stays as it is, whatever others need.
        s = torch.where(going, s + torch.cholesky_solve(residual[..., None], L).squeeze(-1), s)
        residual = g - (H @ s[..., None]).squeeze(-1)
        going = residual.norm(dim=-1, keepdim=True) > _SOLVED * g.norm(dim=-1, keepdim=True)
        if not going.any():
            break
    return torch.where(s.norm(dim=-1, keepdim=True) <= _LONGEST, s, g)


class Factored:
    """Solves M y = b for one positive semidefinite M by Cholesky, scaled to a unit diagonal and refined twice."""

    def __init__(self, M: Float[Tensor, "m m"], scale: Float[Tensor, " m"], L: Float[Tensor, "m m"]) -> None:
        self.M, self.scale, self.L = M, scale, L

    @classmethod
    def of(cls, M: Float[Tensor, "m m"]) -> Factored | None:
        """Factor M plus the smallest ridge that Cholesky accepts; return None where there is none."""
        scale = M.diagonal().clamp_min(torch.finfo(M.dtype).tiny).rsqrt()
        unit = scale[:, None] * M * scale
        ridge = 1e-15
        while ridge < 1e-4:
            L, info = torch.linalg.cholesky_ex(unit + ridge * torch.eye(len(M), dtype=M.dtype, device=M.device))
            if not info and L.isfinite().all():
                return cls(M, scale, L)
            ridge *= 10
        return None

    def __call__(self, b: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return M⁻¹ b."""
        y = torch.zeros_like(b)
        for _ in range(3):
            e = (b - self.M @ y) * self.scale
            y = y + self.scale * torch.cholesky_solve(e[:, None], self.L).squeeze(-1)
        return y


def conjugate_gradients(
    product: Linear, g: Float[Tensor, "b D"], precondition: Linear, reduction: float, limit: int
) -> Float[Tensor, "b D"]:
    """Return H⁻¹ g, about: each row stops once its preconditioned residual has fallen by ``reduction``.

    Args:
        product: multiplies by H, positive definite; rows that have stopped are zero in what it is given.
        g: right-hand sides.
        precondition: multiplies by an approximate inverse M⁻¹ of H.
        reduction: of √(rᵀM⁻¹r), the residual's length in the preconditioner's metric; 0 to take all steps.
        limit: the number of steps, at most.
    """
    s, residual = torch.zeros_like(g), g
    y = precondition(residual)
    d, size = y, (residual * y).sum(-1)
    goal = reduction**2 * size
    for _ in range(limit):
        Hd = product(d)
        curvature = (d * Hd).sum(-1)
        going = (size > goal) & (curvature > 0)
        if not some(going):
            break
        step = torch.where(going, size / curvature, 0.0)
        s, residual = s + step[:, None] * d, residual - step[:, None] * Hd
        y = precondition(residual)
        new = (residual * y).sum(-1)
        going &= new > goal
        d = torch.where(going[:, None], y + (new / size)[:, None] * d, 0.0)
        size = torch.where(going, new, 0.0)
        if not some(going):
            break
    return s


def gram(x: Float[Tensor, "*b k m"]) -> Float[Tensor, "*b m m"]:
    """Return Xᵀ X by strips of its lower triangle: torch has no symmetric product.

    For one matrix on one thread numpy's is used, which is symmetric; on several, its threads would be in torch's way.
    """
    if x.ndim == 2 and x.device.type == "cpu" and torch.get_num_threads() == 1:
        rows = x.numpy()
        return torch.from_numpy(rows.T @ rows)
    m = x.shape[-1]
    product = x.new_empty(*x.shape[:-2], m, m)
    for start in range(0, m, _STRIP):
        stop = min(start + _STRIP, m)
        strip = x[..., start:stop].transpose(-1, -2) @ x[..., :stop]
        product[..., start:stop, :stop] = strip
        product[..., :stop, start:stop] = strip.transpose(-1, -2)
    return product


def backtrack(
    worse: Callable[[Float[Tensor, " B"]], Bool[Tensor, " B"]], t: Float[Tensor, " B"], factor: float, limit: int
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """Shorten steps t by ``factor`` where they are ``worse`` than no step, ``limit`` times at most.

    Returns:
        (the steps, rows in which the last one that was tried was worse).
    """
    for _ in range(limit):
        failed = worse(t)
        if not some(failed):
            break
        t = torch.where(failed, factor * t, t)
    return t, failed
