"""Some tokens of each row: the heaviest, and a sample of the rest that stands for it.

Everything here is in the heads' own coordinates, x = R ν: whitening rows, or vectors at every product, would cost more
than the products. What whitening is for, a length that does not depend on coordinates, is kept as a metric: |Q ν|² =
xᵀ C x with C the head's covariance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet import kernels
from softmeet.heads import Whitening
from softmeet.solvers.projection import Projection

# Tokens from which the mean squared length of a whitened row is estimated.
_PROBES = 16
# How many are gathered at first: at least, in mean widths of the heads, and in widths of the widest.
_FEWEST, _WIDTHS, _WIDEST = 1024, 2.5, 1.5
# The number of gathered tokens grows by this share of its first size at every step.
_GROWTH = 0.2


@dataclass(frozen=True, eq=False)
class Gathered:
    """M tokens of every row.

    Args:
        tokens: ids; the first ``heavy`` are the heaviest, the rest are sampled and may repeat.
        log_weight: log importance of each, 0 for the heaviest.
        rows: of each member, those of S_i (W_i - 1cᵀ), in the dtype of products.
        whitenings: of each member.
        heavy: how many are not sampled.
    """

    tokens: Int[Tensor, "b M"]
    log_weight: Float[Tensor, "b M"]
    rows: tuple[Float[Tensor, "b M _"], ...]
    whitenings: tuple[Whitening, ...]
    heavy: int

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """d_i."""
        return tuple(a.shape[-1] for a in self.rows)

    @cached_property
    def leverage(self) -> Float[Tensor, "b n"]:
        """The mean of |Q_ij|² over its rank, estimated from a few of the sampled tokens, or of the lighter half."""
        M = self.tokens.shape[1]
        start = self.heavy if self.heavy < M else M // 2
        some = slice(start, None, max(1, (M - start) // _PROBES))
        means = []
        for a, white in zip(self.rows, self.whitenings, strict=True):
            probes = a[:, some].float()
            means.append(((probes @ white.precision) * probes).sum(-1).mean(-1) / max(white.rank, 1))
        return torch.stack(means, dim=-1).double()

    def heaviest(self, k: int) -> Gathered:
        """The first ``k`` tokens only, none of them sampled."""
        rows = tuple(a[:, :k] for a in self.rows)
        return Gathered(self.tokens[:, :k], self.log_weight[:, :k], rows, self.whitenings, k)

    @cached_property
    def compiled(self) -> bool:
        """Whether the compiled loops fit and pay; they take one row of the batch at a time."""
        return len(self.tokens) == 1 and kernels.fits(*[a[0] for a in self.rows])

    def at(self, places: Int[Tensor, "b k"]) -> list[Float[Tensor, "b k _"]]:
        """Rows at some places of the gathered tokens."""
        return [a.gather(1, places[..., None].expand(-1, -1, a.shape[-1])) for a in self.rows]

    def stretched(self, x: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """C_i x_i: half the gradient of the squared length."""
        parts = [part @ self.covariance(i, part.dtype) for i, part in enumerate(self.parts(x))]
        return torch.cat(parts, dim=-1).to(x.dtype)

    def covariance(self, i: int, dtype: torch.dtype) -> Float[Tensor, "d d"]:
        """C_i."""
        return self.whitenings[i].covariance.to(dtype)

    def scores(self, x: Float[Tensor, "b D"]) -> Float[Tensor, "b n M"]:
        """a_ijᵀ x_i."""
        return torch.stack([times(a, part) for a, part in zip(self.rows, self.parts(x), strict=True)], dim=1).to(
            x.dtype
        )

    def moments(self, m: Float[Tensor, "b n M"]) -> Float[Tensor, "b D"]:
        """Σ_j m_ij a_ij, all members side by side."""
        low = m.to(self.rows[0].dtype)
        return torch.cat([times_transposed(a, low[:, i]) for i, a in enumerate(self.rows)], dim=-1).to(m.dtype)

    def both_moments(
        self, m: Float[Tensor, "b n M"], w: Float[Tensor, "b n M"]
    ) -> tuple[Float[Tensor, "b D"], Float[Tensor, "b D"]]:
        """:meth:`moments` of two sets of masses, by one read."""
        dtype = self.rows[0].dtype
        if self.compiled:
            one, two = m[0].float().contiguous(), w[0].float().contiguous()
            pairs = [kernels.moments(a[0], one[i], two[i])[:, None] for i, a in enumerate(self.rows)]
        else:
            both = torch.stack([m, w], dim=2).to(dtype)
            pairs = [torch.bmm(both[:, i], a).transpose(0, 1) for i, a in enumerate(self.rows)]
        first, second = torch.cat(pairs, dim=-1).to(m.dtype)
        return first, second

    def parts(self, x: Float[Tensor, "b D"]) -> list[Float[Tensor, "b _"]]:
        """x_i, in the dtype of products."""
        return list(x.to(self.rows[0].dtype).split(self.widths, dim=-1))


def times(a: Float[Tensor, "b M d"], x: Float[Tensor, "b d"]) -> Float[Tensor, "b M"]:
    """A x for every row, as a row vector on the left: the only form that batched products of this shape are fast in."""
    return torch.bmm(x[:, None], a.transpose(1, 2)).squeeze(1)


def times_transposed(a: Float[Tensor, "b M d"], m: Float[Tensor, "b M"]) -> Float[Tensor, "b d"]:
    """Aᵀ m for every row."""
    return torch.bmm(m[:, None], a).squeeze(1)


def gather(
    problem: Projection,
    log_p: Float[Tensor, "b v"],
    log_r: Float[Tensor, "b n v"],
    heavy: int,
    sampled: int,
    offset: float,
) -> Gathered:
    """The ``heavy`` heaviest tokens by p + Σ ρ_i r_i, and ``sampled`` others, drawn in proportion to the same weight.

    ``offset`` in [0, 1) shifts the systematic sample: no random number is drawn, and a row's tokens are its own.
    """
    weight = token_weight(problem, log_p, log_r)
    top = weight.topk(heavy).indices
    if not sampled:
        return _gathered(problem, top, torch.zeros_like(top, dtype=weight.dtype), heavy)
    tail = weight.scatter(-1, top, 0.0).cumsum(-1)
    stride = tail[:, -1:] / sampled
    points = (torch.arange(sampled, dtype=weight.dtype, device=weight.device) + offset) * stride
    drawn = torch.searchsorted(tail, points).clamp_max(weight.shape[-1] - 1)
    importance = stride.log() - weight.gather(-1, drawn).log()
    tokens = torch.cat([top, drawn], dim=-1)
    log_weight = torch.cat([torch.zeros_like(top, dtype=weight.dtype), importance.nan_to_num(-math.inf, -math.inf)], -1)
    return _gathered(problem, tokens, log_weight, heavy)


def _gathered(
    problem: Projection, tokens: Int[Tensor, "b M"], log_weight: Float[Tensor, "b M"], heavy: int
) -> Gathered:
    rows = tuple(h.rows(tokens) for h in problem.heads)
    return Gathered(tokens, log_weight, rows, tuple(h.whitening for h in problem.heads), heavy)


def gathered_size(problem: Projection, step: int) -> int:
    """M: enough tokens that a change of their masses can repair the moments of any member, and more at later steps.

    More than the widest head, or than all members of infinite trust together, which only p can repair.
    """
    widths = [h.rank for h in problem.heads]
    mean = sum(widths) / len(widths)
    exact = sum(d for d, rho in zip(widths, problem.trust, strict=True) if math.isinf(rho))
    first = max(_FEWEST, _WIDTHS * mean, _WIDEST * max(widths), 2 * exact)
    return int(min(first * (1 + _GROWTH * step), problem.log_q.shape[-1] // 2))


def gathered_bytes(problem: Projection) -> int:
    """What the gathered rows of one row of the batch take at first."""
    return gathered_size(problem, 0) * sum(h.head.d * h.dtype.itemsize for h in problem.heads)


def token_weight(
    problem: Projection, log_p: Float[Tensor, "b v"], log_r: Float[Tensor, "b n v"]
) -> Float[Tensor, "b v"]:
    """P + Σ ρ_i r_i over the members of finite trust."""
    weight = log_p.exp()
    for i, rho in enumerate(problem.trust):
        if not math.isinf(rho):
            weight = weight + rho * log_r[:, i].exp()
    return weight
