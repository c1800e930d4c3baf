"""Some tokens of each row: the heaviest, and a sample of the rest that stands for it.

Rows of the heads are kept as they are; the whitening factor is applied to the short vectors on either side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.solvers.projection import Projection


# Tokens from which the mean squared length of a whitened row is estimated.
_PROBES = 64


@dataclass(frozen=True, eq=False)
class Gathered:
    """M tokens of every row.

    Args:
        tokens: ids; the first ``heavy`` are the heaviest, the rest are sampled and may repeat.
        log_weight: log importance of each, 0 for the heaviest.
        rows: of each member, those of S_i (W_i - 1cᵀ), in the dtype of products.
        factors: R_i, in the same dtype.
        heavy: how many are not sampled.
    """

    tokens: Int[Tensor, "b M"]
    log_weight: Float[Tensor, "b M"]
    rows: tuple[Float[Tensor, "b M _"], ...]
    factors: tuple[Float[Tensor, "_ _"], ...]
    heavy: int

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The ranks of the heads."""
        return tuple(R.shape[1] for R in self.factors)

    @cached_property
    def leverage(self) -> Float[Tensor, "b n"]:
        """The mean of |Q_ij|² over its rank, estimated from a few of the sampled tokens."""
        some = slice(self.heavy, None, max(1, (self.tokens.shape[1] - self.heavy) // _PROBES))
        means = [(a[:, some] @ R).square().mean((-1, -2)) for a, R in zip(self.rows, self.factors, strict=True)]
        return torch.stack(means, dim=-1).double()

    def whitened(self, tokens: Int[Tensor, "b k"]) -> tuple[Float[Tensor, "b k _"], ...]:
        """Rows of Q_i at some places of the gathered tokens."""
        return tuple(
            a.gather(1, tokens[..., None].expand(-1, -1, a.shape[-1])) @ R
            for a, R in zip(self.rows, self.factors, strict=True)
        )

    def scores(self, s: Float[Tensor, "b D"]) -> Float[Tensor, "b n M"]:
        """Q_ijᵀ s_i."""
        parts = s.to(self.rows[0].dtype).split(self.widths, dim=-1)
        found = [times(a, x @ R.T) for a, R, x in zip(self.rows, self.factors, parts, strict=True)]
        return torch.stack(found, dim=1).to(s.dtype)

    def moments(self, m: Float[Tensor, "b n M"]) -> Float[Tensor, "b D"]:
        """Σ_j m_ij Q_ij, all members in one vector."""
        low = m.to(self.rows[0].dtype)
        parts = [times_transposed(a, low[:, i]) @ R for i, (a, R) in enumerate(zip(self.rows, self.factors, strict=True))]
        return torch.cat(parts, dim=-1).to(m.dtype)


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
    tail = weight.scatter(-1, top, 0.0).cumsum(-1)
    stride = tail[:, -1:] / sampled
    points = (torch.arange(sampled, dtype=weight.dtype, device=weight.device) + offset) * stride
    drawn = torch.searchsorted(tail, points).clamp_max(weight.shape[-1] - 1)
    importance = stride.log() - weight.gather(-1, drawn).log()
    tokens = torch.cat([top, drawn], dim=-1)
    log_weight = torch.cat([torch.zeros_like(top, dtype=weight.dtype), importance.nan_to_num(-math.inf, -math.inf)], -1)
    rows = tuple(h.rows(tokens) for h in problem.heads)
    factors = tuple(h.whitening.factor.to(h.dtype) for h in problem.heads)
    return Gathered(tokens, log_weight, rows, factors, heavy)


def token_weight(
    problem: Projection, log_p: Float[Tensor, "b v"], log_r: Float[Tensor, "b n v"]
) -> Float[Tensor, "b v"]:
    """p + Σ ρ_i r_i over the members of finite trust."""
    weight = log_p.exp()
    for i, rho in enumerate(problem.trust):
        if not math.isinf(rho):
            weight = weight + rho * log_r[:, i].exp()
    return weight
