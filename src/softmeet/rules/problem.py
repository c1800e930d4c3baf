"""What a rule is given: the members' distributions and heads, checked once, flattened to one batch dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.errors import DisjointSupportError
from softmeet.heads import SoftmaxHead, WhitenedHead, Whitening
from softmeet.simplex import log_normalize, logit_mean, prob_mean
from softmeet.solvers.projection import Projection

Pool = Literal["logit-mean", "prob-mean"]
OnInfeasible = Literal["meet", "raise"]
Metric = Literal["whitened", "raw"]
# Small enough to cost little where the premise fails; `softmeet fit` chooses better ones from text.
DEFAULT_TRUST = 0.3
POOLS = {"logit-mean": logit_mean, "prob-mean": prob_mean}


@dataclass(frozen=True)
class Options:
    """What else a rule may be asked for.

    Args:
        rank: keep this many of each head's largest singular directions; None for all. A relaxation.
        free_radial: free the directions that the final norm hides from the gradient.
        metric: of ``least-squares``.
        slack: τ: moments may differ from the members' at ‖Qᵀ(p - p̂)‖² / 2τ nats; of the linear and quadratic programs.
        vertex: answer a degenerate linear or quadratic program by some vertex.
    """

    rank: int | None = None
    free_radial: bool = False
    metric: Metric = "whitened"
    slack: float = 0.0
    vertex: bool = False

    @property
    def moments(self) -> tuple[int | None, bool]:
        """What says which moments count; the other options are of single rules."""
        return self.rank, self.free_radial

    def relaxes(self, heads: Sequence[SoftmaxHead]) -> bool:
        """Whether fewer moments count than every member's."""
        cut = self.rank is not None and any(self.rank < head.whitening().rank for head in heads)
        return cut or self.free_radial


@dataclass(frozen=True, eq=False)
class Start:
    """Where to begin: each member's λ_i, (B, d_i), in its head's own coordinates, found at those trusts.

    ``ray`` is a proof that a row has no feasible distribution, of the same shapes; zeros where there is none.
    """

    dual: tuple[Float[Tensor, "B _"], ...]
    ray: tuple[Float[Tensor, "B _"], ...]
    trust: tuple[float, ...]

    def take(self, rows: Int[Tensor, " k"]) -> Start:
        """Some rows."""
        return replace(self, dual=tuple(part[rows] for part in self.dual), ray=tuple(part[rows] for part in self.ray))

    def towards(self, members: Sequence[int], trust: Sequence[float]) -> list[Float[Tensor, "B _"]]:
        """Each λ_i for those trusts: member i's correction λ_i / ρ_i changes little with ρ.

        If all are infinite, a row whose proof is known begins with it.
        """
        found = []
        for i in members:
            scalable = 0 < self.trust[i] < math.inf and trust[i] < math.inf
            found.append(self.dual[i] * (trust[i] / self.trust[i] if scalable else 1.0))
        if all(math.isinf(trust[i]) for i in members):
            proved = torch.stack([part.any(-1) for part in self.ray]).any(0)[:, None]
            found = [torch.where(proved, self.ray[i], lam) for i, lam in zip(members, found, strict=True)]
        return found


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch of rows to combine.

    Args:
        log_p: the members' log-probabilities, (n, B, v), fp64, normalised.
        heads: n heads; head i may have fewer than v rows.
        slopes: per member, the slope of its soft-cap, (B, v), or None.
        weights: (n,), fp64.
        trust: ρ_i in [0, inf].
        pool: which pool the relaxation starts from.
        support: (v,), the tokens that may be answered, or None for all.
        tol: nats.
        max_steps: the solver's limit.
        dtype: of products with heads, fp32 or fp64.
        options: see :class:`Options`.
        free: per member, directions of its hidden state that carry no constraint, (B, k_i, d_i); empty for none.
        start: where the search for an I-projection begins; at the pool if None.
        precision: the unit round-off of the log-probabilities as they were given.
    """

    log_p: Float[Tensor, "n B v"]
    heads: tuple[SoftmaxHead, ...]
    slopes: tuple[Float[Tensor, "B v"] | None, ...]
    weights: Float[Tensor, " n"]
    trust: tuple[float, ...]
    pool: Pool
    support: Bool[Tensor, " v"] | None
    tol: float
    max_steps: int
    dtype: torch.dtype
    options: Options = Options()
    free: tuple[Float[Tensor, "B _ _"], ...] = ()
    start: Start | None = None
    precision: float = torch.finfo(torch.float64).eps

    def take(self, rows: Int[Tensor, " k"]) -> Problem:
        """Some rows of the batch."""
        slopes = tuple(None if s is None else s[rows] for s in self.slopes)
        free, start = tuple(f[rows] for f in self.free), None if self.start is None else self.start.take(rows)
        return replace(self, log_p=self.log_p[:, rows], slopes=slopes, free=free, start=start)

    def rows(self) -> list[Problem]:
        """One problem per row."""
        return [self.take(torch.tensor([k], device=self.log_p.device)) for k in range(self.log_p.shape[1])]

    def pieces(self) -> list[Problem]:
        """Parts whose rows share one view of each head: all of it, or one row each where directions are free."""
        return self.rows() if self.free and self.log_p.shape[1] > 1 else [self]

    def restricted(self, log_q: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """``log_q`` on the tokens that may be answered, renormalised.

        Raises:
            DisjointSupportError: a row has no such token.
        """
        out = log_q if self.support is None else log_normalize(log_q.masked_fill(~self.support, -torch.inf))
        _refuse_empty(out.isnan().any(-1))
        return out

    @cached_property
    def log_pool(self) -> Float[Tensor, "B v"]:
        """The pool q on the support that all members share.

        Raises:
            DisjointSupportError: a row has no such token.
        """
        shared = (~self.log_p.isneginf()).all(0)
        if self.support is not None:
            shared &= self.support
        _refuse_empty(~shared.any(-1))
        q = POOLS[self.pool](self.log_p, self.weights)
        # Rows that lose nothing stay what the pool's own rule gives, to the last bit.
        cut = (~shared & ~q.isneginf()).any(-1, keepdim=True)
        return torch.where(cut, log_normalize(q.masked_fill(~shared, -torch.inf)), q)

    def require_common_tokens(self) -> None:
        """Raise for all rows at once, before they are taken one by one.

        Raises:
            DisjointSupportError: a row has no token that every member allows.
        """
        assert self.log_pool is not None

    def views(self, members: Sequence[int]) -> tuple[WhitenedHead, ...]:
        """Whitened views of some members' heads, without the directions that are free, and fresh read counters."""
        batch, v = self.log_p.shape[1:]
        place = self.log_p.device
        return tuple([
            WhitenedHead(self.heads[i], v, self.dtype, self.slopes[i], batch, place, self._whitening(i))
            for i in members
        ])  # fmt: skip

    def _whitening(self, i: int) -> Whitening:
        """Of head i, cut to ``rank`` and without its free directions.

        W_iᵀ(p - p̂_i) = R⁻ᵀ Q_iᵀ(p - p̂_i) is a combination of directions u exactly if Q_iᵀ(p - p̂_i) is one of Rᵀu.
        """
        whole = self.heads[i].whitening(self.options.rank)
        if not self.free or not self.log_p.shape[1]:
            return whole
        assert self.log_p.shape[1] == 1, "rows with free directions are solved one by one"
        lost = self.free[i][0].to(whole.factor) @ whole.factor  # (k, rank)
        kept = torch.linalg.svd(lost, full_matrices=True).Vh[len(lost) :]
        return whole.narrowed(kept.T).without(self.free[i][0])

    def projection(self, members: Sequence[int], trust: Sequence[float]) -> Projection:
        """The relaxed I-projection of the pool for those members, all of positive trust."""
        projection = Projection(
            log_q=self.log_pool,
            log_p=self.log_p[list(members)].transpose(0, 1),
            heads=self.views(members),
            trust=tuple([trust[i] for i in members]),
            tol=self.tol,
        )
        if self.start is not None:
            parts = zip(self.start.towards(members, trust), projection.alpha, projection.heads, strict=True)
            white = [lam / alpha @ h.whitening.inverse.T for lam, alpha, h in parts]
            projection.start = torch.cat(white, dim=-1)
        return projection

    def met_alike(self, other: Problem) -> bool:
        """Whether ``meet``'s solution of this problem is one of ``other``, if both have the same heads."""
        mine, theirs = self.support, other.support
        support = mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs))
        rows = torch.equal(self.log_p, other.log_p) and torch.equal(self.weights, other.weights)
        return (
            (self.trust, self.pool, self.options.moments) == (other.trust, other.pool, other.options.moments)
            and rows and support and self.tol <= other.tol
        )  # fmt: skip

    def relaxed(self) -> Problem:
        """The same problem with the default trust wherever it is infinite."""
        return replace(self, trust=finite_trust(self.trust))


def finite_trust(trust: Sequence[float]) -> tuple[float, ...]:
    """With the default in place of infinity: of what answers rows that have no feasible distribution."""
    return tuple(DEFAULT_TRUST if math.isinf(rho) else rho for rho in trust)


def _refuse_empty(rows: Bool[Tensor, " B"]) -> None:
    if rows.any():
        raise DisjointSupportError(
            "expected a token with positive probability under every member (and in support=), found none in rows "
            f"{rows.nonzero().flatten().tolist()[:8]}: combine fewer members, or use rule='prob-mean'"
        )
