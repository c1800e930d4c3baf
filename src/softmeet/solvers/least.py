"""The dual minimised exactly over a few directions whose scores are known: vectors over the vocabulary, and no head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.solvers.projection import Projection

_STEPS, _HALVINGS = 6, 20
# A Newton step that promises less than this share of what was gained before is the last.
_ENOUGH = 0.02
# Added to the diagonal of a few coefficients' Hessian: its own rounding, where directions are all but one.
_RIDGE, _TINY = 1e-10, 1e-200


def least(
    problem: Projection, z: Float[Tensor, "B n v"], columns: Float[Tensor, "B n c v"]
) -> tuple[Float[Tensor, "B n c"], Float[Tensor, "B n v"], Float[Tensor, " B"]]:
    """Minimise f over z + Σ_k a_ik columns_ik by Newton's method on the coefficients, each member's its own.

    Args:
        problem: the projection.
        z: scores to start from.
        columns: scores of each member's directions.

    Returns:
        (coefficients, the scores there, f there); f never rises.
    """
    B, n, c, _ = columns.shape
    a, at, value = columns.new_zeros(B, n, c), z, problem.dual(z)
    first, going = value, torch.ones_like(value, dtype=torch.bool)
    for _ in range(_STEPS):
        H, g = _derivatives(problem, at, columns)
        diagonal = H.diagonal(dim1=-2, dim2=-1)
        diagonal += _RIDGE * diagonal + _TINY
        # A row that is done stays where it is, whatever others need.
        step = torch.where(going[:, None], -torch.linalg.solve(H, g), 0.0)
        promised = -0.5 * (g * step).sum(-1)
        a, at, value = _shorter(problem, z, columns, (a, at, value), step.view(B, n, c))
        going = going & (promised > _ENOUGH * (first - value))
        if not going.any():
            break
    return a, at, value


def _derivatives(
    problem: Projection, z: Float[Tensor, "B n v"], columns: Float[Tensor, "B n c v"]
) -> tuple[Float[Tensor, "B k k"], Float[Tensor, "B k"]]:
    """The Hessian and the gradient of f in the coefficients, members side by side."""
    B, n, c, v = columns.shape
    p, r = problem.pooled(z).exp(), problem.corrected(z).exp()
    joint = (problem.alpha[:, None, None] * columns).view(B, n * c, v)
    weighted = joint * p[:, None]
    mean = weighted.sum(-1)
    H, g = weighted @ joint.transpose(1, 2) - mean[:, :, None] * mean[:, None], mean
    weighted = columns * r[:, :, None]
    means = weighted.sum(-1)
    own = weighted @ columns.transpose(2, 3) - means[..., None] * means[..., None, :]
    for i, (alpha, gamma) in enumerate(zip(problem.alpha, problem.gamma, strict=True)):
        here = slice(i * c, (i + 1) * c)
        H[:, here, here] += alpha * gamma * own[:, i]
        g[:, here] -= alpha * means[:, i]
    return H, g


def _shorter(
    problem: Projection,
    z: Float[Tensor, "B n v"],
    columns: Float[Tensor, "B n c v"],
    here: tuple[Tensor, Tensor, Tensor],
    step: Float[Tensor, "B n c"],
) -> tuple[Tensor, Tensor, Tensor]:
    """(coefficients, scores, f) after as much of a step as lowers f; none of it where nothing does."""
    a, at, value = here
    step = step.nan_to_num(0.0, 0.0, 0.0)
    t = torch.ones_like(value)
    for _ in range(_HALVINGS):
        new = a + t[:, None, None] * step
        there = z + (new[..., None] * columns).sum(2)
        found = problem.dual(there)
        worse = ~(found <= value)
        if not worse.any():
            return new, there, found
        t = torch.where(worse, t / 3, t)
    keep = worse[:, None, None]
    return torch.where(keep, a, new), torch.where(keep, at, there), torch.where(worse, value, found)
