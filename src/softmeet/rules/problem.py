"""The input of a rule: the members' distributions and heads, checked, with one batch dimension of B rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.errors import DisjointSupportError, InvalidInputError
from softmeet.heads import SoftmaxHead, WhitenedHead
from softmeet.rules.values import SettingValues
from softmeet.simplex import kl, log_normalize, logit_mean, prob_mean
from softmeet.solvers.batched import Batched
from softmeet.solvers.projection import Projection

_POOLING = {"logit-mean": logit_mean, "prob-mean": prob_mean}


@dataclass(frozen=True, eq=False)
class Start(Batched):
    """The dual variables of an earlier solution of the same B rows, from which a solver may begin.

    :meth:`softmeet.Solution.as_start` makes it.

    Attributes:
        dual: each of all n members' λ_i, (B, d_i), fp64, in the coordinates of its head's weight W_i.
        ray: each member's part of a Farkas proof that a row's feasible set is empty, (B, d_i); zeros without a proof.
        trust: the trust of each member, in nats per nat, at which ``dual`` was found.
    """

    dual: tuple[Float[Tensor, "B _"], ...]
    ray: tuple[Float[Tensor, "B _"], ...]
    trust: tuple[float, ...]

    def towards(self, members: Sequence[int], trust: Sequence[float]) -> list[Float[Tensor, "B _"]]:
        """Return the dual variables λ_i to begin with at other trusts.

        If the old and the new trust ρ_i are finite, and the old one positive, λ_i is scaled by their ratio, since
        the correction λ_i / ρ_i changes little with ρ_i; else it is kept. If the new trusts of all ``members`` are
        infinite, a row with a Farkas proof begins with that proof instead.

        Args:
            members: the indices i, from 0, of the members whose λ_i are wanted.
            trust: the new trusts of all n members, in nats per nat, from 0 to inf.

        Returns:
            For each of ``members``, λ_i, (B, d_i).
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
    """The token before each of B rows, with the function that turns it into text.

    Attributes:
        ids: the tokens' ids, (B,).
        spell: a function from a list of ids to their text, such as a tokenizer's ``decode``; it is called only by
            :meth:`Problem.text_before`, once per row, with a list of one id.
        crossed: where members have tokens of their own, a function that says of two ids, the first before the second,
            whether a member's tokenizer writes both by a token of which both have a part; None where members share
            tokens.
    """

    ids: Int[Tensor, " B"]
    spell: Callable[[list[int]], str]
    crossed: Callable[[int, int], bool] | None = None

    @classmethod
    def of(cls, ids: Int[Tensor, " B"], tokenizer: Any) -> TokensBefore | None:
        """Pair token ids, (B,), with a tokenizer's ``decode``; return None if ``tokenizer`` is None."""
        return None if tokenizer is None else cls(ids, tokenizer.decode)


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch of B rows: at each, the distributions p̂_i of n members over v tokens are to be combined into one.

    ``softmeet.combine`` and ensembles make it from checked arguments; the constructor checks nothing.

    Args:
        log_p: the members' log-probabilities log p̂_i in nats, (n, B, v), fp64, normalised; -inf for probability 0.
        heads: the n members' heads; a head of fewer than v rows gives the tokens past its last row probability 0.
        slopes: for each member, the derivative of its soft-cap at its logits, (B, v); None for a head without one.
        settings: all settings, as returned by :meth:`SettingValues.for_members` for n members.
        support: a mask of the tokens that may have positive probability in the answer, (v,); None for all tokens.
        dtype: of products with heads: fp32 or fp64.
        start: dual variables from which solvers begin, of :meth:`softmeet.Solution.as_start`; None for zeros, which
            stand for the pool.
        precision: ``torch.finfo(…).eps`` of the dtype in which the caller gave the log-probabilities.
        proved: whether solvers have to prove a bound on each row's gap; if False, an estimate of the gap suffices.
        before: the token before each row; None if the text is not known.
        states: where one head, without soft-cap, makes the distributions of all members, each one's last hidden state
            times the head's scale, (B, d); else empty.
    """

    log_p: Float[Tensor, "n B v"]
    heads: tuple[SoftmaxHead, ...]
    slopes: tuple[Float[Tensor, "B v"] | None, ...]
    settings: SettingValues
    support: Bool[Tensor, " v"] | None
    dtype: torch.dtype
    start: Start | None = None
    precision: float = torch.finfo(torch.float64).eps
    proved: bool = True
    before: TokensBefore | None = None
    states: tuple[Float[Tensor, "B _"], ...] = ()

    @cached_property
    def weights(self) -> Float[Tensor, " n"]:
        """The weight w_i of each member in the pool, (n,), fp64."""
        return self.log_p.new_tensor(self.settings.weights)

    @property
    def trust(self) -> tuple[float, ...]:
        """The n members' trusts ρ_i, in nats per nat, from 0 to inf."""
        return self.settings.member_trust

    @property
    def tol(self) -> float:
        """The gap, in nats, at or below which a row counts as solved."""
        return self.settings.tol

    def changed(self, dtype: torch.dtype | None = None, **settings: Any) -> Problem:
        """Return a copy with some fields of ``settings``, or the ``dtype`` of products with heads, replaced.

        Args:
            dtype: torch.float32 or torch.float64; None to keep it.
            settings: new values by the names of the fields of :class:`SettingValues`, in the types that the fields have
                after checking, such as a tuple of n floats for ``trust``; they are not checked.
        """
        return replace(self, settings=self.settings.model_copy(update=settings), dtype=dtype or self.dtype)

    def take(self, rows: Int[Tensor, " k"]) -> Problem:
        """Return the problem that has only the rows with the indices ``rows``, (k,)."""
        slopes = tuple(None if s is None else s[rows] for s in self.slopes)
        states = tuple(x[rows] for x in self.states)
        start, before = (None if x is None else x.take(rows) for x in (self.start, self.before))
        own: dict[str, Any] = {"slopes": slopes, "states": states, "start": start, "before": before}
        return replace(self, log_p=self.log_p[:, rows], **own)

    def text_before(self) -> list[str]:
        """Return the text of the single token before each of the B rows, for gates that decide by the text.

        Raises:
            InvalidInputError: if ``before`` is None: the text is known in generation and serving alone.
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

    def restricted(self, log_q: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Set log-probabilities of tokens outside ``support`` to -inf, and renormalise each row.

        Args:
            log_q: log-probabilities in nats, any floating dtype, on the device of ``support``; not changed in place.

        Returns:
            The log-probabilities conditional on ``support``; ``log_q`` itself if ``support`` is None.

        Raises:
            DisjointSupportError: if a row has no mass on ``support``, or holds NaN.
        """
        out = log_q if self.support is None else log_normalize(log_q.masked_fill(~self.support, -torch.inf))
        _refuse_empty(out.isnan().any(-1))
        return out

    @cached_property
    def log_pool(self) -> Float[Tensor, "B v"]:
        """The pool q: log-probabilities in nats, (B, v), fp64, of the weighted average that ``settings.pool`` names.

        A token outside ``support``, or to which any member gives probability 0, has -inf; the rest sums to 1.

        Raises:
            DisjointSupportError: if no token of a row remains.
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
        """Return whitened views Q_i of the heads of some members, through which solvers read them.

        A view has the slopes of the head's soft-cap, multiplies in ``dtype``, and counts reads (``rows_read``) from
        zero.

        Args:
            members: the indices i of the members, from 0, in the order in which views are returned.

        Raises:
            InvalidInputError: if a head's weight is not finite.
        """
        batch, v = self.log_p.shape[1:]
        place = self.log_p.device
        return tuple([
            WhitenedHead(self.heads[i], v, self.dtype, self.slopes[i], batch, place)
            for i in members
        ])  # fmt: skip

    def projection(self, members: Sequence[int], trust: Sequence[float]) -> Projection:
        """Return the relaxed I-projection of the pool q with some members, as solvers take it.

        It is: minimise KL(p‖q) + Σ_i ρ_i KL(r_i‖p̂_i) over p, r_i with Q_iᵀ p = Q_iᵀ r_i, for i in ``members``. If this
        problem has a ``start``, solvers begin at its dual variables, scaled to ``trust`` by :meth:`Start.towards`.

        Args:
            members: the indices i, from 0, of the members that take part; at least one.
            trust: ρ_i of all n members, in nats per nat; positive for those that take part, inf for r_i = p̂_i.

        Raises:
            DisjointSupportError: if a row of the pool has no token, as by :attr:`log_pool`.
            InvalidInputError: as by :meth:`views`.
        """
        projection = Projection(
            log_q=self.log_pool,
            log_p=self.log_p[list(members)].transpose(0, 1),
            heads=self.views(members),
            trust=tuple([trust[i] for i in members]),
            tol=self.settings.tol,
        )
        if self.start is not None:
            parts = zip(self.start.towards(members, trust), projection.alpha, strict=True)
            projection.start = projection.whitened(torch.cat([lam / alpha for lam, alpha in parts], dim=-1))
        return projection

    def met_alike(self, other: Problem) -> bool:
        """Return whether the solution of this problem by ``meet`` answers ``other`` too.

        True exactly if log-probabilities, supports and the settings that ``meet`` depends on are equal, and this
        problem's ``tol`` is at most the other's. That both have the same heads is not checked.
        """
        names = ("trust", "pool", "weights")
        same = all(getattr(self.settings, name) == getattr(other.settings, name) for name in names)
        mine, theirs = self.support, other.support
        support = mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs))
        return same and support and self.tol <= other.tol and torch.equal(self.log_p, other.log_p)

    def relaxed(self) -> Problem:
        """Return the problem with infinite trusts replaced by 0.3, so that ``meet`` has a solution in every row."""
        return replace(self, settings=self.settings.relaxed())

    def pool_bound(self) -> Float[Tensor, " B"]:
        """Return the members' first-order disagreement, Σ_i ρ_i KL(q‖p̂_i), in nats; an infinite ρ_i counts as 0.3.

        q is the pool and ρ_i the trusts. No head is read: the sum depends on the members' distributions alone, and a
        member of trust 0 adds nothing.

        With finite trusts it bounds V, the optimal value of ``meet``'s objective, since p = r_i = q is feasible there;
        if it is below T, the pool is within T nats of the optimum and within √(T/2) in total variation. It is weighted
        by trusts, not by the pool's weights, because V is concave in the trusts with ∂V/∂ρ_i = KL(r_i‖p̂_i): to first
        order at ρ = 0, V = Σ ρ_i KL(s_i‖p̂_i) with s_i the distribution that head i can express with the moments of q,
        and KL(q‖p̂_i) = KL(q‖s_i) + KL(s_i‖p̂_i) (docs/theory/agreement.md §4).
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
