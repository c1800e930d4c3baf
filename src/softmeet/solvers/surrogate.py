"""The dual of a relaxed I-projection near a point, on some tokens of each row: what a cheap inner solve works with.

For tokens K with masses u_j of p and w_ij of r_i (their sums kept), centred rows a_ij of W_i, C_i = W_iᵀW_i of all of
them, and a displacement s of the dual variables in the heads' own coordinates,

    F(s) = U log Σ_K (u_j/U) exp(Σ_i α_i a_ijᵀs_i) + Σ_i ρ_i W_i log Σ_K (w_ij/W_i) exp(-γ_i a_ijᵀs_i)
           + shiftᵀ s + ½ Σ_i ridge_i s_iᵀC_i s_i

``shift`` makes ∇F(0) a given vector, whatever the tokens left out (a "surrogate" in the sense of Shamir, Srebro and
Zhang, DANE, ICML 2014). With masses of sampled tokens reweighted and a ridge for what they miss, its minimiser is a
step. With true masses, ∇F(0) = ∇f and no ridge, it is the dual of moving probability within K only: its minimiser is a
feasible point, and so a certificate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.solvers.gathered import Gathered


@dataclass(frozen=True, eq=False)
class Surrogate:
    """See the module's docstring.

    Args:
        gathered: the tokens and their rows.
        log_u, log_w: log masses, (b, M) and (b, n, M), fp64; -inf for a token that counts for nothing.
        shift: (b, D); see :meth:`Point.matched`.
        ridge: (b, n), or None for none.
        alpha, gamma, trust: as :class:`softmeet.solvers.projection.Projection` has them.
    """

    gathered: Gathered
    log_u: Float[Tensor, "b M"]
    log_w: Float[Tensor, "b n M"]
    shift: Float[Tensor, "b D"]
    ridge: Float[Tensor, "b n"] | None
    alpha: tuple[float, ...]
    gamma: tuple[float, ...]
    trust: tuple[float, ...]

    @cached_property
    def log_masses(self) -> Float[Tensor, "b m M"]:
        """Those of p and of every r_i."""
        return torch.cat([self.log_u[:, None], self.log_w], dim=1)

    @cached_property
    def log_totals(self) -> Float[Tensor, "b m 1"]:
        """Of :attr:`log_masses`."""
        return self.log_masses.logsumexp(-1, keepdim=True)

    def origin(self) -> Point:
        """The point s = 0."""
        y = torch.zeros_like(self.log_w)
        return Point(self, torch.zeros_like(self.shift), y, torch.zeros_like(y[:, 0, 0]))

    def shrinkage(self, since: Point, at: Point) -> Float[Tensor, " b"]:
        """The smallest share of its mass that a token has kept: ∇²F there ⪰ that share of ∇²F at ``since``."""
        shares = []
        for before, now in zip(since.masses, at.masses, strict=True):
            shares.append(torch.where(before > 0, now / before, 1.0).flatten(1).amin(-1))
        return torch.minimum(*shares).clamp_max(1.0)

    def masses(self, y: Float[Tensor, "b n M"]) -> tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]]:
        """(u, w) after the displacement with scores ``y``."""
        moved = self.log_masses + self.tilts(y)
        masses = (moved - moved.logsumexp(-1, keepdim=True) + self.log_totals).exp()
        return masses[:, 0], masses[:, 1:]

    def tilts(self, y: Float[Tensor, "b n M"]) -> Float[Tensor, "b m M"]:
        """What scores ``y`` add to the log masses, before these are normalised."""
        alpha, gamma = y.new_tensor(self.alpha)[:, None], y.new_tensor(self.gamma)[:, None]
        return torch.cat([(alpha * y).sum(1, keepdim=True), -gamma * y], dim=1)

    def value(self, s: Float[Tensor, "b D"], y: Float[Tensor, "b n M"]) -> Float[Tensor, " b"]:
        """F(s), with y its scores; F(0) = 0."""
        grown = (self.log_masses + self.tilts(y)).logsumexp(-1, keepdim=True) - self.log_totals
        grown = (self.log_totals.exp() * grown).squeeze(-1)
        total = grown[:, 0] + (self.shift * s).sum(-1)
        for i, rho in enumerate(self.trust):
            fixed = math.isinf(rho)
            total = total + (-(self.log_w[:, i].exp() * y[:, i]).sum(-1) if fixed else rho * grown[:, 1 + i])
        return total if self.ridge is None else total + 0.5 * (s * self.pull(s)).sum(-1)

    def pull(self, s: Float[Tensor, "b D"]) -> Float[Tensor, "b D"] | float:
        """The gradient of the ridge's part, ridge_i C_i s_i."""
        return 0.0 if self.ridge is None else self.spread(self.ridge) * self.gathered.stretched(s)

    def slope(self, difference: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """∇F(s) without the ridge's part, from the moments of u - w_i there."""
        return self.spread(difference.new_tensor(self.alpha)[None]) * difference + self.shift

    def spread(self, per_member: Float[Tensor, "b n"]) -> Float[Tensor, "b D"]:
        """One number per member, repeated over its coordinates."""
        return per_member.repeat_interleave(torch.tensor(self.gathered.widths, device=per_member.device), dim=-1)

    def curvature(self, u: Float[Tensor, "b M"], w: Float[Tensor, "b n M"]) -> Float[Tensor, "b n"]:
        """The mean curvature per direction that masses (u, w) bring, about the origin, at the mean leverage."""
        alpha, gamma = u.new_tensor(self.alpha), u.new_tensor(self.gamma)
        return self.gathered.leverage * alpha * (alpha * u.sum(-1, keepdim=True) + gamma * w.sum(-1))


@dataclass(frozen=True, eq=False)
class Point:
    """A displacement s, its scores y and F(s); what takes a read of the gathered rows is found when it is wanted."""

    surrogate: Surrogate
    s: Float[Tensor, "b D"]
    y: Float[Tensor, "b n M"]
    value: Float[Tensor, " b"]

    @cached_property
    def masses(self) -> tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]]:
        """(u, w)."""
        return self.surrogate.masses(self.y)

    @cached_property
    def moments(self) -> tuple[Float[Tensor, "b D"], Float[Tensor, "b D"]]:
        """Those of u - w_i and of w_i."""
        u, w = self.masses
        return self.surrogate.gathered.both_moments(u[:, None] - w, w)

    @cached_property
    def gradient(self) -> Float[Tensor, "b D"]:
        """∇F(s)."""
        return self.surrogate.slope(self.moments[0]) + self.surrogate.pull(self.s)

    def matched(self, gradient: Float[Tensor, "b D"]) -> Point:
        """The point s = 0, which this is, of the same surrogate but for a shift that makes ∇F(0) = ``gradient``."""
        shift = self.surrogate.shift + gradient - self.gradient
        point = Point(replace(self.surrogate, shift=shift), self.s, self.y, self.value)
        # The gradient's own would differ by the rounding of two products, next to which it may be small.
        vars(point).update(masses=self.masses, moments=self.moments, gradient=gradient)
        return point
