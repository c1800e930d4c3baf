"""Approximate inverses of a surrogate's Hessian, from its heaviest tokens and a simple model of the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from softmeet.conjugate_kernels import Inverse
from softmeet.solvers.columns import squared
from softmeet.solvers.gathered import times, times_transposed
from softmeet.solvers.surrogate import Point

Masses = tuple[Float[Tensor, "b M"], Float[Tensor, "b n M"]]
HeavyMasses = tuple[Float[Tensor, "b k"], Float[Tensor, "b n k"]]

_TINY, _TINY32 = 1e-300, 1e-38
# A share of all mass that single precision cannot tell from none.
_LOST = 1e-6


class Preconditioner(ABC):
    """M = Λ + XᵀX, inverted by Woodbury: M⁻¹ = Λ⁻¹ - XᵀΛ⁻¹(I + XΛ⁻¹Xᵀ)⁻¹XΛ⁻¹.

    X holds the k heaviest tokens exactly: their centred rows times the square roots of their weights, a layer for p and
    one for each r_i. The other tokens enter as one, at their mean, and through Λ, block diagonal over members. Layers
    differ in weights only, X_l = T_l R_i with R_i one matrix of rows: M⁻¹ = Λ⁻¹ - BᵀKB with B_i = R_i Λ_i⁻¹ and
    K = Tᵀ(I + T R Bᵀ Tᵀ)⁻¹ T.
    """

    def __init__(self, at: Point, k: int) -> None:
        (u, w), gathered = at.masses, at.surrogate.gathered
        n, k, self.widths = w.shape[1], min(k, u.shape[-1]), gathered.widths
        self.dtype = self.precision(gathered.rows[0].dtype)
        tokens = (u + w.sum(1)).topk(k).indices
        everywhere = tokens[:, None].expand(-1, n, -1)
        u_rest, w_rest = u.scatter(-1, tokens, 0.0), w.scatter(-1, everywhere, 0.0)
        exact = gathered.at(tokens)
        means = self.means(at, exact, (u.gather(-1, tokens), w.gather(-1, everywhere)), (u_rest, w_rest))
        joint_mean, own_mean = (x.split(self.widths, dim=-1) for x in means)
        self.prepare(at, (u_rest, w_rest), own_mean)
        # Two rows of R_i are means of the rest: under u for the layer of p, under w_i for that of r_i.
        of_p = pad(torch.cat([u.gather(-1, tokens), u_rest.sum(-1, keepdim=True)], dim=-1), (0, 1))
        of_r = torch.cat([pad(w.gather(-1, everywhere), (0, 1)), w_rest.sum(-1, keepdim=True)], dim=-1)
        size = k + 2
        system = torch.zeros(len(u), 1 + n, size, 1 + n, size, dtype=torch.float64, device=u.device)
        self.rows: list[Float[Tensor, "b _ _"]] = []
        self.scaled: list[Float[Tensor, "b _ _"]] = []
        layers: list[tuple[_Layer, _Layer]] = []
        for i, found in enumerate(exact):
            alpha, gamma = at.surrogate.alpha[i], at.surrogate.gamma[i]
            joint, own = _Layer(alpha**2 * of_p), _Layer(alpha * gamma * of_r[:, i])
            rows = torch.cat([found, joint_mean[i][:, None], own_mean[i][:, None]], dim=1).to(self.dtype)
            # About a common centre, or differences between rows would be lost.
            rows = rows - times_transposed(rows, joint.share.to(rows.dtype))[:, None]
            scaled = self.unscaled(i, rows)
            gram = (rows @ scaled.transpose(1, 2)).double()
            for x, left in ((0, joint), (1 + i, own)):
                half = left.times(gram).transpose(1, 2)
                for y, right in ((0, joint), (1 + i, own)):
                    system[:, x, :, y] += right.times(half).transpose(1, 2)
            self.rows.append(rows)
            self.scaled.append(scaled)
            layers.append((joint, own))
        flat = system.flatten(3).flatten(1, 2)
        flat = (flat + flat.transpose(1, 2)) / 2
        flat.diagonal(dim1=-2, dim2=-1).add_(1.0)
        factor, failed = torch.linalg.cholesky_ex(flat)
        # Where rounding spoils the system X is left out: M = Λ is smaller, and so is safe.
        spoilt = (failed > 0)[:, None, None]
        identity = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)
        inverse = torch.cholesky_inverse(torch.where(spoilt, identity, factor)).masked_fill(spoilt, 0.0)
        self.core = _folded(_folded(inverse, layers).transpose(1, 2), layers)

    @abstractmethod
    def precision(self, products: torch.dtype) -> torch.dtype:
        """The dtype of X and its system, given that of the rows."""

    @abstractmethod
    def means(
        self, at: Point, exact: Sequence[Float[Tensor, "b k _"]], masses: HeavyMasses, rest: Masses
    ) -> tuple[Float[Tensor, "b D"], Float[Tensor, "b D"]]:
        """Those of the tokens that are not in X, under their masses ``rest`` of p and of r_i; X has rows ``exact``."""

    @abstractmethod
    def prepare(self, at: Point, rest: Masses, own_mean: Sequence[Float[Tensor, "b _"]]) -> None:
        """Make Λ, from the masses of the tokens that are not in X, and the means of W_i under those of r_i."""

    @abstractmethod
    def unscaled(self, i: int, x: Float[Tensor, "b *k d"]) -> Float[Tensor, "b *k d"]:
        """Λ_i⁻¹ x."""

    def __call__(self, g: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """M⁻¹ g."""
        parts = [x.to(self.dtype) for x in g.split(self.widths, dim=-1)]
        up = torch.cat([times(scaled, x) for scaled, x in zip(self.scaled, parts, strict=True)], dim=-1)
        c = times_transposed(self.core, up.double()).to(self.dtype).chunk(len(parts), dim=-1)
        out = [
            self.unscaled(i, x) - times_transposed(scaled, down)
            for i, (scaled, x, down) in enumerate(zip(self.scaled, parts, c, strict=True))
        ]
        return torch.cat(out, dim=-1).to(g.dtype)


class HeavyTokens(Preconditioner):
    """Λ_i a multiple of the head's covariance: the mean curvature that the light tokens bring."""

    def precision(self, products: torch.dtype) -> torch.dtype:
        """As the rows have."""
        return products

    def means(
        self, at: Point, exact: Sequence[Float[Tensor, "b k _"]], masses: HeavyMasses, rest: Masses
    ) -> tuple[Float[Tensor, "b D"], Float[Tensor, "b D"]]:
        """By taking X off the means of all tokens, which are known; of little use where hardly anything is left."""
        difference, own = at.moments
        whole, found = (difference + own, own), []
        for layer in (0, 1):
            parts = []
            for i, (rows, total) in enumerate(zip(exact, whole[layer].split(self.widths, dim=-1), strict=True)):
                heavy, light = (m[0] if layer == 0 else m[1][:, i] for m in (masses, rest))
                left, mass = total - times_transposed(rows, heavy.to(rows.dtype)), light.sum(-1, keepdim=True)
                lost = mass <= _LOST * heavy.sum(-1, keepdim=True)
                parts.append(torch.where(lost, 0.0, left / mass.clamp_min(_TINY)))
            found.append(torch.cat(parts, dim=-1))
        return found[0], found[1]

    def prepare(self, at: Point, rest: Masses, own_mean: Sequence[Float[Tensor, "b _"]]) -> None:
        """By the mean leverage of tokens."""
        surrogate = at.surrogate
        ridge = surrogate.curvature(*rest) + (0.0 if surrogate.ridge is None else surrogate.ridge)
        # Below this, single precision would lose the heavy tokens' system.
        floor = 1e-6 * (ridge + surrogate.curvature(*at.masses))
        self.ridge = torch.maximum(ridge, floor).clamp_min(_TINY)
        self.inverses = [w.precision.to(self.dtype) for w in surrogate.gathered.whitenings]

    def unscaled(self, i: int, x: Float[Tensor, "b *k d"]) -> Float[Tensor, "b *k d"]:
        """Λ_i⁻¹ x."""
        return x @ self.inverses[i] / self.ridge[:, i].view(-1, *[1] * (x.ndim - 1)).to(x.dtype)

    def compiled(self) -> Inverse:
        """Of a batch of one row, for compiled loops."""
        rows, scaled = ([x[0].contiguous() for x in some] for some in (self.rows, self.scaled))
        return Inverse(rows, scaled, self.inverses, self.core[0].contiguous(), self.ridge[0])


class AllTokens(Preconditioner):
    """Λ the curvature that the light tokens' masses of r_i bring, d_i × d_i: never more than the Hessian has."""

    def precision(self, products: torch.dtype) -> torch.dtype:
        """Double: the heavy tokens may outweigh the light ones by many orders, and M must not exceed the Hessian."""
        return torch.float64

    def means(
        self, at: Point, exact: Sequence[Float[Tensor, "b k _"]], masses: HeavyMasses, rest: Masses
    ) -> tuple[Float[Tensor, "b D"], Float[Tensor, "b D"]]:
        """By a read of their rows."""
        u, w = rest
        return at.surrogate.gathered.both_moments(_unit(u)[:, None].expand_as(w), _unit(w))

    def prepare(self, at: Point, rest: Masses, own_mean: Sequence[Float[Tensor, "b _"]]) -> None:
        """By one product of each member's rows with themselves."""
        self.factors: list[Float[Tensor, "b d d"]] = []
        surrogate = at.surrogate
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


class _Layer:
    """T = √weight (I - 1 shareᵀ): what turns rows into those of one distribution, centred and weighted."""

    def __init__(self, weight: Float[Tensor, "b k"]) -> None:
        self.root, self.share = weight.sqrt(), _unit(weight)

    def times(self, x: Float[Tensor, "b k m"]) -> Float[Tensor, "b k m"]:
        """T x."""
        return self.root[..., None] * (x - times_transposed(x, self.share)[:, None])

    def times_transposed(self, x: Float[Tensor, "b k m"]) -> Float[Tensor, "b k m"]:
        """Tᵀ x."""
        weighted = self.root[..., None] * x
        return weighted - self.share[..., None] * weighted.sum(1, keepdim=True)


def _folded(x: Float[Tensor, "b _ m"], layers: Sequence[tuple[_Layer, _Layer]]) -> Float[Tensor, "b _ m"]:
    """Tᵀ x of all layers: rows by p and by every r_i in, rows by member out."""
    of_p, *of_r = x.chunk(1 + len(layers), dim=1)
    parts = [
        joint.times_transposed(of_p) + own.times_transposed(mine)
        for (joint, own), mine in zip(layers, of_r, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _unit(m: Float[Tensor, "*b M"]) -> Float[Tensor, "*b M"]:
    return m / m.sum(-1, keepdim=True).clamp_min(_TINY)
