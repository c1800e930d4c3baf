"""The dual of a relaxed I-projection near a point, on some tokens of each row: what a cheap inner solve works with.

For tokens K with masses u_j of p and w_ij of r_i (their sums kept), rows a_ij of Q_i, and a displacement s of ν,

    F(s) = U log Σ_K (u_j/U) exp(Σ_i α_i a_ijᵀs_i) + Σ_i ρ_i W_i log Σ_K (w_ij/W_i) exp(-γ_i a_ijᵀs_i)
           + shiftᵀ s + ½ Σ_i ridge_i |s_i|²

``shift`` makes ∇F(0) a given vector, whatever the tokens left out (a "surrogate" in the sense of Shamir, Srebro and
Zhang, DANE, ICML 2014). With masses of sampled tokens reweighted and a ridge for what they miss, its minimiser is a step.
With true masses, ∇F(0) = ∇f and no ridge, it is the dual of moving probability within K only: its minimiser is a feasible
point, and so a certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.solvers.gathered import Gathered, times, times_transposed

_ARMIJO = 1e-4
_HALVINGS = 30


@dataclass(frozen=True, eq=False)
class Surrogate:
    """See the module's docstring.

    Args:
        gathered: the tokens and their rows.
        log_u, log_w: log masses, (b, M) and (b, n, M), fp64; -inf for a token that counts for nothing.
        shift: (b, D); see :meth:`matched`.
        ridge: (b, n).
        alpha, gamma, trust: as :class:`softmeet.solvers.projection.Projection` has them.
    """

    gathered: Gathered
    log_u: Float[Tensor, "b M"]
    log_w: Float[Tensor, "b n M"]
    shift: Float[Tensor, "b D"]
    ridge: Float[Tensor, "b n"]
    alpha: tuple[float, ...]
    gamma: tuple[float, ...]
    trust: tuple[float, ...]

    def matched(self, gradient: Float[Tensor, "b D"]) -> Surrogate:
        """The same with ∇F(0) = ``gradient``."""
        own = self.gradient(torch.zeros_like(gradient), self.log_u.exp(), self.log_w.exp())
        return replace(self, shift=self.shift + gradient - own)

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
        squares = torch.stack([x.square().sum(-1) for x in s.split(self.gathered.widths, dim=-1)], dim=-1)
        return total + 0.5 * (self.ridge * squares).sum(-1)

    def gradient(
        self, s: Float[Tensor, "b D"], u: Float[Tensor, "b M"], w: Float[Tensor, "b n M"]
    ) -> Float[Tensor, "b D"]:
        """∇F(s), with (u, w) the masses there."""
        alpha = u.new_tensor(self.alpha)[:, None]
        return self.gathered.moments(alpha * (u[:, None] - w)) + self.shift + self.spread(self.ridge) * s

    def spread(self, per_member: Float[Tensor, "b n"]) -> Float[Tensor, "b D"]:
        """One number per member, repeated over its coordinates."""
        return per_member.repeat_interleave(torch.tensor(self.gathered.widths, device=per_member.device), dim=-1)

    def curvature(self, u: Float[Tensor, "b M"], w: Float[Tensor, "b n M"]) -> Float[Tensor, "b n"]:
        """The mean curvature per direction that masses (u, w) bring, about the origin, at the mean leverage."""
        alpha, gamma = u.new_tensor(self.alpha), u.new_tensor(self.gamma)
        return self.gathered.leverage * alpha * (alpha * u.sum(-1, keepdim=True) + gamma * w.sum(-1))


class Hessian:
    """∇²F where the masses are (u, w); call it with a direction."""

    def __init__(self, surrogate: Surrogate, u: Float[Tensor, "b M"], w: Float[Tensor, "b n M"]) -> None:
        self.surrogate, self.u, self.w = surrogate, u, w
        self.total, self.totals = u.sum(-1, keepdim=True), w.sum(-1, keepdim=True)
        self.alpha, self.gamma = u.new_tensor(surrogate.alpha)[:, None], u.new_tensor(surrogate.gamma)[:, None]
        self.ridge = surrogate.spread(surrogate.ridge)

    def __call__(self, d: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """The product with ``d``."""
        y = self.surrogate.gathered.scores(d)
        x = (self.alpha * y).sum(1)
        joint = self.u * (x - (self.u * x).sum(-1, keepdim=True) / self.total)
        own = self.w * (y - (self.w * y).sum(-1, keepdim=True) / self.totals)
        return self.surrogate.gathered.moments(self.alpha * (joint[:, None] + self.gamma * own)) + self.ridge * d


def _moved(log_m: Float[Tensor, "*b M"], x: Float[Tensor, "*b M"]) -> Float[Tensor, "*b M"]:
    moved = log_m + x
    return (moved - moved.logsumexp(-1, keepdim=True) + log_m.logsumexp(-1, keepdim=True)).exp()


def _log_growth(log_m: Float[Tensor, "b M"], x: Float[Tensor, "b M"]) -> Float[Tensor, " b"]:
    total = log_m.logsumexp(-1)
    return total.exp() * ((log_m + x).logsumexp(-1) - total)


class HeavyTokens:
    """A preconditioner: a ridge plus the k heaviest tokens exactly, inverted in token space.

    With B the rows of those tokens (block diagonal over members) and T their weights in the Hessian,
    (Λ + BᵀTB)⁻¹ = Λ⁻¹ - Λ⁻¹Bᵀ(I + T K)⁻¹T BΛ⁻¹ with K = BΛ⁻¹Bᵀ, a system of about n·k numbers (Woodbury). The other
    tokens count as one at their mean, of p and of each r_i, and through the ridge Λ.
    """

    def __init__(self, surrogate: Surrogate, u: Float[Tensor, "b M"], w: Float[Tensor, "b n M"], k: int) -> None:
        dtype, n, k = u.dtype, w.shape[1], min(k, u.shape[-1])
        gathered, self.widths = surrogate.gathered, surrogate.gathered.widths
        tokens = (u + w.sum(1)).topk(k).indices
        everywhere = tokens[:, None].expand(-1, n, -1)
        u_rest, w_rest = u.scatter(-1, tokens, 0.0), w.scatter(-1, everywhere, 0.0)
        ridge = surrogate.ridge + surrogate.curvature(u_rest, w_rest)
        self.alpha, self.gamma = u.new_tensor(surrogate.alpha), u.new_tensor(surrogate.gamma)
        means = torch.stack([gathered.moments(_unit(m)) for m in (u_rest[:, None].expand_as(w), w_rest)], dim=1)
        heavy = zip(gathered.whitened(tokens), means.split(self.widths, dim=-1), strict=True)
        rows = [torch.cat([a.to(dtype), mean], dim=1) for a, mean in heavy]
        none = torch.zeros_like(u[:, :1])
        self.u = torch.cat([u.gather(-1, tokens), u_rest.sum(-1, keepdim=True), none], dim=-1)
        w_end = torch.stack([none.expand(-1, n), w_rest.sum(-1)], dim=-1)
        self.w = torch.cat([w.gather(-1, everywhere), w_end], dim=-1)
        self.ridge = ridge.clamp_min(1e-10 * (ridge + surrogate.curvature(u, w))).clamp_min(torch.finfo(dtype).tiny)
        size = k + 2
        system = torch.zeros(len(u), n, size, n, size, dtype=dtype, device=u.device)
        for i, a in enumerate(rows):
            K = a @ a.transpose(1, 2) / self.ridge[:, i, None, None]
            joint = _covariance_times(self.u, K)
            for j in range(n):
                system[:, j, :, i] = self.alpha[i] * self.alpha[j] * joint
            system[:, i, :, i] += self.alpha[i] * self.gamma[i] * _covariance_times(self.w[:, i], K)
        system = system.reshape(len(u), n * size, n * size)
        system.diagonal(dim1=-2, dim2=-1).add_(1.0)
        self.lu, self.pivots = torch.linalg.lu_factor(system)
        self.rows = [a.to(gathered.rows[0].dtype) for a in rows]

    def __call__(self, g: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """The approximate inverse of the Hessian, applied to ``g``."""
        low = self.rows[0].dtype
        scaled = [x / self.ridge[:, i, None] for i, x in enumerate(g.split(self.widths, dim=-1))]
        y = torch.stack([times(a, x.to(low)) for a, x in zip(self.rows, scaled, strict=True)], dim=1).to(g.dtype)
        joint = _covariance_times(self.u, (self.alpha[:, None] * y).sum(1)[..., None]).squeeze(-1)
        own = _covariance_times(self.w, y[..., None]).squeeze(-1)
        Ty = self.alpha[:, None] * (joint[:, None] + self.gamma[:, None] * own)
        c = torch.linalg.lu_solve(self.lu, self.pivots, Ty.flatten(1)[..., None]).view_as(Ty).to(low)
        back = [times_transposed(a, c[:, i]) for i, a in enumerate(self.rows)]
        return torch.cat([x - d / self.ridge[:, i, None] for i, (x, d) in enumerate(zip(scaled, back, strict=True))], -1)


def _unit(m: Float[Tensor, "*b M"]) -> Float[Tensor, "*b M"]:
    return m / m.sum(-1, keepdim=True).clamp_min(torch.finfo(m.dtype).tiny)


def _covariance_times(m: Float[Tensor, "*b k"], X: Float[Tensor, "*b k c"]) -> Float[Tensor, "*b k c"]:
    """(diag(m) - m mᵀ / Σ m) X."""
    mean = (m[..., None, :] @ X) / m.sum(-1)[..., None, None].clamp_min(torch.finfo(m.dtype).tiny)
    return m[..., None] * (X - mean)


def conjugate_gradients(
    surrogate: Surrogate,
    masses: tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]],
    g: Float[Tensor, "b D"],
    precondition: HeavyTokens,
    reduction: float,
    limit: int,
) -> Float[Tensor, "b D"]:
    """∇²F⁻¹ g, until the preconditioned residual has fallen by ``reduction`` in every row; stopped rows stay put."""
    s, residual = torch.zeros_like(g), g
    y = precondition(residual)
    d, size = y, (residual * y).sum(-1)
    goal = reduction**2 * size
    hessian = Hessian(surrogate, *masses)
    for _ in range(limit):
        Hd = hessian(d)
        curvature = (d * Hd).sum(-1)
        going = (size > goal) & (curvature > 0)
        if not going.any():
            break
        step = torch.where(going, size / curvature, 0.0)[:, None]
        s, residual = s + step * d, residual - step * Hd
        y = precondition(residual)
        new = (residual * y).sum(-1)
        d = torch.where(going[:, None], y + (new / size)[:, None] * d, 0.0)
        size = torch.where(going, new, 0.0)
    return s


@dataclass(frozen=True)
class Minimum:
    """Where the inner solve ended: s, its scores, value and gradient, and the masses there."""

    s: Float[Tensor, "b D"]
    y: Float[Tensor, "b n M"]
    value: Float[Tensor, " b"]
    gradient: Float[Tensor, "b D"]
    masses: tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]]


def minimise(
    surrogate: Surrogate,
    precondition: HeavyTokens,
    start: Float[Tensor, "b D"],
    *,
    steps: int,
    reduction: float,
    limit: int,
    enough: Callable[[Minimum], Bool[Tensor, " b"]],
) -> Minimum:
    """Newton's method with conjugate gradients, at most ``steps`` times, until ``enough`` says so of every row."""
    now = _at(surrogate, start, surrogate.gathered.scores(start))
    for _ in range(steps):
        if bool(enough(now).all()):
            break
        d = conjugate_gradients(surrogate, now.masses, now.gradient, precondition, reduction, limit)
        decrement = (now.gradient * d).sum(-1)
        z = surrogate.gathered.scores(d)
        t = torch.ones_like(now.value)
        for _ in range(_HALVINGS):
            trial = surrogate.value(now.s - t[:, None] * d, now.y - t[:, None, None] * z)
            failed = ~(trial <= now.value - _ARMIJO * t * decrement)
            if not failed.any():
                break
            t = torch.where(failed, t / 2, t)
        t = torch.where(trial <= now.value, t, 0.0)
        if not t.any():
            break
        now = _at(surrogate, now.s - t[:, None] * d, now.y - t[:, None, None] * z)
    return now


def _at(surrogate: Surrogate, s: Float[Tensor, "b D"], y: Float[Tensor, "b n M"]) -> Minimum:
    masses = surrogate.masses(y)
    return Minimum(s, y, surrogate.value(s, y), surrogate.gradient(s, *masses), masses)
