"""From the members' hidden states to the rule's log-probabilities: ``Combiner``.

In shapes, n is the number of members, B that of positions (rows of a batch), v the number of tokens, and d_i the width
of member i's hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from softmeet.engine import quick
from softmeet.engine.claims import behind_claims, claimed
from softmeet.engine.deferral import Deferral
from softmeet.engine.unread import require_read
from softmeet.errors import NonFiniteError
from softmeet.heads import SoftmaxHead
from softmeet.members.heads import one_head
from softmeet.members.opaque import Head, OpaqueHead
from softmeet.rules.combine import product_dtype, solve
from softmeet.rules.gates import Automatic, Unsure
from softmeet.rules.problem import Problem, TokensBefore
from softmeet.rules.settings import Settings
from softmeet.rules.solution import Solution
from softmeet.rules.validate import normalised, slopes_of

# Each member's last hidden states at B positions, (B, d_i); and all members' logits or log-probabilities there.
Hidden = Sequence[Float[Tensor, "B _"]]
Scores = Float[Tensor, "n B v"]
# The most fp64 numbers that one solve may hold in vectors over the vocabulary: 512 MiB.
_ELEMENTS = 1 << 26


def rows_at_once(v: int, n: int) -> int:
    """Return the most positions that one solve takes with n members over v tokens: 2²⁶ / (4 n v), at least 1.

    This bounds its vectors over the vocabulary to about 512 MiB.
    """
    return max(1, _ELEMENTS // (v * 4 * n))


class Combiner:
    """The members' heads, and the computation from the members' hidden states to a rule's log-probabilities.

    Behind the members' hidden states may stand the states of readers that claim a part of the answer
    (:mod:`softmeet.engine.claims`).

    Attributes:
        names: the members' names, for messages.
        heads: the members' output layers, in the same order, as :func:`softmeet.members.heads.head_of` finds them.
        given: the heads that rules are given: those, and a column of zeros for each that cannot be read.
        v: the size of the vocabulary: the number of logits of the largest head.
        support: (v,) bool, True for the ids that are tokens, for heads with padding rows; None if all ids are tokens.
        capped: whether a head has a soft-cap; rules then need logits beside log-probabilities.
        joint: whether what a member says at a place depends on what the others say there.
        crossed: of members with tokens of their own, the function of :attr:`TokensBefore.crossed`.
    """

    joint = False
    crossed: Callable[[int, int], bool] | None = None

    def __init__(self, names: Sequence[str], heads: Sequence[Head], support: Bool[Tensor, " v"] | None = None) -> None:
        self.names, self.heads, self.support = names, list(heads), support
        self.given = [
            head if isinstance(head, SoftmaxHead) else SoftmaxHead(torch.zeros(head.v, 1, device=head.device))
            for head in heads
        ]
        self.v = max(head.v for head in heads)
        self.capped = any(head.soft_cap is not None for head in self.given)
        self._unread = self.given != self.heads

    def require(self, settings: Settings) -> None:
        """Raise UnsupportedHeadError, as :func:`require_read` does, if the settings read a head that cannot be read."""
        require_read(settings, self.names, self.heads)

    def deferral(self, gate: Unsure, first: Float[Tensor, "B d"]) -> Deferral:
        """Decide by a gate at which of B positions the first member defers to the others.

        Args:
            gate: the gate; the member defers if its largest next-token probability is below ``gate.threshold``.
            first: (B, d), the first member's last hidden states, on its head's device.
        """
        head = self.heads[0]
        chunk = rows_at_once(head.v, 1)
        if len(first) <= chunk:
            logits = head.logits(first)
            return Deferral(gate.among(logits.log_softmax(-1)), logits)
        # The logits are too many to keep: they are computed again, in chunks, when the positions are combined.
        return Deferral(torch.cat([gate.among(head.log_probs(part)) for part in first.split(chunk)]))

    def quickly(
        self, hidden: Hidden, settings: Settings
    ) -> tuple[Float[Tensor, "B v"], list[Float[Tensor, "B _"]]] | None:
        """Return an average's log-probabilities in nats, without what a report needs (:mod:`softmeet.engine.quick`).

        Args:
            hidden: for each member i, its last hidden states, (B, d_i).
            settings: the rule and all other settings, from :meth:`Settings.for_members`.

        Returns:
            (the log-probabilities, (B, v), fp32 or fp64; each member's logits, of which a head may have fewer than v);
            None where the rule has to be solved for.
        """
        if not (settings.rule.is_average and quick.may(settings, len(hidden[0]), self.v)):
            return None
        n = len(self.heads)
        logits = self._own_logits(hidden[:n], native=True)
        found = quick.average(logits, settings, self.support, self.v)
        if found is None or len(hidden) == n:
            return None if found is None else (found, logits)
        return claimed(found, hidden[n:]), logits

    def solve_in_chunks(
        self,
        hidden: Hidden,
        settings: Settings,
        deferral: Deferral | None = None,
        before: TokensBefore | None = None,
        *,
        proved: bool = True,
    ) -> Iterator[tuple[Float[Tensor, "n b v"], Solution]]:
        """Combine the members at B positions, in chunks of b so that memory stays bounded, from their hidden states.

        Args:
            hidden: for each member i, its last hidden states, (B, d_i).
            settings: the rule and all other settings, from :meth:`Settings.for_members`.
            deferral: the positions at which all members ran; at the others the first member answers alone. None if all
                members ran at all positions.
            before: the token before each position, for gates that look at the text; None if unknown.
            proved: True to solve a row until its gap is proved to be within the tolerance; False to stop at an
                estimate of the gap.

        Yields:
            (the members' log-probabilities in nats at b positions, (n, b, v), fp64; the rule's solution there). The
            chunks are in order; the last may be smaller.

        Raises:
            SoftmeetError: as :meth:`combine_rows`, when the chunk concerned is reached.
        """
        chunk = rows_at_once(self.v, len(hidden))
        for start in range(0, len(hidden[0]), chunk):
            rows = slice(start, start + chunk)
            some = None if deferral is None else deferral.take(rows)
            known = None if before is None else before.take(rows)
            yield self.solve_rows([h[rows] for h in hidden], settings, some, known, proved=proved)

    def solve_rows(
        self,
        hidden: Hidden,
        settings: Settings,
        deferral: Deferral | None = None,
        before: TokensBefore | None = None,
        *,
        proved: bool = True,
    ) -> tuple[Scores, Solution]:
        """Combine the members at B positions, from their hidden states.

        Args:
            hidden: for each member i, its last hidden states, (B, d_i).
            settings: the rule and all other settings, from :meth:`Settings.for_members`.
            deferral: the positions at which all members ran. At the other positions the first member answers alone:
                the hidden states of the others are not read, and their log-probabilities are returned as NaN. None if
                all members ran at all positions.
            before: the token before each position, for gates that look at the text; None if it is unknown.
            proved: True to solve a row until its gap is proved to be within the tolerance; False to stop at an
                estimate of the gap, as generation does.

        Returns:
            (the members' log-probabilities in nats, (n, B, v), fp64; the rule's solution of the B rows).

        Raises:
            SoftmeetError: as :meth:`combine_rows`.
        """
        logits = self.own_logits(hidden, deferral)
        if deferral is not None:
            settings = settings.model_copy(update={"gate": Unsure(1.0, deferral.rows.to(logits.device))})
        solution = self.combine_rows(logits, logits, settings, hidden=hidden, proved=proved, before=before)
        log_probs = self._as_told(solution.problem.log_p, logits)
        return (log_probs, solution) if deferral is None else _nan_where_not_run(log_probs, solution)

    def _as_told(self, log_probs: Scores, logits: Scores) -> Scores:
        """Return members' log-probabilities, with the sum that they have where a member tells some tokens alone."""
        told = [i for i, head in enumerate(self.heads) if isinstance(head, OpaqueHead) and head.known is not None]
        if told:
            log_probs = log_probs.clone()
            log_probs[told] += logits[told].logsumexp(-1, keepdim=True).clamp_max(0).to(log_probs)
        return log_probs

    def own_logits(self, hidden: Hidden, deferral: Deferral | None = None) -> Scores:
        """Compute the members' logits, (n, B, v), fp32 or fp64, from their last hidden states, (B, d_i) for member i.

        Ids past a head's last row have -inf. At positions at which, by ``deferral``, the first member answers alone,
        all logits of the other members are 0, and their heads are not read.
        """
        place, v = self.heads[0].device, self.v
        hidden = hidden[: len(self.heads)]
        if deferral is None:
            found = self._own_logits(hidden)
        else:
            pairs = enumerate(zip(self.heads, hidden, strict=True))
            found = [_where_run(head, own.to(head.device), deferral, first=not i) for i, (head, own) in pairs]
        padded = [
            nn.functional.pad(own.to(place), (0, v - head.v), value=-torch.inf) if head.v < v else own.to(place)
            for head, own in zip(self.heads, found, strict=True)
        ]
        return torch.stack(padded)

    def _own_logits(self, hidden: Hidden, *, native: bool = False) -> list[Float[Tensor, "B _"]]:
        """Compute each member's logits (``native`` ones); members of one head are rows of one product with it."""
        found: list[Any] = [None] * len(self.heads)
        for group in self._groups:
            head = self.heads[group[0]]
            compute = partial(quick.native_logits, head) if native else head.logits
            if len(group) == 1:
                found[group[0]] = compute(hidden[group[0]].to(head.device))
                continue
            logits = compute(torch.cat([hidden[i].to(head.device) for i in group]))
            for i, own in zip(group, logits.split([len(hidden[i]) for i in group]), strict=True):
                found[i] = own
        return found

    @cached_property
    def _groups(self) -> list[list[int]]:
        """The numbers of the members that have one head, for each head."""
        groups: dict[Any, list[int]] = {}
        for i, head in enumerate(self.heads):
            key: Any = id(head)
            if isinstance(head, SoftmaxHead):
                key = id(head.weight), id(head.bias), head.scale, head.soft_cap
            groups.setdefault(key, []).append(i)
        return list(groups.values())

    def own_log_probs(self, hidden: Hidden) -> tuple[Scores, Scores | None]:
        """Compute (the members' log-probabilities in nats; their logits if a head has a soft-cap, else None).

        Both are (n, B, v), fp32 or fp64.

        Args:
            hidden: for each member i, its last hidden states, (B, d_i).
        """
        logits = self.own_logits(hidden)
        return logits.log_softmax(-1), logits if self.capped else None

    def normalised(self, scores: Scores) -> Scores:
        """Return members' log-probabilities in nats, fp64, from their logits or log-probabilities.

        Raises:
            NonFiniteError: if they hold NaN, +inf or a row of -inf only; the message names the members.
        """
        try:
            return normalised(scores)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. Members, from 0: {', '.join(self.names)}") from error

    def combine_rows(
        self,
        scores: Scores,
        logits: Scores | None,
        settings: Settings,
        *,
        hidden: Hidden | None = None,
        start: Solution | None = None,
        relaxed: Solution | None = None,
        proved: bool = True,
        before: TokensBefore | None = None,
    ) -> Solution:
        """Combine the members at B positions, from their logits or log-probabilities, and return the B rows' solution.

        Rows for which the gate ``unsure`` is closed get the rule's answer for the first member alone, without
        ``rule_temperature``.

        Args:
            scores: (n, B, v), the members' log-probabilities in nats, or their logits, which are normalised.
            logits: (n, B, v), the members' logits, soft-cap included; needed if a head has a soft-cap, else unused.
            settings: all settings, from :meth:`Settings.for_members`.
            hidden: for each member i, its last hidden states, (B, d_i), for where the rule is an :meth:`average`;
                None to solve in any case. The
                states of readers that claim, if there are any, stand behind them.
            start: a solution of the same rows by this combiner and a rule like ``meet``, which tilts the pool, at whose
                dual variables to begin; None to begin at the pool.
            relaxed: the result of this method for the same rows, the rule that ``on_infeasible`` names and otherwise
                ``settings.relaxed()``, without a gate; it answers rows without a feasible distribution. None to solve
                for it if there are such rows.
            proved: True to solve a row until its gap is proved to be within the tolerance; False to stop at an
                estimate of the gap.
            before: the token before each position, for gates that look at the text; None if unknown.

        Raises:
            NonFiniteError: if ``scores`` hold NaN, +inf or a row of -inf only; the message names the member.
            UnsupportedHeadError: if a head that is to be read cannot be (:func:`require_read`).
            InvalidInputError: if ``start`` or ``relaxed`` does not fit.
            InfeasibleError: if ``on_infeasible`` is ``"raise"`` and a row has no feasible distribution.
            RuleError: if the rule fails, or returns something other than distributions.
        """
        if self._unread:
            self.require(settings)
        heads, dtype = self.given, scores.dtype
        log_p = self.normalised(scores)
        hidden, claims = (hidden or ())[: len(self.heads)], (hidden or ())[len(self.heads) :]
        capped = None if logits is None or not self.capped else logits
        average = bool(hidden) and self.one_head and self.average(settings) is not None
        hidden = [own.to(log_p.device) for own in hidden] if average else ()
        problem = Problem(
            log_p=log_p,
            heads=tuple(heads),
            slopes=(None,) * len(heads) if capped is None else slopes_of(heads, capped, log_p, log_p.shape),
            settings=settings,
            support=self.support,
            dtype=product_dtype(dtype, settings.tol),
            start=None if start is None else start.as_start(heads, log_p),
            precision=torch.finfo(dtype).eps,
            proved=proved,
            # Rows of the problem are chosen where its distributions are.
            before=None if before is None else replace(before, ids=before.ids.to(log_p.device), crossed=self.crossed),
            states=tuple([self.heads[0].scale * own for own in hidden]) if average else (),
        )
        known = None if relaxed is None else relaxed.as_fallback(problem)
        solution = solve(problem, log_p.shape[1:2], dtype, known)
        return behind_claims(solution, claims) if claims else solution

    def resolved(self, settings: Settings) -> Settings:
        """Return settings without the gate ``auto`` where the rule is none that it may close for; else unchanged."""
        if isinstance(settings.gate, Automatic) and (not settings.gate.may_close(settings) or self.average(settings)):
            return settings.ungated()
        return settings

    def average(self, settings: Settings) -> tuple[float, ...] | None:
        """Return the members' weights in the logit mean that the rule is here, as their heads are one; None if not."""
        return settings.rule.one_head_weights(settings) or None if self.one_head else None

    @cached_property
    def one_head(self) -> bool:
        """Whether the heads of two or more members are one (:func:`softmeet.members.heads.one_head`)."""
        return one_head(self.heads)


def _where_run(head: Head, states: Float[Tensor, "B d"], deferral: Deferral, *, first: bool) -> Float[Tensor, "B v"]:
    """Compute a member's logits; at positions at which it did not run they are 0, without a product."""
    if first and deferral.logits is not None:
        return deferral.logits
    if first or bool(deferral.rows.all()):
        return head.logits(states)
    out = states.new_zeros(len(states), head.v, dtype=torch.promote_types(states.dtype, torch.float32))
    rows = deferral.rows.nonzero().squeeze(-1).to(states.device)
    return out.index_copy(0, rows, head.logits(states[rows]).to(out.device)) if len(rows) else out


def _nan_where_not_run(log_probs: Scores, solution: Solution) -> tuple[Scores, Solution]:
    """Set log-probabilities and disagreement to NaN for members that did not run, in the rows that the gate closed."""
    log_probs, disagreement = log_probs.clone(), solution.disagreement.clone()
    log_probs[1:, solution.gated] = torch.nan
    disagreement[1:, solution.gated] = torch.nan
    return log_probs, replace(solution, disagreement=disagreement)
