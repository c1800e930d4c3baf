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
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.heads import WhitenedHead
from softmeet.simplex import kl, log_normalize

# Moments, in whitened coordinates, that are this close are the members'.
MOMENT_TOLERANCE = 1e-6
# The least distance of all moments from the members' that counts as a proof; less may be rounding of the members.
SEPARATED = 1e-7


@dataclass(frozen=True, eq=False)
class Projection:
    """A batch of relaxed I-projections.

    Args:
        log_q: the pool, (B, v), fp64.
        log_p: the members, (B, n, v), fp64; finite wherever ``log_q`` is.
        heads: n whitened views over the same batch.
        trust: ρ_i in (0, inf].
        tol: the gap, in nats, at which a row is done.
        start: ν to begin at, (B, D); the pool, ν = 0, if None.
    """

    log_q: Float[Tensor, "B v"]
    log_p: Float[Tensor, "B n v"]
    heads: tuple[WhitenedHead, ...]
    trust: tuple[float, ...]
    tol: float
    start: Float[Tensor, "B D"] | None = None

    @cached_property
    def alpha(self) -> tuple[float, ...]:
        """λ_i = α_i ν_i."""
        return tuple(min(1.0, rho) for rho in self.trust)

    @cached_property
    def gamma(self) -> tuple[float, ...]:
        """r_i is tilted by -γ_i z_i."""
        return tuple(min(1.0, 1.0 / rho) for rho in self.trust)

    @cached_property
    def eps(self) -> float:
        """The unit round-off of the coarsest product."""
        return max(torch.finfo(h.dtype).eps for h in self.heads)

    def take(self, rows: Int[Tensor, " k"]) -> Projection:
        """Some rows of the batch, with fresh read counters."""
        heads = tuple(h.take(rows) for h in self.heads)
        start = None if self.start is None else self.start[rows]
        return replace(self, log_q=self.log_q[rows], log_p=self.log_p[rows], heads=heads, start=start)

    def passes(self) -> Float[Tensor, " B"]:
        """Rows of [Q_1 | … | Q_n] read so far on behalf of each row, over v; heads count by their widths."""
        reads = torch.stack([h.rows_read.double() * h.head.d for h in self.heads]).sum(0)
        return (reads / sum(h.head.d for h in self.heads) / self.log_q.shape[-1]).to(self.log_q.device)

    def weighted(self, z: Float[Tensor, "B n v"], factors: tuple[float, ...]) -> Float[Tensor, "B n v"]:
        """z_i times the i-th factor."""
        return z * torch.tensor(factors, dtype=z.dtype, device=z.device)[:, None]

    def scaled(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """α_i times member i's part."""
        parts = x.split([h.rank for h in self.heads], dim=-1)
        return torch.cat([alpha * part for alpha, part in zip(self.alpha, parts, strict=True)], dim=-1)

    def unwhitened(self, g: Float[Tensor, "B D"]) -> Float[Tensor, "B _"]:
        """A gradient in the heads' own coordinates."""
        parts = g.split([h.rank for h in self.heads], dim=-1)
        return torch.cat([x @ h.whitening.inverse for h, x in zip(self.heads, parts, strict=True)], dim=-1)

    def whitened(self, x: Float[Tensor, "B _"]) -> Float[Tensor, "B D"]:
        """A displacement from there in the coordinates of ν."""
        parts = x.split([h.head.d for h in self.heads], dim=-1)
        return torch.cat([x @ h.whitening.inverse.T for h, x in zip(self.heads, parts, strict=True)], dim=-1)

    def raw(self, nu: Float[Tensor, "B D"]) -> Float[Tensor, "B _"]:
        """Back: R_i ν_i, all members side by side."""
        parts = nu.split([h.rank for h in self.heads], dim=-1)
        return torch.cat([part @ h.whitening.factor.T for h, part in zip(self.heads, parts, strict=True)], dim=-1)

    def tilt(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, "B v"]:
        """Σ α_i z_i."""
        return self.weighted(z, self.alpha).sum(1)

    def pooled(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, "B v"]:
        """Log p."""
        return log_normalize(self.log_q + self.tilt(z))

    def corrected(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, "B n v"]:
        """Log r_i."""
        return log_normalize(self.log_p - self.weighted(z, self.gamma))

    def dual(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, " B"]:
        """F at the scores z: never below -(the primal optimum)."""
        value = (self.log_q + self.tilt(z)).logsumexp(-1)
        for i, rho in enumerate(self.trust):
            if math.isinf(rho):
                value = value - (self.log_p[:, i].exp() * z[:, i]).sum(-1)
            else:
                value = value + rho * (self.log_p[:, i] - self.gamma[i] * z[:, i]).logsumexp(-1)
        return value

    def pool_gap(self) -> Float[Tensor, " B"]:
        """Σ ρ_i KL(q‖p̂_i) ≥ -f*: how far from optimal the pool itself can be, found without reading a head."""
        total = torch.zeros_like(self.log_q[:, 0])
        for i, rho in enumerate(self.trust):
            divergence = kl(self.log_q, self.log_p[:, i])
            total = total + torch.where(divergence > 0, rho * divergence, 0.0)
        return total

    def rounding(
        self, p: Float[Tensor, "B v"], r: Float[Tensor, "B n v"], z: Float[Tensor, "B n v"], nu: Float[Tensor, "B D"]
    ) -> Float[Tensor, " B"]:
        """What rounding of the scores z of ν may do to f, in nats: the size of the tilts times the unit round-off.

        ``p`` and ``r`` may be those of a point nearby.
        """
        size = (p * self.tilt(z).abs()).sum(-1) + (r * self.weighted(z, self.alpha).abs()).sum((-1, -2))
        total = self.eps * size
        parts = nu.split([h.rank for h in self.heads], dim=-1)
        for alpha, head, part in zip(self.alpha, self.heads, parts, strict=True):
            total = total + alpha * head.lost_digits(part)
        return total

    def exact_part(self, nu: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """ν of the members with ρ_i = ∞; 0 for the others."""
        exact = tuple(float(math.isinf(rho)) for rho in self.trust)
        parts = nu.split([h.rank for h in self.heads], dim=-1)
        return torch.cat([keep * part for keep, part in zip(exact, parts, strict=True)], dim=-1)

    def excludes(
        self, z: Float[Tensor, "B n v"], nu: Float[Tensor, "B D"], size: Float[Tensor, " B"]
    ) -> Bool[Tensor, " B"]:
        """Whether ν, with scores z, is a Farkas proof: the exact members' part shows that no p has their moments.

        If Σ_i (z_ij - E_{p̂_i} z_i) < -δ |ν| for every token j in the support of q, sums over i with ρ_i = ∞, then no p
        on that support has moments that are nearer to theirs than δ, which is ``SEPARATED``. ``size`` is that of
        the scores whose rounding z has: those that it is the difference of.
        """
        exact = [i for i, rho in enumerate(self.trust) if math.isinf(rho)]
        if not exact:
            return torch.zeros_like(self.log_q[:, 0], dtype=torch.bool)
        part = z[:, exact]
        centred = (part - (self.log_p[:, exact].exp() * part).sum(-1, keepdim=True)).sum(1)
        highest = torch.where(self.log_q.isneginf(), -torch.inf, centred).amax(-1)
        margin = 64 * self.eps * size + SEPARATED * self.exact_part(nu).norm(dim=-1)
        excluded: Tensor = highest < -margin
        return excluded
