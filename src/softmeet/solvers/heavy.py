"""A Newton direction from the heaviest tokens, whose curvature is exact, and a tail of known curvature."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.solvers.dual import DualState
from softmeet.solvers.projection import Projection
from softmeet.solvers.tail import tail_of

# Heavy tokens at the first step and at the most, and conjugate gradients of a direction.
_HEAVY, _HEAVIEST, _GRADIENTS = 128, 512, 10
# Elements of gathered rows that are worked on together: what stays in a processor's cache.
_CACHED_ELEMENTS = 1 << 21
# The least share of mass that a tail is taken to have.
_LEAST = 1e-6


def heaviest(problem: Projection, state: DualState, count: int) -> Int[Tensor, "B k"]:
    """The tokens of largest p + Σ ρ_i r_i, infinite trusts left out."""
    weight = state.log_p.exp() + (problem.price[:, None] * state.log_r.exp()).sum(1)
    return weight.topk(min(count, weight.shape[-1]), dim=-1).indices


def direction(problem: Projection, state: DualState) -> Float[Tensor, "B D"]:
    """-H⁻¹ ∇f, about: a direction in which f falls.

    Args:
        problem: the projection.
        state: where the gradient is known.
    """
    # Later steps are worth more.
    count = min(_HEAVIEST, _HEAVY << int(state.steps.max()))
    found = torch.empty_like(state.gradient)
    size = max(1, _CACHED_ELEMENTS // (count * len(problem.scale))) if found.device.type == "cpu" else len(found)
    for rows in torch.arange(len(found), device=found.device).split(size):
        here = state.take(rows)
        x = Around(problem.take(rows), here, count).solve(-here.gradient, _GRADIENTS)
        # Where it is no number, or f would rise along it, the gradient will do.
        falls = (x * here.gradient).sum(-1, keepdim=True) < 0
        found[rows] = torch.where(falls & x.isfinite().all(-1, keepdim=True), x, -here.gradient)
    return found


class Around:
    """H at some rows' points: of K heavy tokens, and of the mass of all others at the tail's curvature."""

    def __init__(self, problem: Projection, state: DualState, count: int) -> None:
        self.problem, self.tail = problem, tail_of(problem)
        tokens = heaviest(problem, state, count)
        self.rows = [h.gather(tokens) for h in problem.heads]
        dtype = max((x.dtype for x in self.rows), key=lambda one: one.itemsize)
        self.rows, self.dtype = [x.to(dtype) for x in self.rows], dtype
        self.scale, self.alpha, self.gamma = (x.to(dtype) for x in (problem.scale, problem.alpha, problem.gamma))
        self.p = state.log_p.gather(-1, tokens).exp().to(dtype)
        self.r = state.log_r.gather(-1, tokens[:, None].expand(-1, len(self.alpha), -1)).exp().to(dtype)
        self.of_p = (1 - self.p.sum(-1, keepdim=True)).clamp_min(_LEAST)
        self.of_r = (1 - self.r.sum(-1)).clamp_min(_LEAST)
        self.mean, self.covariance = self.tail.mean.to(dtype), self.tail.covariance.to(dtype)
        self.of_r_wide = problem.spread_rows(self.of_r)
        self.joint_mean = self._sums(self.p[:, None].expand_as(self.r)) + self.of_p * self.mean
        self.own_mean = self._sums(self.r) + self.of_r_wide * self.mean
        self.blocks = [self.covariance[here, here] for here in problem.places]

    def _sums(self, m: Float[Tensor, "b n K"]) -> Float[Tensor, "b D"]:
        """Σ_j m_ij q_ij of every member, side by side."""
        return torch.cat([torch.bmm(m[:, i, None], rows)[:, 0] for i, rows in enumerate(self.rows)], dim=-1)

    def times(self, x: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """H x."""
        problem = self.problem
        # As row vectors on the left, the only form that batched products of this shape are fast in.
        parts = zip(self.rows, problem.places, strict=True)
        y = torch.cat([torch.bmm(x[:, None, here], rows.transpose(1, 2)) for rows, here in parts], dim=1)
        scaled = self.scale * x
        joint = (self.alpha[:, None] * y).sum(1) - (self.joint_mean * scaled).sum(-1, keepdim=True)
        joint = self.p * joint
        centres = torch.stack([(self.own_mean[:, here] * x[:, here]).sum(-1) for here in problem.places], dim=1)
        own = self.r * (y - centres[..., None])
        found = self._sums(joint[:, None] + self.gamma[:, None] * own)
        found = found - joint.sum(-1, keepdim=True) * self.joint_mean + self.of_p * (scaled @ self.covariance)
        lost = problem.spread_rows(self.gamma * own.sum(-1)) * self.own_mean
        light = torch.cat([x[:, here] @ C for here, C in zip(problem.places, self.blocks, strict=True)], dim=-1)
        gamma = problem.spread(self.gamma)
        return self.scale * (found - lost + gamma * self.of_r_wide * light)

    def solve(self, b: Float[Tensor, "b D"], steps: int) -> Float[Tensor, "b D"]:
        """H⁻¹ b by conjugate gradients, with the tail's curvature at the mean mass of all tails as preconditioner."""
        inverse = self.tail.inverse(self.problem).to(self.dtype)
        mass = ((self.of_p[:, 0] + self.of_r.sum(-1)) / (1 + self.of_r.shape[1]))[:, None]
        residual = b.to(self.dtype)
        x, z = torch.zeros_like(residual), residual @ inverse / mass
        d, size = z, (residual * z).sum(-1, keepdim=True)
        tiny = torch.finfo(x.dtype).tiny
        for _ in range(steps):
            product = self.times(d)
            t = size / (d * product).sum(-1, keepdim=True).clamp_min(tiny)
            x, residual = x + t * d, residual - t * product
            z = residual @ inverse / mass
            new = (residual * z).sum(-1, keepdim=True)
            d, size = z + new / size.clamp_min(tiny) * d, new
        return x.double()
