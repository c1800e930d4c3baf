"""A sequence that runs alone: its tokens come by speculation, or each from one member, as long as nobody else runs.

A batch gives every sequence one token for one reading of the members' weights. Where there is a single sequence, the
time of such a reading is better spent on several of its tokens (:mod:`softmeet.engine.speculate`), or on one member.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from softmeet.engine.ask import Members
from softmeet.engine.combine import Combined, weights_of
from softmeet.engine.speculate import MemberTurns, by_kept_costs
from softmeet.engine.step import of_one_each
from softmeet.rules.pools import ProbMean
from softmeet.rules.solution import Solution
from softmeet.server.limits import Limits
from softmeet.server.metrics import Metrics
from softmeet.server.sequences import Sequence, Token
from softmeet.server.tasks import Task
from softmeet.server.tokens import drawn, tokens_of

Give = Callable[[Sequence, Token], None]
# Takes note of the solution at some rows and how long it was suspended; returns the seconds that a closed gate saved.
Count = Callable[[list[Sequence], Solution | None, float, slice], float]


class OneMember:
    """Plain sampling by ``prob-mean``: each token comes from one member, which is drawn by its weight.

    That is the mean's distribution. The other members read what they have not read when they are drawn.

    Args:
        s: the sequence, for which :func:`alone` allows it.
        members: run its tokens.
        give: is called with each token.
    """

    def __init__(self, s: Sequence, members: Members, give: Give) -> None:
        self._s, self._members, self._give = s, members, give
        self._weights = weights_of(s.combination.settings)
        self._random = secrets.SystemRandom()

    def go_on(self, task: Task) -> None:
        """Draw a member by its weight, or a reader by its claim, and the next token from it; then give the token."""
        s, members = self._s, self._random.choices(range(len(self._weights)), self._weights)
        ours = of_one_each([s], members, self._members, self._random.random)
        if s.is_full:
            s.alone = False  # it ends as in a batch
            return
        for token in tokens_of([s], Combined(ours), drawn([s], ours)):
            self._give(s, token)

    def end(self) -> None:
        """Go on as in a batch, in which every member reads what it has not read."""


class Ahead(MemberTurns):
    """Speculation: members read several tokens at once, as one that is ahead of the others drafts what may come.

    Args:
        s: the sequence, for which :func:`alone` allows it.
        speculate: how many tokens the cheapest member drafts at its turn; "auto" for as many as pay.
        members: run its tokens.
        give: is called with each token.
        count: is called with what was solved for.
        metrics: its counters of drafts are kept up to date.
        seconds: those that the rule may work on a token.
    """

    def __init__(
        self,
        s: Sequence,
        speculate: int | Literal["auto"],
        members: Members,
        give: Give,
        count: Count,
        metrics: Metrics,
        seconds: float,
    ) -> None:
        how, reported = s.combination, s.request.report is not None
        super().__init__([s], members, how.settings, speculate, reported=reported)
        self._s, self._give, self._counted = s, give, count
        self._metrics, self._seconds = metrics, seconds
        self._task: Task
        self._suspended = 0.0

    def go_on(self, task: Task) -> None:
        """Let the member that has read the least read on, draft its share, and give what is settled."""
        self._task = task
        self.turn()
        if self.is_over:
            self._s.alone = False

    def clock(self) -> float:
        """Return a time in seconds that stands still while the turn is suspended."""
        return self._task.clock()

    @property
    def is_room(self) -> bool:
        """Whether another draft may follow, with a token of the rule's behind it."""
        s = self._s
        return s.drawn + len(s.drafts) < s.max_tokens - 1 and s.drafts[-1:] not in ([end] for end in s.request.ends)

    def draft(self, log_probs: Float[Tensor, "1 v"]) -> bool:
        """Draw a draft; there is none where a structure has come to a dead end."""
        s = self._s
        (token,), failed = drawn([s], log_probs), s.dead_end is not None
        s.dead_end = None
        s.drafts += [] if failed else [token]
        return not failed

    def drafted(self, count: int) -> None:
        """Count what was drafted in the server's metrics."""
        self._metrics.drafted.inc(count)

    def combined(self, start: int, stop: int) -> Combined:
        """Return what the rule makes of the positions, in as much time as it may take for so many tokens."""
        before = self._task.suspended
        with self._task.limit(self._seconds * (stop - start)):
            found = super().combined(start, stop)
        self._suspended = self._task.suspended - before
        return found

    def told(self, right: bool) -> None:
        """Count a draft that was right."""
        super().told(right)
        self._metrics.accepted.inc(right)

    def take(self, found: Combined, rows: slice) -> bool:
        """Draw the next token and give it; return whether the sequence goes on."""
        s = self._s
        tokens = drawn([s], found.ours[rows])
        saved = self._counted([s], found.solution, self._suspended, rows)
        for token in tokens_of([s], found, tokens, saved, start=rows.start):
            self._give(s, token)
        s.busy = True  # until the turn ends
        return not s.done


def alone(
    run: Members,
    give: Give,
    count: Count,
    metrics: Metrics,
    limits: Limits,
    s: Sequence,
    *,
    speculate: int | Literal["auto"],
    one_member: bool,
) -> OneMember | Ahead | None:
    """Return how a sequence goes on while it runs alone; None if as in a batch.

    Args:
        run: those who read.
        give, count, metrics: as of :class:`Ahead`.
        limits: the server's.
        s: the sequence.
        speculate: how many tokens the cheapest member drafts at its turn; "auto" for as many as pay, 0 for none.
        one_member: whether tokens may come from one member each.
    """
    how, request = s.combination, s.request
    members = s.readers[: len(how.model.members)]
    if how.unsure is not None or how.model.combiner.joint or len(set(members)) < len(members):
        return None
    settings, told = how.settings, (request.top, request.report)
    mean = isinstance(settings.rule, ProbMean) and settings.rule_temperature == 1 and how.gate is None
    plain = request.sampling.is_plain and told == (None, None) and not request.sources
    if one_member and mean and plain:
        return OneMember(s, run, give)
    # What is read at once may depend on the time that calls take, and rounding on what is read at once.
    noticed = told != (None, None)
    if (request.sampling.is_seeded or request.sampling.is_greedy) and not by_kept_costs(members, settings):
        noticed |= any(reader.traits.rounding == "coarse" for reader in s.readers)
    if not all(reader.traits.can_crop for reader in s.readers):
        return None
    # A draft of less than a token, such as a byte, saves nearly nothing.
    in_vain = how.model.symbols_of_token > 1 or len({reader.traits.places for reader in members}) > 1
    if not speculate or (speculate == "auto" and (noticed or in_vain)):
        return None
    return Ahead(s, speculate, run, give, count, metrics, limits.token_seconds)
