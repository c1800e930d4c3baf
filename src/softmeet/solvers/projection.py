"""The relaxed I-projection, its dual function, and the numbers that follow from a dual point.

    minimise  KL(p‖q) + Σ_i ρ_i KL(r_i‖p̂_i)   over p, r_i in the simplex,  Q_iᵀ p = Q_iᵀ r_i

with 0 < ρ_i ≤ ∞; ρ_i = ∞ means r_i = p̂_i. With λ_i = α_i ν_i, α_i = min(1, ρ_i), γ_i = min(1, 1/ρ_i), z_i = Q_i ν_i,

    f(ν) = log Σ q exp(Σ_i α_i z_i) + Σ_i ρ_i log Σ p̂_i exp(-γ_i z_i)   → min
    p = softmax(log q + Σ α_i z_i),  r_i = softmax(log p̂_i - γ_i z_i),  ∇_i f = α_i Q_iᵀ(p - r_i).

The scaling keeps small and large trusts alike well conditioned: ρ_i γ_i = α_i at every ρ_i. Vectors over the
vocabulary are fp64; only products with heads run in the heads' dtype. Everything is in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from softmeet.batched import Batched
from softmeet.heads import WhitenedHead
from softmeet.simplex import kl, log_normalize

# Moments, in whitened coordinates, that are this close are the members'.
MOMENT_TOLERANCE = 1e-6
# The least distance of all moments from the members' that counts as a proof; less may be rounding of the members.
SEPARATED = 1e-7


@dataclass(eq=False)
class Projection:
    """A batch of relaxed I-projections.

    Args:
        log_q: the pool, (B, v), fp64.
        log_p: the members, (B, n, v), fp64; finite wherever ``log_q`` is.
        heads: n whitened views over the same batch.
        trust: ρ_i in (0, inf].
        tol: the gap, in nats, at which a row is done.
        start: ν to begin at, (B, D); the pool, ν = 0, if None.
        pool_may_answer: a row is done, too, once KL(q‖p°) is proved to be at most ``tol``.

    Attributes:
        alpha, gamma: α_i and γ_i, fp64.
        scale: α_i for each coordinate of ν.
        price: ρ_i, with 0 in place of infinity: what r_i costs where it may change.
        exact: whether ρ_i is infinite.
        widths, places: how many coordinates ν_i has, and which of ν they are.
        eps: the unit round-off of the vectors, or of the coarsest product.
        read: Σ d_i: what a token's rows of all heads count for.
    """

    log_q: Float[Tensor, "B v"]
    log_p: Float[Tensor, "B n v"]
    heads: tuple[WhitenedHead, ...]
    trust: tuple[float, ...]
    tol: float
    start: Float[Tensor, "B D"] | None = None
    pool_may_answer: bool = False
    alpha: Float[Tensor, " n"] = field(init=False)
    gamma: Float[Tensor, " n"] = field(init=False)
    price: Float[Tensor, " n"] = field(init=False)
    exact: Bool[Tensor, " n"] = field(init=False)
    scale: Float[Tensor, " D"] = field(init=False)
    widths: list[int] = field(init=False)
    places: list[slice] = field(init=False)
    eps: float = field(init=False)
    read: int = field(init=False)

    def __post_init__(self) -> None:
        rho = self.log_q.new_tensor(self.trust)
        self.alpha, self.gamma, self.exact = rho.clamp_max(1.0), (1 / rho).clamp_max(1.0), rho.isinf()
        self.price = rho.masked_fill(self.exact, 0.0)
        self.widths, self.places, self.eps, self.read = [], [], torch.finfo(self.log_q.dtype).eps, 0
        for h in self.heads:
            start = sum(self.widths)
            self.widths.append(h.rank)
            self.places.append(slice(start, start + h.rank))
            self.eps = max(self.eps, torch.finfo(h.dtype).eps)
            self.read += h.head.d
        self.scale = self.spread(self.alpha)

    def take(self, rows: Int[Tensor, " k"]) -> Projection:
        """Return the problem of some rows of the batch, (k,)."""
        heads = tuple(h.take(rows) for h in self.heads)
        start = None if self.start is None else self.start[rows]
        return replace(self, log_q=self.log_q[rows], log_p=self.log_p[rows], heads=heads, start=start)

    def passes(self) -> Float[Tensor, " B"]:
        """Return how often all heads were read so far on behalf of each row; each head counts by its width."""
        total = torch.zeros_like(self.log_q[:, 0])
        for h in self.heads:
            total += h.rows_read[h.at] * h.head.d
        return total / self.read / self.log_q.shape[-1]

    def spread(self, x: Shaped[Tensor, "*b n"]) -> Shaped[Tensor, "*b D"]:
        """Repeat a value of each member for each of its coordinates of ν."""
        return x.repeat_interleave(torch.tensor(self.widths, device=x.device), dim=-1)

    def unwhitened(self, g: Float[Tensor, "B D"]) -> Float[Tensor, "B _"]:
        """Take a gradient in whitened coordinates, (B, D), to the heads' own, (B, Σ d_i)."""
        parts = g.split(self.widths, dim=-1)
        found = [x.double() @ h.whitening.inverse for h, x in zip(self.heads, parts, strict=True)]
        return torch.cat(found, dim=-1).to(g)

    def whitened(self, x: Float[Tensor, "B _"]) -> Float[Tensor, "B D"]:
        """Take a displacement in the heads' own coordinates, (B, Σ d_i), to those of ν, (B, D)."""
        parts = x.split([h.head.d for h in self.heads], dim=-1)
        found = [y.double() @ h.whitening.inverse.T for h, y in zip(self.heads, parts, strict=True)]
        return torch.cat(found, dim=-1).to(x)

    def single(self) -> Projection:
        """Return the same problem with vectors over the vocabulary in fp32."""
        start = None if self.start is None else self.start.float()
        return replace(self, log_q=self.log_q.float(), log_p=self.log_p.float(), start=start)

    def scores(self, nu: Float[Tensor, "B D"]) -> Float[Tensor, "B n v"]:
        """Return the scores Q_i ν_i of dual variables, by one read of every head."""
        parts = zip(self.heads, nu.split(self.widths, dim=-1), strict=True)
        return torch.stack([h.scores(part) for h, part in parts], dim=1)

    def moments(self, x: Float[Tensor, "B n v"]) -> Float[Tensor, "B D"]:
        """Return α_i Q_iᵀ x_i of every member, side by side, by one read of every head.

        With x_i = p - r_i this is the gradient of f.
        """
        parts = zip(self.alpha, self.heads, x.unbind(1), strict=True)
        return torch.cat([alpha * h.moments(one)[0] for alpha, h, one in parts], dim=-1)

    def tilt(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, "B v"]:
        """Return Σ α_i z_i, which scores add to the logarithm of the pool, in nats."""
        return (self.alpha[:, None] * z).sum(1)

    def pooled(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, "B v"]:
        """Return the answer at some scores, log p = log q + Σ α_i z_i, normalised."""
        return log_normalize(self.log_q + self.tilt(z))

    def corrected(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, "B n v"]:
        """Return every member as corrected by some scores, log r_i = log p̂_i - γ_i z_i, normalised."""
        return log_normalize(self.log_p - self.gamma[:, None] * z)

    def dual(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, " B"]:
        """Return f at the scores z, in nats: never below minus the primal optimum."""
        own = (self.log_p - self.gamma[:, None] * z).logsumexp(-1)
        return self.value((self.log_q + self.tilt(z)).logsumexp(-1), own, z)

    def value(
        self, joint: Float[Tensor, " B"], own: Float[Tensor, "B n"], z: Float[Tensor, "B n v"]
    ) -> Float[Tensor, " B"]:
        """Return f at the scores z from the logarithms of its sums, that of the pool and those of the members."""
        for i, rho in enumerate(self.trust):
            part = -(self.log_p[:, i].exp() * z[:, i]).sum(-1) if math.isinf(rho) else rho * own[:, i]
            joint = joint + part
        return joint

    def pool_gap(self) -> Float[Tensor, " B"]:
        """Return Σ ρ_i KL(q‖p̂_i) ≥ -f*, in nats: how far from optimal the pool can be. Reads no head."""
        divergence = kl(self.log_q[:, None].expand_as(self.log_p), self.log_p)
        return torch.where(divergence > 0, divergence * divergence.new_tensor(self.trust), 0.0).sum(-1)

    def rounding(
        self, p: Float[Tensor, "B v"], r: Float[Tensor, "B n v"], z: Float[Tensor, "B n v"], nu: Float[Tensor, "B D"]
    ) -> Float[Tensor, " B"]:
        """Estimate what rounding of the scores z of ν may do to f, in nats: tilts times the unit round-off.

        ``p`` and ``r`` may be those of a point nearby.
        """
        tilts = self.alpha[:, None] * z
        total = self.eps * ((p * tilts.sum(1).abs()).sum(-1) + (r * tilts.abs()).sum((-1, -2)))
        for alpha, h, part in zip(self.alpha, self.heads, nu.split(self.widths, dim=-1), strict=True):
            # What centring cancels in the scores.
            lost = (h.raw(part)[0].abs() @ h.whitening.center.abs()).to(total)
            total = total + alpha * torch.finfo(h.dtype).eps * lost
        return total

    def exact_part(self, nu: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Keep ν of the members with ρ_i = ∞, with 0 for the others."""
        return nu * self.spread(self.exact)

    def excludes(
        self, z: Float[Tensor, "B n v"], nu: Float[Tensor, "B D"], size: Float[Tensor, " B"]
    ) -> Bool[Tensor, " B"]:
        """Say where ν, with scores z, is a Farkas proof: the exact members' part shows that no p has their moments.

        If Σ_i (z_ij - E_{p̂_i} z_i) < -δ |ν| for every token j in the support of q, sums over i with ρ_i = ∞, then no p
        on that support has moments that are nearer to theirs than δ, which is ``SEPARATED``. ``size`` is that of
        the scores whose rounding z has: those that it is the difference of.
        """
        part = z[:, self.exact]
        centred = (part - (self.log_p[:, self.exact].exp() * part).sum(-1, keepdim=True)).sum(1)
        highest = torch.where(self.log_q.isneginf(), -torch.inf, centred).amax(-1)
        margin = 64 * self.eps * size + SEPARATED * self.exact_part(nu).norm(dim=-1)
        excluded: Tensor = highest < -margin
        return excluded


@dataclass(frozen=True, eq=False)
class Point(Batched):
    """The distributions at some scores z, and the dual value there: log p and log r_i are log q + Σ α_i z_i - joint
    and log p̂_i - γ_i z_i - own.
    """

    z: Float[Tensor, "B n v"]
    p: Float[Tensor, "B v"]
    r: Float[Tensor, "B n v"]
    joint: Float[Tensor, "B 1"]
    own: Float[Tensor, "B n 1"]
    value: Float[Tensor, " B"]

    @classmethod
    def at(cls, problem: Projection, z: Float[Tensor, "B n v"]) -> Point:
        """Evaluate the dual at the scores z, with one exponential of each entry."""
        p, joint = _softmax(problem.log_q + problem.tilt(z))
        r, own = _softmax(problem.log_p - problem.gamma[:, None] * z)
        return cls(z, p, r, joint, own, problem.value(joint[..., 0], own[..., 0], z))

    def slope(self, problem: Projection, y: Float[Tensor, "B n v"]) -> Float[Tensor, " B"]:
        """Return the derivative of f along a direction with the scores ``y``: Σ α_i (E_p y_i - E_{r_i} y_i)."""
        return (problem.alpha * ((self.p[:, None] - self.r) * y).sum(-1)).sum(-1)

    def logs(self, problem: Projection) -> tuple[Float[Tensor, "B v"], Float[Tensor, "B n v"]]:
        """Return (log p, log r) in nats."""
        log_p = problem.log_q + problem.tilt(self.z) - self.joint
        return log_p, problem.log_p - problem.gamma[:, None] * self.z - self.own


def _softmax(x: Float[Tensor, "*b v"]) -> tuple[Float[Tensor, "*b v"], Float[Tensor, "*b 1"]]:
    """Return (the softmax of x, the logarithm of its normaliser)."""
    top = x.amax(-1, keepdim=True)
    p = (x - top).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), top + total.log()
