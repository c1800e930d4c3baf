"""Approximate inverses of a surrogate's Hessian, from its heaviest tokens and a simple model of the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.solvers.columns import squared
from softmeet.solvers.gathered import times, times_transposed
from softmeet.solvers.surrogate import Surrogate

_TINY, _TINY32 = 1e-300, 1e-38


class Preconditioner(ABC):
    """M = Λ + XᵀX, inverted by Woodbury: M⁻¹ = Λ⁻¹ - Yᵀ(I + XYᵀ)⁻¹Y with Y = XΛ⁻¹.

    X holds the k heaviest tokens exactly: their centred rows times the square roots of their weights, a layer for p and
    one for each r_i. The other tokens enter as one, at their mean, and through Λ, block diagonal over members.
    """

    def __init__(self, surrogate: Surrogate, u: Float[Tensor, "b M"], w: Float[Tensor, "b n M"], k: int) -> None:
        n, k = w.shape[1], min(k, u.shape[-1])
        gathered, self.widths = surrogate.gathered, surrogate.gathered.widths
        self.dtype = self.precision(gathered.rows[0].dtype)
        tokens = (u + w.sum(1)).topk(k).indices
        everywhere = tokens[:, None].expand(-1, n, -1)
        u_rest, w_rest = u.scatter(-1, tokens, 0.0), w.scatter(-1, everywhere, 0.0)
        means = gathered.both_moments(_unit(u_rest)[:, None].expand_as(w), _unit(w_rest))
        joint_mean, own_mean = (x.split(self.widths, dim=-1) for x in means)
        self.prepare(surrogate, (u, w), (u_rest, w_rest), own_mean)
        u_all = torch.cat([u.gather(-1, tokens), u_rest.sum(-1, keepdim=True)], dim=-1)
        w_all = torch.cat([w.gather(-1, everywhere), w_rest.sum(-1, keepdim=True)], dim=-1)
        self.k = k + 1
        system = torch.zeros(len(u), 1 + n, self.k, 1 + n, self.k, dtype=self.dtype, device=u.device)
        self.scaled: list[Float[Tensor, "b _ _"]] = []
        for i, found in enumerate(gathered.at(tokens)):
            a, alpha, gamma = found.to(self.dtype), surrogate.alpha[i], surrogate.gamma[i]
            joint = _layer(torch.cat([a, joint_mean[i][:, None].to(a.dtype)], dim=1), u_all, alpha**2)
            own = _layer(torch.cat([a, own_mean[i][:, None].to(a.dtype)], dim=1), w_all[:, i], alpha * gamma)
            layer = torch.cat([joint, own], dim=1)
            scaled = self.unscaled(i, layer)
            gram = (layer @ scaled.transpose(1, 2)).unflatten(1, (2, self.k)).unflatten(3, (2, self.k))
            places = (0, 1 + i)
            for x in (0, 1):
                for y in (0, 1):
                    system[:, places[x], :, places[y]] += gram[:, x, :, y]
            self.scaled.append(scaled)
        flat = system.reshape(len(u), (1 + n) * self.k, (1 + n) * self.k).double()
        flat = (flat + flat.transpose(1, 2)) / 2
        flat.diagonal(dim1=-2, dim2=-1).add_(1.0)
        factor, failed = torch.linalg.cholesky_ex(flat)
        # Where rounding spoils the system X is left out: M = Λ is smaller, and so is safe.
        spoilt = (failed > 0)[:, None, None]
        identity = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)
        self.inverse = torch.cholesky_inverse(torch.where(spoilt, identity, factor)).masked_fill(spoilt, 0.0)

    @abstractmethod
    def precision(self, products: torch.dtype) -> torch.dtype:
        """The dtype of X and its system, given that of the rows."""

    @abstractmethod
    def prepare(
        self,
        surrogate: Surrogate,
        masses: tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]],
        rest: tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]],
        own_mean: Sequence[Float[Tensor, "b _"]],
    ) -> None:
        """Make Λ, from all masses, those of the tokens that are not in X, and the means of Q_i under the latter."""

    @abstractmethod
    def unscaled(self, i: int, x: Float[Tensor, "b *k d"]) -> Float[Tensor, "b *k d"]:
        """Λ_i⁻¹ x."""

    def __call__(self, g: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """M⁻¹ g."""
        parts = [x.to(self.dtype) for x in g.split(self.widths, dim=-1)]
        up = self.inverse.new_zeros(len(g), 1 + len(parts), self.k)
        for i, (scaled, x) in enumerate(zip(self.scaled, parts, strict=True)):
            y = times(scaled, x)
            up[:, 0] += y[:, : self.k]
            up[:, 1 + i] = y[:, self.k :]
        c = times_transposed(self.inverse, up.flatten(1)).view(len(g), -1, self.k).to(self.dtype)
        out = [
            self.unscaled(i, x) - times_transposed(scaled, torch.cat([c[:, 0], c[:, 1 + i]], dim=-1))
            for i, (scaled, x) in enumerate(zip(self.scaled, parts, strict=True))
        ]
        return torch.cat(out, dim=-1).to(g.dtype)


class HeavyTokens(Preconditioner):
    """Λ_i a multiple of the head's covariance: the mean curvature that the light tokens bring."""

    def precision(self, products: torch.dtype) -> torch.dtype:
        """As the rows have."""
        return products

    def prepare(
        self,
        surrogate: Surrogate,
        masses: tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]],
        rest: tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]],
        own_mean: Sequence[Float[Tensor, "b _"]],
    ) -> None:
        """By the mean leverage of tokens."""
        ridge = surrogate.curvature(*rest) + (0.0 if surrogate.ridge is None else surrogate.ridge)
        # Below this, single precision would lose the heavy tokens' system.
        floor = 1e-6 * (ridge + surrogate.curvature(*masses))
        self.ridge = torch.maximum(ridge, floor).clamp_min(_TINY)
        self.inverses = [w.precision.to(self.dtype) for w in surrogate.gathered.whitenings]

    def unscaled(self, i: int, x: Float[Tensor, "b *k d"]) -> Float[Tensor, "b *k d"]:
        """Λ_i⁻¹ x."""
        return x @ self.inverses[i] / self.ridge[:, i].view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


class AllTokens(Preconditioner):
    """Λ the curvature that the light tokens' masses of r_i bring, d_i × d_i: never more than the Hessian has."""

    def precision(self, products: torch.dtype) -> torch.dtype:
        """Double: the heavy tokens may outweigh the light ones by many orders, and M must not exceed the Hessian."""
        return torch.float64

    def prepare(
        self,
        surrogate: Surrogate,
        masses: tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]],
        rest: tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]],
        own_mean: Sequence[Float[Tensor, "b _"]],
    ) -> None:
        """By one product of each member's rows with themselves."""
        self.factors: list[Float[Tensor, "b d d"]] = []
        for i, a in enumerate(surrogate.gathered.rows):
            weight = (surrogate.alpha[i] * surrogate.gamma[i] * rest[1][:, i]).to(a.dtype)
            x = a - own_mean[i][:, None].to(a.dtype)
            x *= weight.sqrt()[..., None]
            gram = squared(x)
            scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY32)
            ridge = 4 * torch.finfo(a.dtype).eps * scale
            for _ in range(6):
                gram.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
                factor, failed = torch.linalg.cholesky_ex(gram)
                if not failed.any():
                    break
                ridge = torch.where(failed > 0, 10 * ridge, 0.0)
            self.factors.append(factor.double())

    def unscaled(self, i: int, x: Float[Tensor, "b *k d"]) -> Float[Tensor, "b *k d"]:
        """Λ_i⁻¹ x."""
        columns = (x if x.ndim == 3 else x[:, None]).transpose(1, 2).to(self.factors[i].dtype)
        L = self.factors[i]
        # Two triangular solves take less time than cholesky_solve does for few columns.
        half = torch.linalg.solve_triangular(L, columns, upper=False)
        whole = torch.linalg.solve_triangular(L.transpose(1, 2), half, upper=True)
        found: Tensor = whole.transpose(1, 2).to(x.dtype)
        return found if x.ndim == 3 else found[:, 0]


def _layer(rows: Float[Tensor, "b k d"], mass: Float[Tensor, "b k"], weight: float) -> Float[Tensor, "b k d"]:
    """√(weight · mass_j) (rows_j - their mean)."""
    mass = mass.to(rows.dtype)
    mean = times_transposed(rows, mass) / mass.sum(-1, keepdim=True).clamp_min(_TINY32)
    return (weight * mass).sqrt()[..., None] * (rows - mean[:, None])


def _unit(m: Float[Tensor, "*b M"]) -> Float[Tensor, "*b M"]:
    return m / m.sum(-1, keepdim=True).clamp_min(_TINY)
