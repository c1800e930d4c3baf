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
        shift: (b, D); see :meth:`matched`.
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

    def matched(self, gradient: Float[Tensor, "b D"]) -> Surrogate:
        """The same with ∇F(0) = ``gradient``."""
        own = self.slope(self.gathered.moments(self.log_u.exp()[:, None] - self.log_w.exp()))
        return replace(self, shift=self.shift + gradient - own)

    def origin(self, gradient: Float[Tensor, "b D"] | None = None) -> Point:
        """The point s = 0, of a surrogate matched to ``gradient`` if one is given."""
        y = torch.zeros_like(self.log_w)
        point = Point(self, torch.zeros_like(self.shift), y, torch.zeros_like(y[:, 0, 0]))
        if gradient is not None:
            # Its own would differ by the rounding of two products, next to which gradients may be small.
            vars(point)["gradient"] = gradient
        return point

    def shrinkage(self, since: Point, at: Point) -> Float[Tensor, " b"]:
        """The smallest share of its mass that a token has kept: ∇²F there ⪰ that share of ∇²F at ``since``."""
        shares = []
        for before, now in zip(since.masses, at.masses, strict=True):
            shares.append(torch.where(before > 0, now / before, 1.0).flatten(1).amin(-1))
        return torch.minimum(*shares).clamp_max(1.0)

    def masses(self, y: Float[Tensor, "b n M"]) -> tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]]:
        """(u, w) after the displacement with scores ``y``."""
        alpha, gamma = y.new_tensor(self.alpha)[:, None], y.new_tensor(self.gamma)[:, None]
        return _moved(self.log_u, (alpha * y).sum(1)), _moved(self.log_w, -gamma * y)

    def value(self, s: Float[Tensor, "b D"], y: Float[Tensor, "b n M"]) -> Float[Tensor, " b"]:
        """F(s), with y its scores; F(0) = 0."""
        alpha = y.new_tensor(self.alpha)[:, None]
        total = _log_growth(self.log_u, (alpha * y).sum(1)) + (self.shift * s).sum(-1)
        for i, rho in enumerate(self.trust):
            if math.isinf(rho):
                total = total - (self.log_w[:, i].exp() * y[:, i]).sum(-1)
            else:
                total = total + rho * _log_growth(self.log_w[:, i], -self.gamma[i] * y[:, i])
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


def _moved(log_m: Float[Tensor, "*b M"], x: Float[Tensor, "*b M"]) -> Float[Tensor, "*b M"]:
    moved = log_m + x
    return (moved - moved.logsumexp(-1, keepdim=True) + log_m.logsumexp(-1, keepdim=True)).exp()


def _log_growth(log_m: Float[Tensor, "b M"], x: Float[Tensor, "b M"]) -> Float[Tensor, " b"]:
    total = log_m.logsumexp(-1)
    return total.exp() * ((log_m + x).logsumexp(-1) - total)
