"""A Newton direction from the heaviest tokens, whose curvature is exact, and a tail of known curvature."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from softmeet.solvers.base import some
from softmeet.solvers.projection import Projection
from softmeet.solvers.tail import tail_of

# Heavy tokens of a row: at least so many, and so many for a column of all heads. Steps from the third on double them,
# up to a share of the vocabulary and a number: late steps are lost to tails.
_HEAVY, _FOR_A_COLUMN, _LARGEST, _MOST = 256, 5 / 12, 1 / 4, 2048
# Conjugate gradients of a direction, at most, and the masses that their preconditioner has exactly.
_GRADIENTS, _EXACT = 64, 96
# The share of the residual, in the preconditioner's metric, that they leave: on peaked rows what they leave is what has
# to move furthest.
_REDUCTION = 0.1
# Elements of gathered rows that are worked on together: what stays in a processor's cache.
_CACHED_ELEMENTS = 1 << 23
# The least share of mass that a tail is taken to have.
_LEAST = 1e-6


def direction(
    problem: Projection, gradient: Float[Tensor, "B D"], p: Float[Tensor, "B v"], r: Float[Tensor, "B n v"], step: int
) -> Float[Tensor, "B D"]:
    """-H⁻¹ ∇f, about: a direction in which f falls.

    Args:
        problem: the projection.
        gradient: ∇f at the point.
        p, r: the distributions there.
        step: how many were taken before.
    """
    found = torch.empty_like(gradient)
    count = heavy_tokens(problem, step)
    row = count * problem.read
    size = max(1, _CACHED_ELEMENTS // row) if found.device.type == "cpu" else len(found)
    for rows in torch.arange(len(found), device=found.device).split(size):
        g = gradient[rows]
        here = problem.take(rows)
        x = Around(here, p[rows], r[rows], count).solve(-here.unwhitened(g), _GRADIENTS, _REDUCTION)
        x = here.whitened(x)
        # Where it is no number, or f would rise along it, the gradient will do.
        falls = (x * g).sum(-1, keepdim=True) < 0
        found[rows] = torch.where(falls & x.isfinite().all(-1, keepdim=True), x, -g)
    return found


def heavy_tokens(problem: Projection, step: int) -> int:
    """How many tokens of a row have their curvature exactly."""
    v, least = problem.log_q.shape[-1], max(_HEAVY, int(_FOR_A_COLUMN * problem.read))
    return min(v, _MOST, max(least, min(least << max(0, step - 1), int(_LARGEST * v))))


class Around:
    """H at some rows' points: of K heavy tokens, and of the mass of all others at the tail's curvature.

    In the heads' own coordinates, D = Σ d_i: rows are not whitened, only what goes in and what comes out.
    """

    def __init__(self, problem: Projection, p: Float[Tensor, "b v"], r: Float[Tensor, "b n v"], count: int) -> None:
        self.problem, self.tail = problem, tail_of(problem)
        # Infinite trusts have no price: there r does not change.
        weight = p + (problem.price[:, None] * r).sum(1)
        tokens: Int[Tensor, "b K"] = weight.topk(count, dim=-1).indices
        rows = [h.rows(tokens) for h in problem.heads]
        self.dtype = max((x.dtype for x in rows), key=lambda one: one.itemsize)
        self.rows = [x.to(self.dtype) for x in rows]
        self.alpha, self.gamma = problem.alpha.to(self.dtype), problem.gamma.to(self.dtype)
        ends = torch.tensor([0] + [x.shape[-1] for x in rows]).cumsum(0).tolist()
        self.places = [slice(*pair) for pair in pairwise(ends)]
        self.scale = self._spread(self.alpha)
        self.p = p.gather(-1, tokens).to(self.dtype)
        self.r = r.gather(-1, tokens[:, None].expand(-1, len(self.alpha), -1)).to(self.dtype)
        self.of_p = (1 - self.p.sum(-1, keepdim=True)).clamp_min(_LEAST)
        self.of_r = (1 - self.r.sum(-1)).clamp_min(_LEAST)
        self.mean, self.covariance = self.tail.mean.to(self.dtype), self.tail.covariance.to(self.dtype)
        self.of_r_wide = self._spread(self.of_r)
        self.joint_mean = self._sums(self.p[:, None].expand_as(self.r)) + self.of_p * self.mean
        self.own_mean = self._sums(self.r) + self.of_r_wide * self.mean
        self.blocks = [self.covariance[here, here] for here in self.places]

    def _spread(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b D"]:
        widths = torch.tensor([h.stop - h.start for h in self.places], device=x.device)
        return x.repeat_interleave(widths, dim=-1)

    def _sums(self, m: Float[Tensor, "b n K"]) -> Float[Tensor, "b D"]:
        """Σ_j m_ij q_ij of every member, side by side."""
        return torch.cat([torch.bmm(m[:, i, None], rows)[:, 0] for i, rows in enumerate(self.rows)], dim=-1)

    def times(self, x: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """Multiply directions by H, which is never formed."""
        # As row vectors on the left, the only form that batched products of this shape are fast in.
        parts = zip(self.rows, self.places, strict=True)
        y = torch.cat([torch.bmm(x[:, None, here], rows.transpose(1, 2)) for rows, here in parts], dim=1)
        scaled = self.scale * x
        joint = (self.alpha[:, None] * y).sum(1) - (self.joint_mean * scaled).sum(-1, keepdim=True)
        joint = self.p * joint
        centres = torch.stack([(self.own_mean[:, here] * x[:, here]).sum(-1) for here in self.places], dim=1)
        own = self.r * (y - centres[..., None])
        found = self._sums(joint[:, None] + self.gamma[:, None] * own)
        # Deviations from a mean sum to 0 with those of light tokens, so the sums of the others tell theirs.
        found = found - joint.sum(-1, keepdim=True) * self.mean + self.of_p * (scaled @ self.covariance)
        lost = self._spread(self.gamma * own.sum(-1)) * self.mean
        light = torch.cat([x[:, here] @ C for here, C in zip(self.places, self.blocks, strict=True)], dim=-1)
        return self.scale * (found - lost + self._spread(self.gamma) * self.of_r_wide * light)

    def solve(self, b: Float[Tensor, "b D"], steps: int, reduction: float = 0.0) -> Float[Tensor, "b D"]:
        """H⁻¹ b by preconditioned conjugate gradients, until the residual falls by ``reduction`` or the steps end."""
        precondition = _Preconditioner(self)
        residual = b.to(self.dtype)
        x, z = torch.zeros_like(residual), precondition(residual)
        d, size = z, (residual * z).sum(-1, keepdim=True)
        goal, tiny = reduction**2 * size, torch.finfo(x.dtype).tiny
        for _ in range(steps):
            going = size > goal
            if not some(going[:, 0]):
                break
            product = self.times(d)
            t = torch.where(going, size / (d * product).sum(-1, keepdim=True).clamp_min(tiny), 0.0)
            x, residual = x + t * d, residual - t * product
            z = precondition(residual)
            new = (residual * z).sum(-1, keepdim=True)
            # A row that is done stays where it is, whatever others need.
            d, size = torch.where(going, z + new / size.clamp_min(tiny) * d, d), torch.where(going, new, size)
        return x.to(b)


class _Preconditioner:
    """H⁻¹ with the largest masses of p and all r_i exactly, and the tail's curvature at the mean mass of all tails.

    By Woodbury: (τ T + UᵀU)⁻¹ = (T⁻¹ - T⁻¹Uᵀ(τ + U T⁻¹Uᵀ)⁻¹U T⁻¹) / τ.
    """

    def __init__(self, around: Around) -> None:
        K = around.p.shape[1]
        self.inverse = around.tail.inverse(around.problem).to(around.dtype)
        self.mass = ((around.of_p[:, 0] + around.of_r.sum(-1)) / (1 + around.of_r.shape[1]))[:, None]
        own = (around.alpha * around.gamma)[:, None] * around.r
        heaviest = torch.cat([around.p[:, None], own], dim=1).flatten(1).topk(max(1, min(_EXACT, K // 4)), dim=-1)
        layer, token = heaviest.indices // K, heaviest.indices % K
        U = torch.cat([rows.gather(1, token[..., None].expand(-1, -1, rows.shape[-1])) for rows in around.rows], dim=-1)
        own_means = [pad(around.own_mean[:, h], (h.start, U.shape[-1] - h.stop)) for h in around.places]
        means = [around.joint_mean, *own_means]
        share = torch.zeros(len(means), U.shape[-1], dtype=U.dtype, device=U.device)
        share[0] = around.scale
        for i, here in enumerate(around.places):
            share[1 + i, here] = 1
        wide = layer[..., None].expand(-1, -1, U.shape[-1])
        U = U * share[layer] - torch.stack(means, dim=1).gather(1, wide) * share[layer]
        U = U * heaviest.values.sqrt()[..., None]
        self.low = U @ self.inverse
        G = torch.bmm(self.low, U.transpose(1, 2)).double()
        diagonal = G.diagonal(dim1=-2, dim2=-1)
        diagonal += self.mass.double() + torch.finfo(U.dtype).eps * diagonal.mean(-1, keepdim=True)
        factor, _ = torch.linalg.cholesky_ex(G)
        self.low_inverse = torch.cholesky_inverse(factor)

    def __call__(self, g: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        low = torch.bmm(torch.bmm(g[:, None], self.low.transpose(1, 2)).double(), self.low_inverse)
        return (g @ self.inverse - torch.bmm(low.to(g), self.low)[:, 0]) / self.mass
