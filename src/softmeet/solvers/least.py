"""The dual minimised exactly over a few directions whose scores are known: vectors over the vocabulary, and no head."""

from __future__ import annotations

from dataclasses import fields

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.solvers.base import some
from softmeet.solvers.point import Point
from softmeet.solvers.projection import Projection

# Newton steps of the coefficients, and how often one is shortened until f falls.
_STEPS, _SHORTENED = 6, 12
# A step that promises less than this share of what was gained before is the last.
_ENOUGH = 0.02
# Added to the diagonal of the coefficients' Hessian, in its own rounding: directions may be all but one.
_RIDGE, _TINY = 16.0, 1e-30


def least(problem: Projection, start: Point, columns: Float[Tensor, "B n c v"]) -> tuple[Float[Tensor, "B n c"], Point]:
    """Minimise f over z + Σ_k a_ik columns_ik by Newton's method on the coefficients, each member's its own.

    Args:
        problem: the projection.
        start: the point to start from.
        columns: scores of each member's directions.

    Returns:
        (coefficients, the point there); f never rises.
    """
    B, n, c, _ = columns.shape
    a, at = columns.new_zeros(B, n, c), start
    going = torch.ones_like(start.value, dtype=torch.bool)
    for _ in range(_STEPS):
        H, g = _derivatives(problem, at, columns)
        # A row that is done stays where it is, whatever others need.
        step = torch.where(going[:, None], -torch.linalg.solve(H, g), 0.0).nan_to_num(0.0, 0.0, 0.0)
        promised = -0.5 * (g * step).sum(-1)
        a, at = _shorter(problem, columns, (a, at), start, step.view(B, n, c).to(a))
        going = going & (promised > _ENOUGH * (start.value - at.value))
        if not some(going):
            break
    return a, at


def _derivatives(
    problem: Projection, at: Point, columns: Float[Tensor, "B n c v"]
) -> tuple[Float[Tensor, "B k k"], Float[Tensor, "B k"]]:
    """The Hessian and the gradient of f in the coefficients, members side by side, fp64."""
    B, n, c, v = columns.shape
    joint = (problem.alpha[:, None, None] * columns).view(B, n * c, v)
    weighted = joint * at.p[:, None]
    mean = weighted.sum(-1).double()
    H, g = torch.bmm(weighted, joint.transpose(1, 2)).double() - mean[:, :, None] * mean[:, None], mean
    weighted = columns * at.r[:, :, None]
    means = weighted.sum(-1).double()
    own = (weighted @ columns.transpose(2, 3)).double() - means[..., None] * means[..., None, :]
    for i, (alpha, gamma) in enumerate(zip(problem.alpha, problem.gamma, strict=True)):
        here = slice(i * c, (i + 1) * c)
        H[:, here, here] += alpha * gamma * own[:, i]
        g[:, here] -= alpha * means[:, i]
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(diagonal.clamp_min(0) * (1 + _RIDGE * torch.finfo(columns.dtype).eps) + _TINY)
    return H, g


def _shorter(
    problem: Projection,
    columns: Float[Tensor, "B n c v"],
    here: tuple[Float[Tensor, "B n c"], Point],
    start: Point,
    step: Float[Tensor, "B n c"],
) -> tuple[Float[Tensor, "B n c"], Point]:
    """(coefficients, point) after as much of a step as lowers f; none of it where nothing does."""
    a, at = here
    t = torch.ones_like(at.value)
    for _ in range(_SHORTENED):
        new = a + t[:, None, None] * step
        found = Point.at(problem, start.z + torch.matmul(new[:, :, None], columns)[:, :, 0])
        worse = ~(found.value <= at.value)
        if not some(worse):
            return new, found
        t = torch.where(worse, t / 3, t)
    rows = worse.nonzero().squeeze(-1)
    keep = worse[:, None, None]
    return torch.where(keep, a, new), found.put(rows, Point(*(getattr(at, f.name)[rows] for f in fields(at))))
