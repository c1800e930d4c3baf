"""From the members' hidden states to the rule's log-probabilities: ``Combiner``.

In shapes, n is the number of members, B that of positions (rows of a batch), v the number of tokens, and d_i the width
of member i's hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear, pad

from softmeet.engine.claims import behind_claims, claimed
from softmeet.engine.recorder import Recorder
from softmeet.engine.unread import require_read
from softmeet.errors import NonFiniteError
from softmeet.heads import SoftmaxHead
from softmeet.members.heads import one_head
from softmeet.members.opaque import Head, OpaqueHead
from softmeet.rules.combine import product_dtype, solve
from softmeet.rules.gates import Automatic, Unsure, that_closes
from softmeet.rules.problem import Problem, TokensBefore
from softmeet.rules.settings import Settings
from softmeet.rules.solution import Solution
from softmeet.rules.validate import normalised, slopes_of
from softmeet.simplex import capped

# Each member's last hidden states at B positions, (B, d_i); and all members' logits or log-probabilities there.
Hidden = Sequence[Float[Tensor, "B _"]]
Scores = Float[Tensor, "n B v"]
# The most numbers that one solve may hold in vectors over the vocabulary, 512 MiB in fp64, and the most that all
# members' logits may have where an average is computed without being solved for, 256 MiB in fp32.
_ELEMENTS = 1 << 26


def rows_at_once(v: int, n: int) -> int:
    """Return the most positions that one solve takes with n members over v tokens: 2²⁶ / (4 n v), at least 1.

    This bounds its vectors over the vocabulary to about 512 MiB.
    """
    return max(1, _ELEMENTS // (v * 4 * n))


def weights_of(settings: Settings) -> tuple[float, ...]:
    """Return the members' weights of settings from :meth:`Settings.for_members`."""
    assert isinstance(settings.weights, tuple), "settings for members have a weight for each"
    return settings.weights


def native_logits(head: Head, hidden: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
    """Return a head's logits in fp32 or fp64, by a product in its own dtype, as the model computes them.

    In half precision that rounds logits to it, and is several times as fast on a CPU as ``head.logits``, which
    multiplies in fp32.

    Example:
        >>> from softmeet import SoftmaxHead
        >>> native_logits(SoftmaxHead(torch.ones(2, 1).bfloat16()), torch.ones(1, 1, dtype=torch.bfloat16))
        tensor([[1., 1.]])
    """
    if isinstance(head, OpaqueHead) or head.dtype != hidden.dtype or head.dtype.itemsize > 2:
        return head.logits(hidden)
    bias = None if head.bias is None else head.bias.to(head.dtype)
    return capped(linear(hidden, head.weight.detach(), bias).float(), head.scale, head.soft_cap)


@dataclass
class Deferral:
    """The positions at which, by the gate ``unsure``, the first member defers to the others, so that all members run.

    It defers where its largest next-token probability is below the gate's threshold.

    Attributes:
        rows: (B,) bool, True at positions at which all members ran, False at those at which the first answers alone.
        logits: (B, v), the first member's logits at all B positions; None if they were too large to keep.
    """

    rows: Bool[Tensor, " B"]
    logits: Float[Tensor, "B v"] | None = None

    def take(self, rows: slice | Int[Tensor, " r"]) -> Deferral:
        """Return the deferral at some of the positions."""
        return Deferral(self.rows[rows], None if self.logits is None else self.logits[rows])


@dataclass(frozen=True, eq=False)
class Combined:
    """What a rule makes of B positions.

    Attributes:
        ours: (B, v), the rule's log-probabilities in nats.
        members: (n, B, v), the members' own; None of an average that was computed without them.
        solution: how the rule was solved; None of such an average.
        logits: of such an average, each member's logits, (B, v_i).
        claiming: of such an average, what readers that claim told, as :func:`claimed` takes it.
    """

    ours: Float[Tensor, "B v"]
    members: Float[Tensor, "n B v"] | None = None
    solution: Solution | None = None
    logits: Sequence[Float[Tensor, "B _"]] = ()
    claiming: Sequence[Float[Tensor, "B _"]] = ()

    @property
    def solved(self) -> tuple[Scores, Solution]:
        """The members' log-probabilities and the solution, of a rule that was solved."""
        assert self.members is not None
        assert self.solution is not None
        return self.members, self.solution

    def claims(self, row: int) -> list[float]:
        """Return the share of the answer that each reader which claims took at one of the positions."""
        if self.solution is None:
            return [own[row, -1].exp().item() for own in self.claiming]
        return [] if self.solution.claims is None else self.solution.claims[:, row].tolist()

    def tell(self, recorder: Recorder) -> None:
        """Have a recorder count these positions."""
        if self.solution is not None and self.members is not None:
            recorder.add(self.solution, self.members)
        elif self.logits:
            recorder.add_average(self.logits)


class Combiner:
    """The members' heads, and the computation from the members' hidden states to a rule's log-probabilities.

    Behind the members' hidden states may stand the states of readers that claim a part of the answer
    (:mod:`softmeet.engine.claims`).

    Attributes:
        names: the members' names, for messages.
        heads: the members' output layers, in the same order, as :func:`softmeet.members.heads.head_of` finds them.
        given: the heads that rules are given: those, and a column of zeros for each that cannot be read.
        v: the size of the vocabulary: the number of logits of the largest head.
        device: where members are combined: the device of the first one's head.
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
        self.v, self.device = max(head.v for head in heads), heads[0].device
        self.capped = any(head.soft_cap is not None for head in self.given)
        self._unread = self.given != self.heads
        self._alike = len({(head.v, head.device) for head in heads}) == 1

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

    def combined(
        self,
        hidden: Hidden,
        settings: Settings,
        deferral: Deferral | None = None,
        before: Callable[[], TokensBefore | None] = lambda: None,
        *,
        quickly: bool = False,
        proved: bool = True,
    ) -> Iterator[Combined]:
        """Combine the members at B positions, from their hidden states, in chunks so that memory stays bounded.

        Args:
            hidden: for each member i, its last hidden states, (B, d_i).
            settings: the rule and all other settings, from :meth:`Settings.for_members`.
            deferral: the positions at which all members ran; at the others the first member answers alone. None if all
                members ran at all positions.
            before: returns the token before each position, for gates that look at the text; None if unknown.
            quickly: whether an average may be computed without what a report needs: each member's log-probabilities in
                fp64, objectives, divergences. It then takes a few passes over the vocabulary, in the logits' dtype.
            proved: True to solve a row until its gap is proved to be within the tolerance; False to stop at an
                estimate of the gap.

        Yields:
            what the rule makes of some positions, in order: of an average that is computed quickly, of all of them.

        Raises:
            SoftmeetError: as :meth:`combine_rows`, when the chunk concerned is reached.
        """
        n = len(self.heads)
        if quickly and deferral is None and self.may_be_quick(settings, len(hidden[0])):
            logits = self._own_logits(hidden[:n], native=True)
            if (found := self.quick_average(logits, settings)) is not None:
                claims = hidden[n:]
                yield Combined(claimed(found, claims) if claims else found, logits=logits, claiming=claims)
                return
        known, chunk = before(), rows_at_once(self.v, len(hidden))
        for start in range(0, len(hidden[0]), chunk):
            rows = slice(start, start + chunk)
            some = None if deferral is None else deferral.take(rows)
            there = None if known is None else known.take(rows)
            log_probs, solution = self.solve_rows([h[rows] for h in hidden], settings, some, there, proved=proved)
            yield Combined(solution.log_probs, log_probs, solution)

    def may_be_quick(self, settings: Settings, rows: int) -> bool:
        """Return whether the rule need not be solved for, unless :meth:`quick_average` finds a row that has to.

        It has to if it is no average, a gate may close, a member has weight 0, or the rows are so many that they would
        have to be cut, as of a long prompt whose tokens are all scored.
        """
        weights = weights_of(settings) if settings.rule.is_average else ()
        fits = rows * self.v * len(weights) <= _ELEMENTS
        return bool(weights) and all(weights) and fits and that_closes(settings.gate) is None

    def quick_average(self, logits: Sequence[Float[Tensor, "B _"]], settings: Settings) -> Float[Tensor, "B v"] | None:
        """Return an average's log-probabilities in nats, in the dtype of the logits.

        They are None where the rule has no quick form, or a row is not finite: solving then finds the answer, or says
        what is wrong.

        Args:
            logits: each member's, fp32 or fp64; a head may have fewer than v rows.
            settings: the rule and all other settings, of which :meth:`may_be_quick` is true.
        """
        own = logits if self._alike else list(map(self.padded, logits))
        scores = settings.rule.quick(own, weights_of(settings))
        if scores is None:
            return None
        if self.support is not None:
            scores.masked_fill_(~self.support, -torch.inf)
        if settings.rule_temperature != 1:
            scores.div_(settings.rule_temperature)
        total = scores.logsumexp(-1, keepdim=True)
        return scores.sub_(total) if bool(total.isfinite().all()) else None

    def of_drawn(self, states: Sequence[Float[Tensor, "1 _"]], drawn: Sequence[int]) -> Float[Tensor, "B v"]:
        """Return the log-probabilities in nats of each text's drawn member.

        Args:
            states: the last hidden state of each of B texts, (1, d_i), by the member i that was drawn for it.
            drawn: the numbers of these members.

        Raises:
            NonFiniteError: if a member's logits hold NaN or +inf.
        """
        found = dict[int, Tensor]()
        for i in {*drawn}:
            head, rows = self.heads[i], [k for k, member in enumerate(drawn) if member == i]
            logits = self.padded(native_logits(head, torch.cat([states[k] for k in rows]).to(head.device)))
            logits = logits if self.support is None else logits.masked_fill(~self.support, -torch.inf)
            found |= zip(rows, logits.log_softmax(-1), strict=True)
        told = torch.stack([found[k] for k in range(len(drawn))])
        if not bool(told.amax(-1).isfinite().all()):
            raise NonFiniteError("expected finite logits, or -inf for an impossible token, of every member drawn")
        return told

    def padded(self, logits: Float[Tensor, "B _"]) -> Float[Tensor, "B v"]:
        """Put a member's logits where members are combined, with -inf for the ids that its head does not have."""
        logits, more = logits.to(self.device), self.v - logits.shape[-1]
        return pad(logits, (0, more), value=-torch.inf) if more else logits

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
        hidden = hidden[: len(self.heads)]
        if deferral is None:
            found = self._own_logits(hidden)
        else:
            pairs = enumerate(zip(self.heads, hidden, strict=True))
            found = [_where_run(head, own.to(head.device), deferral, first=not i) for i, (head, own) in pairs]
        return torch.stack(list(map(self.padded, found)))

    def _own_logits(self, hidden: Hidden, *, native: bool = False) -> list[Float[Tensor, "B _"]]:
        """Compute each member's logits (``native`` ones); members of one head are rows of one product with it."""
        found: list[Any] = [None] * len(self.heads)
        for group in self._groups:
            head = self.heads[group[0]]
            compute = partial(native_logits, head) if native else head.logits
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
        with_caps = None if logits is None or not self.capped else logits
        average = bool(hidden) and self.one_head and self.average(settings) is not None
        hidden = [own.to(log_p.device) for own in hidden] if average else ()
        problem = Problem(
            log_p=log_p,
            heads=tuple(heads),
            slopes=(None,) * len(heads) if with_caps is None else slopes_of(heads, with_caps, log_p, log_p.shape),
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
