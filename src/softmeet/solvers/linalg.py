"""Linear algebra that several methods share: ridged Cholesky factors, Gram matrices, conjugate gradients, line search.

Everything is batched except :func:`factored`, which solves one system.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# The elements that a processor's cache holds during an operation, and those that an accelerator processes at once; the
# elements of a batch's matrices, such as its Hessians, of which memory holds a few.
_CACHED, _CACHED_ON_ACCELERATORS, _HELD = 1 << 19, 1 << 26, 1 << 24
# A solution is refined while its residual is more than this share of the right-hand side.
_SOLVED = 1e-7
# The longest solution: its scores do not overflow in single precision.
_LONGEST = 1e30
# Columns of a Gram matrix that are formed together.
_STRIP = 192

Linear = Callable[[Float[Tensor, "b D"]], Float[Tensor, "b D"]]
Rejects = Callable[[Float[Tensor, " B"]], Bool[Tensor, " B"]]


def some(rows: Bool[Tensor, " B"]) -> bool:
    """Return whether the mask ``rows`` has a True; always True on an accelerator, since looking would wait for it."""
    return rows.device.type != "cpu" or bool(rows.any())


def cached(elements: int, device: torch.device, least: int = 1) -> int:
    """Return how many items to process in one operation so that they fit the processor's cache; at least ``least``.

    Args:
        elements: the numbers that one item holds.
        device: the device that processes them; an accelerator has a fixed, larger budget in place of a cache.
        least: the fewest items.
    """
    budget = _CACHED if device.type == "cpu" else _CACHED_ON_ACCELERATORS
    return max(least, budget // max(1, elements))


def held(elements: int) -> int:
    """Return how many items of ``elements`` numbers each may be in memory together: 2²⁴ numbers in all; at least 1."""
    return max(1, _HELD // max(1, elements))


def add_ridge(H: Float[Tensor, "*b D D"], share: float) -> Float[Tensor, "*b D D"]:
    """Add ``share`` times the mean of its diagonal to the diagonal of each matrix in ``H``, in place; return ``H``."""
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    diagonal += share * diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(H.dtype).tiny)
    return H


def ridged_factor(H: Float[Tensor, "D D"], share: float) -> Float[Tensor, "D D"]:
    """Return a lower Cholesky factor of the symmetric H plus a ridge; it is finite whatever H holds.

    The ridge is ``share`` times the mean of H's diagonal, and ten times more for each failure of the factorisation. If
    no ridge up to that mean helps, which NaN, inf and large negative eigenvalues cause, the factor is the identity.
    """
    ridge = share * H.diagonal().mean().clamp_min(torch.finfo(H.dtype).tiny)
    one = torch.eye(len(H), dtype=H.dtype, device=H.device)
    while share <= 1:
        factor, failed = torch.linalg.cholesky_ex(H + ridge * one)
        if not failed and factor.isfinite().all():
            found: Tensor = factor
            return found
        share, ridge = 10 * share, 10 * ridge
    return one


def solve_ridged(H: Float[Tensor, "B D D"], g: Float[Tensor, "B D"], eps: float) -> Float[Tensor, "B D"]:
    """Return H⁻¹ g, (B, D), for positive semidefinite H, by a Cholesky factor of H plus a ridge, refined up to twice.

    A row whose solution is not finite, or longer than 1e30, gets ``g`` itself, which is still a direction of descent.

    Args:
        H: the matrices, (B, D, D), not changed.
        g: the right-hand sides, (B, D), each the gradient of a function of which H is the Hessian.
        eps: the relative rounding of ``H``. The ridge is ``eps`` times the mean diagonal entry, and ten times more for
            each failure of the factorisation.
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
        # A row that is solved is not refined further, even if others are.
        s = torch.where(going, s + torch.cholesky_solve(residual[..., None], L).squeeze(-1), s)
        residual = g - (H @ s[..., None]).squeeze(-1)
        going = residual.norm(dim=-1, keepdim=True) > _SOLVED * g.norm(dim=-1, keepdim=True)
        if not going.any():
            break
    return torch.where(s.norm(dim=-1, keepdim=True) <= _LONGEST, s, g)


def factored(M: Float[Tensor, "m m"]) -> Callable[[Float[Tensor, " m"]], Float[Tensor, " m"]] | None:
    """Factor one positive semidefinite ``M``, and return the function that solves M y = b; None if that fails.

    The factor is that of M scaled to a unit diagonal, plus a ridge times the identity: the smallest of 1e-15, 1e-14, …,
    1e-5 with which a Cholesky factor exists. Solutions are corrected twice for the residual b - M y.
    """
    scale = M.diagonal().clamp_min(torch.finfo(M.dtype).tiny).rsqrt()
    unit, one = scale[:, None] * M * scale, torch.eye(len(M), dtype=M.dtype, device=M.device)
    for power in range(-15, -4):
        L, info = torch.linalg.cholesky_ex(unit + 10.0**power * one)
        if not info and L.isfinite().all():
            break
    else:
        return None

    def solve(b: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        y = torch.zeros_like(b)
        for _ in range(3):
            e = (b - M @ y) * scale
            y = y + scale * torch.cholesky_solve(e[:, None], L).squeeze(-1)
        return y

    return solve


def conjugate_gradients(
    product: Linear, g: Float[Tensor, "b D"], precondition: Linear, reduction: float, limit: int, *, wait: bool = False
) -> Float[Tensor, "b D"]:
    """Return approximately H⁻¹ g for positive definite H, by preconditioned conjugate gradients for each row.

    Args:
        product: a function from d, (b, D), to H d, (b, D), with each row's own H; called once in each step. Rows of d
            that have stopped are 0.
        g: the right-hand sides.
        precondition: a function from e, (b, D), to M⁻¹e, (b, D), M⁻¹ an approximate inverse of H that is linear and
            positive definite; called once before the first step and once in each step.
        reduction: a row stops once √(rᵀM⁻¹r), r = g - H s its residual, is at most this share of its value at the
            start s = 0; with 0 it takes all ``limit`` steps.
        limit: the most steps.
        wait: look after each step whether all rows have stopped even on an accelerator, which has to be waited for:
            worth it if a step is dear, as with reads of the heads. Without it all steps are taken there.
    """
    goes_on = Tensor.any if wait else some
    s, residual = torch.zeros_like(g), g
    y = precondition(residual)
    d, size = y, (residual * y).sum(-1)
    goal = reduction**2 * size
    for _ in range(limit):
        Hd = product(d)
        curvature = (d * Hd).sum(-1)
        going = (size > goal) & (curvature > 0)
        if not goes_on(going):
            break
        step = torch.where(going, size / curvature, 0.0)
        s, residual = s + step[:, None] * d, residual - step[:, None] * Hd
        y = precondition(residual)
        new = (residual * y).sum(-1)
        going &= new > goal
        d = torch.where(going[:, None], y + (new / size)[:, None] * d, 0.0)
        size = torch.where(going, new, 0.0)
        if not goes_on(going):
            break
    return s


def gram(x: Float[Tensor, "*b k m"]) -> Float[Tensor, "*b m m"]:
    """Return the full symmetric Xᵀ X, (…, m, m), for each matrix X in ``x``, in about half of a product's operations.

    Only the lower triangle is computed, in strips, and then mirrored; a single matrix on one processor thread goes
    through numpy, whose product does the same.
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
    worse: Rejects, t: Float[Tensor, " B"], factor: float, limit: int, *, wait: bool = False
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """Multiply the step lengths ``t`` by ``factor`` in rows in which ``worse`` rejects them, until it rejects none.

    Args:
        worse: a function from step lengths, (B,), to the mask, (B,), of rows in which they are rejected.
        t: the first step lengths to try, (B,).
        factor: the factor, between 0 and 1, by which a rejected step is shortened.
        limit: the most calls of ``worse``, at least 1. Each gets the step lengths of all rows. They end once a call
            rejects none, on an accelerator with ``wait`` alone.
        wait: as of :func:`conjugate_gradients`.

    Returns:
        (the step lengths, (B,); the mask, (B,), of rows that the last call still rejected: their step was shortened
        once more, and that was not tried).
    """
    for _ in range(limit):
        failed = worse(t)
        if not (failed.any() if wait else some(failed)):
            break
        t = torch.where(failed, factor * t, t)
    return t, failed
