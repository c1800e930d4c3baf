"""The turns of members in speculation: who reads on, who drafts, and what the rule makes of what all have read.

A text's *columns* are its tokens in order: those that are settled, and behind them drafts. Every member reads columns
in its own calls; behind each column that all of them have read, the rule's distribution is known. Readers that claim
draft, too, as does the text itself where it repeats, if that is likely to be right: no member is run for it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.engine.ask import Members
from softmeet.engine.claims import claimed
from softmeet.engine.combine import Combined, native_logits, rows_at_once, weights_of
from softmeet.engine.continuation import Continuation
from softmeet.engine.pace import FREELY, MOST, Pace
from softmeet.engine.repeats import Repeats
from softmeet.readers.reader import Reader
from softmeet.rules.problem import TokensBefore
from softmeet.rules.settings import Settings

# Where a number of drafts is asked for, how likely those without a member have to be right.
_SURE = 0.5
# As likely as that has to be what is drafted without a member before it is asked whether it pays.
_UNLIKELY = 0.1


def by_kept_costs(members: Sequence[Reader], settings: Settings) -> bool:
    """Return whether "auto" drafts by costs that are kept alone, so that the same drafts are made another time."""
    return settings.rule.is_average and all(reader.traits.calls for reader in members)


class FullError(Exception):
    """A member's context is full, so that nothing can be drafted any more."""


class MemberTurns(ABC):
    """The members' turns over B texts that advance together: each reads all that it has not read, and drafts.

    How tokens are drawn, and what becomes of them, is a subclass's. Columns are counted from the first text's first
    token; the others' last tokens stand beside its.

    Args:
        texts: the texts, of one ensemble, of which every member has read all tokens but the newest.
        members: those who read.
        settings: those by which they are combined, from :meth:`Settings.for_members`.
        speculate: how many tokens the cheapest member drafts at its turn; "auto" for as many as pay.
        reported: whether more of each position is wanted than the rule's distribution.
        singly: whether positions are solved one by one.

    Attributes:
        read: for each member the number of columns that it has read.
        pace: what drafts and calls have come to.
        is_over: whether nothing more can be drafted, as a member's context is full.
    """

    def __init__(
        self,
        texts: Sequence[Continuation],
        members: Members,
        settings: Settings,
        speculate: int | Literal["auto"],
        *,
        reported: bool,
        singly: bool = False,
    ) -> None:
        self.texts, self._members, self._model = list(texts), members, texts[0].model
        self._settings, self._speculate = settings, speculate
        n, rows, v = len(self._model.members), len(self.texts), self._model.combiner.v
        self._claiming = range(n, len(self.texts[0].readers))
        sizes, weights = [reader.traits.cost for reader in self.texts[0].readers[:n]], weights_of(settings)
        # Of members of about one size, the one that weighs most is the nearest to the rule.
        self._order = sorted(range(n), key=lambda i: (sizes[i] > 1.1 * min(sizes), -weights[i], sizes[i]))
        readers = self.texts[0].readers[:n]
        kept = [reader.traits.calls for reader in readers] if by_kept_costs(readers, settings) else ()
        self.pace, self._repeats = Pace(n, self._order[0], rows, kept, v), Repeats()
        self._most = FREELY if speculate == "auto" else speculate
        most = rows * (n + (MOST if speculate == "auto" else speculate) + self._most)
        self._quick = not reported and self._model.combiner.may_be_quick(settings, most)
        self._at_once = 1 if singly else max(1, rows_at_once(v, n) // rows)
        self._count, self.is_over = 0, False
        self._authors: list[int] = []
        self._hidden: list[list[Tensor]] = [[] for _ in self.texts[0].readers]
        self._logits: list[list[Tensor]] = [[] for _ in range(n)]

    def clock(self) -> float:
        """Return a time in seconds, from which the times of calls are taken."""
        return time.perf_counter()

    def pause(self) -> None:  # noqa: B027 - most have nothing to do here
        """Be told that a piece of what is read was read."""

    @property
    def length(self) -> int:
        """The number of columns that are settled."""
        return len(self.texts[0].tokens)

    @property
    def read(self) -> list[int]:
        """The number of columns that each member has read."""
        return [self.texts[0].read_by(i) for i in range(len(self._order))]

    @property
    @abstractmethod
    def is_room(self) -> bool:
        """Whether another draft has a place in the texts."""

    def run(self, i: int) -> Float[Tensor, "B t d"]:
        """Have member i read the t columns that it has not read, and return its last hidden states there.

        Raises:
            SoftmeetError: if it cannot read a text.
            FullError: if its context is full before its limit, or there are drafts among what it cannot read.
        """
        found = self._members.read_on(self.texts, slice(i, i + 1), every=True, pause=self.pause)
        for one in self.texts:
            # What cannot be read may be a draft, and no part of the text.
            if one.is_full or (one.failures and one.drafts):
                raise FullError
            one.check()
        return torch.stack([states for (states,) in found.values()])

    def drafted(self, count: int) -> None:  # noqa: B027
        """Be told that there are so many drafts more."""

    @abstractmethod
    def draft(self, log_probs: Float[Tensor, "B v"]) -> bool:
        """Add a draft to each text, drawn from log-probabilities in nats; return whether there is one."""

    @abstractmethod
    def take(self, found: Combined, rows: slice) -> bool:
        """Choose the next token of each text, without drafts behind it, and append it; return whether all go on.

        Args:
            found: what the rule makes of several places of each text, in which B rows are those of the next one.
            rows: these.
        """

    def turn(self) -> None:
        """Let the member that has read the least read on; it then drafts what is its share.

        Before it, files and the text itself draft as long as that is likely to pay, and then it drafts nothing.
        """
        i = min(self._order, key=self.read.__getitem__)
        try:
            count = 0 if self._draft_freely() else self._drafts(i)
            for k in range(max(count, 1)):
                self._read_on(i)
                if not self._settle() or k == count or not self.is_room or not self._draft(i):
                    return
        except FullError:
            self.end()
            self.is_over = True

    def end(self) -> None:
        """Forget all drafts, and have members take back what they have read of them."""
        for one in self.texts:
            one.drafts = []
        self.take_back()

    def take_back(self) -> None:
        """Make every member forget the columns behind those that are settled, and the newest of these."""
        for one in self.texts:
            for i in range(len(one.rows)):
                one.crop(i, len(one.tokens) - 1)
        self._authors = []
        for known in (*self._hidden, *self._logits):
            known.clear()

    def told(self, right: bool) -> None:
        """Take note of whether the first of the drafts was right; if not, the others are gone."""
        self.pace.shares[self._authors[0]].add(right)
        self._authors = self._authors[1:] if right else []

    def combined(self, start: int, stop: int) -> Combined:
        """Return what the rule makes of columns ``start`` to ``stop - 1`` of those that are not settled."""
        combiner = self._model.combiner
        if self._quick:
            logits = [torch.cat(own[start:stop]) for own in self._logits]
            average = combiner.quick_average(logits, self._settings)
            if average is not None:
                claims = [torch.cat(self._hidden[i][start:stop]) for i in self._claiming]
                return Combined(claimed(average, claims), claiming=claims)
            # A rule without a quick form has none anywhere.
            self._quick = False
        # Before the first of the positions is the newest token, before the others are drafts.
        ahead = [[*one.tokens[-1:], *one.drafts][: stop - start] for one in self.texts]
        before = TokensBefore.of(torch.tensor(ahead).T.flatten(), self._model.tokenizer)
        hidden = [torch.cat(own[start:stop]) for own in self._hidden]
        log_probs, solution = combiner.solve_rows(hidden, self._settings, before=before, proved=False)
        return Combined(solution.log_probs, log_probs, solution)

    def _drafts(self, i: int) -> int:
        """Return how many tokens member i drafts at its turn: the cheapest as many as pay, each other one token."""
        if len(self._order) == 1:
            return 0
        if i == self._order[0]:
            self._count = self.pace.choose() if self._speculate == "auto" else self._speculate
        return self._count if i == self._order[0] else min(self._count, 1)

    def _read_on(self, i: int) -> None:
        """Run member i over all columns that it has not read."""
        begun, states = self.clock(), self.run(i)
        self._hidden[i] += states.unbind(1)
        if self._quick:
            logits = native_logits(self._model.combiner.heads[i], states.flatten(0, 1))
            self._logits[i] += self._model.combiner.padded(logits).unflatten(0, states.shape[:2]).unbind(1)
        self.pace.calls[i].add(states.shape[1], self.clock() - begun)

    def _draft(self, i: int) -> bool:
        """Draft the next token from member i's own distribution, with the rule's temperature; return whether it can.

        What is claimed of it is drafted by those who claim it.
        """
        begun, combiner = self.clock(), self._model.combiner
        logits = self._logits[i][-1] if self._quick else combiner.padded(combiner.heads[i].logits(self._hidden[i][-1]))
        logits = logits / self._settings.rule_temperature
        logits = logits if combiner.support is None else logits.masked_fill(~combiner.support, -torch.inf)
        found = self.draft(self._readable(claimed(logits.log_softmax(-1), self._claims())))
        if found:
            self._authors.append(i)
            self.drafted(1)
        self.pace.drafting.add(1, self.clock() - begun)
        return found

    def _draft_freely(self) -> int:
        """Draft tokens for which no member is run, as many as are likely to pay; return how many there are.

        None is drafted where a member has read all columns, since it would have to read these in another call.
        """
        pending = len(self._authors)
        if max(self.read) == self.length + pending:
            return 0
        sure, tokens = 1.0, [1.0]
        for author in self._authors:
            sure *= self.pace.shares[author].value
            tokens.append(tokens[-1] + sure)
        while self.is_room and len(self._authors) < self._most:
            chance, author, draft = self._likeliest()
            sure *= chance
            if sure < (_UNLIKELY if self._speculate == "auto" else _SURE) or not draft():
                break
            self._authors.append(author)
            tokens.append(tokens[-1] + sure)
        count = len(self._authors) - pending
        if count and self._speculate == "auto":
            count = self.pace.worth(tokens, pending)
            self._drop(pending + count)
        self.drafted(count)
        return count

    def _drop(self, count: int) -> None:
        """Forget the drafts behind the first ``count``, which nobody but readers that claim has read."""
        for one in self.texts:
            del one.drafts[count:]
            for i in self._claiming:
                one.crop(i, self.length + count)
        del self._authors[count:]
        for i in self._claiming:
            del self._hidden[i][count + 1 :]

    def _likeliest(self) -> tuple[float, int, Callable[[], bool]]:
        """Return what is known of the next column without a member: its chance, its author, and what drafts it."""
        n, combiner, (one, *others) = len(self._order), self._model.combiner, self.texts
        token, share = (0, 0.0) if others else self._repeats.next(one.tokens, one.drafts)
        if self._claiming:
            # As if the rule had answered nothing, so that what is claimed alone is left.
            nothing = torch.full((len(self.texts), combiner.v), -torch.inf, device=combiner.device)
            found = claimed(nothing, self._claims())
            chance = float(found.amax(-1).exp().prod())
            if chance >= share:
                return chance, n, lambda: self.draft(self._readable(found.log_softmax(-1)))
        return share, n + 1, lambda: self._repeat(one, token)

    def _repeat(self, one: Continuation, token: int) -> bool:
        """Draft a token that every member can read; return whether there is one."""
        readable = token < min(head.v for head in self._model.combiner.heads)
        one.drafts += [token] * readable
        return readable

    def _claims(self) -> list[Float[Tensor, "B _"]]:
        """Return what readers that claim say behind the last column, which they read before."""
        for i in self._claiming:
            self._read_claims(i)
        return [self._hidden[i][-1] for i in self._claiming]

    def _read_claims(self, i: int) -> None:
        """Have a reader that claims read all columns that it has not read."""
        one = self.texts[0]
        if one.read_by(i) < len(one.tokens) + len(one.drafts):
            self._hidden[i] += self.run(i).unbind(1)

    def _readable(self, log_probs: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Leave out what another member has no id for, as it could not read that."""
        log_probs[:, min(head.v for head in self._model.combiner.heads) :] = -torch.inf
        return log_probs

    def _settle(self) -> bool:
        """Settle the tokens behind every column that all members have read; returns whether drafts remain."""
        count = min(self.read) - (self.length - 1)
        for i in self._claiming if count else ():
            self._read_claims(i)
        for start in range(0, count, self._at_once):
            begun, stop = self.clock(), min(start + self._at_once, count)
            found = self.combined(start, stop)
            self.pace.rule.add(stop - start, self.clock() - begun)
            if not self._accepted(found):
                self.take_back()
                return False
        for known in (*self._hidden, *self._logits):
            del known[:count]
        return True

    def _accepted(self, found: Combined) -> bool:
        """Take the next tokens by what the rule makes of their places, until a draft was wrong: then none is left.

        Returns:
            whether drafts remain.
        """
        count = len(self.texts)
        for start in range(0, len(found.ours), count):
            drafts = [one.drafts for one in self.texts]
            for one in self.texts:
                one.drafts = []
            goes_on = self.take(found, slice(start, start + count))
            right = all(own[:1] == one.tokens[-1:] for one, own in zip(self.texts, drafts, strict=True))
            if drafts[0]:
                self.told(right)
            if not (drafts[0] and right and goes_on):
                return False
            for one, own in zip(self.texts, drafts, strict=True):
                one.drafts = own[1:]
        return True
