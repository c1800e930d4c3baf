"""What a rule is given: the members' distributions and heads, checked once, flattened to one batch dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.batched import Batched
from softmeet.errors import DisjointSupportError, InvalidInputError
from softmeet.heads import SoftmaxHead, WhitenedHead, Whitening
from softmeet.rules.settings import Settings
from softmeet.simplex import kl, log_normalize, logit_mean, prob_mean
from softmeet.solvers.projection import Projection

_POOLING = {"logit-mean": logit_mean, "prob-mean": prob_mean}


@dataclass(frozen=True, eq=False)
class Start(Batched):
    """Where to begin: each member's λ_i, (B, d_i), in its head's own coordinates, found at those trusts.

    ``ray`` is a proof that a row has no feasible distribution, of the same shapes; zeros where there is none.
    """

    dual: tuple[Float[Tensor, "B _"], ...]
    ray: tuple[Float[Tensor, "B _"], ...]
    trust: tuple[float, ...]

    def towards(self, members: Sequence[int], trust: Sequence[float]) -> list[Float[Tensor, "B _"]]:
        """Return each λ_i for other trusts: member i's correction λ_i / ρ_i changes little with ρ.

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
class TokensBefore(Batched):
    """The token before each row, (B,), and what spells it: a tokenizer's ``decode``."""

    ids: Int[Tensor, " B"]
    spell: Callable[[list[int]], str]

    @classmethod
    def of(cls, ids: Int[Tensor, " B"], tokenizer: Any) -> TokensBefore | None:
        """Pair token ids, (B,), with the tokenizer that spells them; return None where there is no tokenizer."""
        return None if tokenizer is None else cls(ids, tokenizer.decode)


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch of rows to combine.

    Args:
        log_p: the members' log-probabilities, (n, B, v), fp64, normalised.
        heads: n heads; head i may have fewer than v rows.
        slopes: per member, the slope of its soft-cap, (B, v), or None.
        settings: how they are combined, with a weight and a trust for each member.
        support: (v,), the tokens that may be answered, or None for all.
        dtype: of products with heads, fp32 or fp64.
        free: per member, directions of its hidden state that carry no constraint, (B, k_i, d_i); empty for none.
        start: where the search for an I-projection begins; at the pool if None.
        precision: the unit round-off of the log-probabilities as they were given.
        proved: whether an answer's gap has to be bounded; else the solver's estimate of it will do.
        before: the token before each row, where the text is known, as in generation.
    """

    log_p: Float[Tensor, "n B v"]
    heads: tuple[SoftmaxHead, ...]
    slopes: tuple[Float[Tensor, "B v"] | None, ...]
    settings: Settings
    support: Bool[Tensor, " v"] | None
    dtype: torch.dtype
    free: tuple[Float[Tensor, "B _ _"], ...] = ()
    start: Start | None = None
    precision: float = torch.finfo(torch.float64).eps
    proved: bool = True
    before: TokensBefore | None = None

    @cached_property
    def weights(self) -> Float[Tensor, " n"]:
        """The weight of each member in the pool, fp64."""
        return self.log_p.new_tensor(self.settings.weights)

    @property
    def trust(self) -> tuple[float, ...]:
        """The trust ρ_i of each member, in nats per nat, from 0 to inf."""
        return self.settings.member_trust

    @property
    def tol(self) -> float:
        """The gap in nats at which a row is done."""
        return self.settings.tol

    def changed(self, dtype: torch.dtype | None = None, **settings: Any) -> Problem:
        """Copy with some settings, or the dtype of products, replaced; they are not checked again."""
        return replace(self, settings=self.settings.model_copy(update=settings), dtype=dtype or self.dtype)

    def take(self, rows: Int[Tensor, " k"]) -> Problem:
        """Return the problem of some rows of the batch, (k,)."""
        slopes = tuple(None if s is None else s[rows] for s in self.slopes)
        free, start = tuple(f[rows] for f in self.free), None if self.start is None else self.start.take(rows)
        before = None if self.before is None else self.before.take(rows)
        return replace(self, log_p=self.log_p[:, rows], slopes=slopes, free=free, start=start, before=before)

    def text_before(self) -> list[str]:
        """Spell the token before each row, for gates that look at the text.

        Raises:
            InvalidInputError: the text is not known, as in ``combine`` and ``evaluate``.
        """
        if self.before is None:
            raise InvalidInputError(
                f"the gate {self.settings.gate} looks at the text before each token, which is known in generation and "
                "serving alone: use it there"
            )
        return [self.before.spell([token]) for token in self.before.ids.tolist()]

    def rows(self) -> list[Problem]:
        """Split the batch into problems of one row each."""
        return [self.take(torch.tensor([k], device=self.log_p.device)) for k in range(self.log_p.shape[1])]

    def pieces(self) -> list[Problem]:
        """Split into parts whose rows share one view of each head: one part, or one a row where directions are free."""
        return self.rows() if self.free and self.log_p.shape[1] > 1 else [self]

    def restricted(self, log_q: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Restrict log-probabilities to the tokens that may be answered, renormalised.

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
        q = _POOLING[self.settings.pool](self.log_p, self.weights)
        # Rows that lose nothing stay what the pool's own rule gives, to the last bit.
        cut = (~shared & ~q.isneginf()).any(-1, keepdim=True)
        return torch.where(cut, log_normalize(q.masked_fill(~shared, -torch.inf)), q)

    def views(self, members: Sequence[int]) -> tuple[WhitenedHead, ...]:
        """Return whitened views of some members' heads, without free directions and with fresh read counters."""
        batch, v = self.log_p.shape[1:]
        place = self.log_p.device
        return tuple([
            WhitenedHead(self.heads[i], v, self.dtype, self.slopes[i], batch, place, self._whitening(i))
            for i in members
        ])  # fmt: skip

    def _whitening(self, i: int) -> Whitening:
        """Return the whitening of head i, cut to ``rank`` and without its free directions.

        W_iᵀ(p - p̂_i) = R⁻ᵀ Q_iᵀ(p - p̂_i) is a combination of directions u exactly if Q_iᵀ(p - p̂_i) is one of Rᵀu.
        """
        whole = self.heads[i].whitening(self.settings.rank)
        if not self.free or not self.log_p.shape[1]:
            return whole
        assert self.log_p.shape[1] == 1, "rows with free directions are solved one by one"
        lost = self.free[i][0].to(whole.factor) @ whole.factor  # (k, rank)
        kept = torch.linalg.svd(lost, full_matrices=True).Vh[len(lost) :]
        return whole.narrowed(kept.T).without(self.free[i][0])

    def projection(self, members: Sequence[int], trust: Sequence[float]) -> Projection:
        """State the relaxed I-projection of the pool for some members, all of positive trust."""
        projection = Projection(
            log_q=self.log_pool,
            log_p=self.log_p[list(members)].transpose(0, 1),
            heads=self.views(members),
            trust=tuple([trust[i] for i in members]),
            tol=self.settings.tol,
        )
        if self.start is not None:
            parts = zip(self.start.towards(members, trust), projection.alpha, projection.heads, strict=True)
            white = [lam / alpha @ h.whitening.inverse.T for lam, alpha, h in parts]
            projection.start = torch.cat(white, dim=-1)
        return projection

    def met_alike(self, other: Problem) -> bool:
        """Say whether ``meet``'s solution of this problem is one of ``other``, if both have the same heads."""
        same = [
            (p.trust, p.settings.pool, p.settings.weights, p.settings.rank, p.settings.free_radial)
            for p in (self, other)
        ]
        mine, theirs = self.support, other.support
        support = mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs))
        return same[0] == same[1] and support and self.tol <= other.tol and torch.equal(self.log_p, other.log_p)

    def relaxed(self) -> Problem:
        """Return the problem with the default trust wherever it is infinite."""
        return replace(self, settings=self.settings.relaxed())

    def pool_bound(self) -> Float[Tensor, " B"]:
        """Return Σ_i ρ_i KL(q‖p̂_i) in nats, q the pool and ρ_i the trusts; an infinite one counts as the default.

        It needs the pool and the members' log-probabilities, which every rule has anyway, and no head, and depends on
        the members' distributions alone: W_i → W_i M, constants added to logits and the order of tokens and members are
        nothing to it.

        Why it is weighed by trust and not by weight: ``meet`` would improve its objective by V = -f* nats over the
        pool, and the pool's and the members' in-family errors together by exactly that (docs/mathematics.md §4). V is
        concave in the trusts, with ∂V/∂ρ_i = KL(r_i‖p̂_i), so that to first order at ρ = 0 it is Σ ρ_i KL(s_i‖p̂_i), s_i
        the member of model i's family with the moments of q. By Pythagoras KL(q‖p̂_i) = KL(q‖s_i) + KL(s_i‖p̂_i), so this
        sum bounds V at every trust: where it is below T the pool is proved to be within T nats of optimal and within
        √(T/2) in total variation, whatever the heads are. A member of trust 0 cannot move the answer, and does not
        count.
        """
        total = torch.zeros_like(self.log_pool[:, 0])
        for member, rho in zip(self.log_p, self.settings.relaxed().member_trust, strict=True):
            if rho:
                total = total + rho * kl(self.log_pool, member)
        return total


def _refuse_empty(rows: Bool[Tensor, " B"]) -> None:
    if rows.any():
        raise DisjointSupportError(
            "expected a token with positive probability under every member (and in support=), found none in rows "
            f"{rows.nonzero().flatten().tolist()[:8]}: combine fewer members, or use rule='prob-mean'"
        )
