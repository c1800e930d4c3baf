"""``Pace``: how many tokens the cheapest member is to draft, from what drafts and calls have come to so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# How much an observation counts after the next one: the last ten or so decide.
_KEPT = 0.9
# Before anything is known: the share of drafts that is right in a sequence, with the weight of so many drafts, and how
# much longer a call takes for each further token, as a share of its time for one, with the weight of so many tokens.
_ACCEPTED, _DRAFTS = 0.7, 2.0
_SHARE, _TOKENS = 0.1, 1.0
# The most tokens drafted at a turn, by a member and without one: readers over bytes can take back so many.
MOST, FREELY = 8, 15
# The seconds of the rule for each number of a member's prediction, where those of calls are kept: of two members with
# 151,936 tokens 3 ms were seen.
_A_NUMBER = 1e-8
# Drafting is for at least so much more speed. After so many tokens without it, one draft tells whether it would pay.
_GAIN, _WAIT = 1.05, 32


@dataclass
class Seconds:
    """The seconds of a call by the number of its tokens: a straight line through what was observed of late."""

    _count: float = 0.0
    _length: float = 0.0
    _seconds: float = 0.0
    _lengths: float = 0.0
    _products: float = 0.0

    def add(self, length: int, seconds: float) -> None:
        """Add a call of ``length`` tokens that took ``seconds``."""
        new = 1.0, length, seconds, length * length, length * seconds
        old = self._count, self._length, self._seconds, self._lengths, self._products
        self._count, self._length, self._seconds, self._lengths, self._products = (
            _KEPT * known + more for known, more in zip(old, new, strict=True)
        )

    def at(self, length: int) -> float:
        """Estimate the seconds of a call of ``length`` tokens; 0 before the first call.

        Example:
            >>> taken = Seconds()
            >>> for length in (1, 5) * 20:
            ...     taken.add(length, 0.02 + 0.01 * length)
            >>> round(taken.at(3), 3)
            0.05
        """
        if not self._count:
            return 0.0
        middle, mean = self._length / self._count, self._seconds / self._count
        spread = self._lengths - self._count * middle**2
        usual = _SHARE * mean / (1 + _SHARE * (middle - 1))
        slope = (self._products - self._count * middle * mean + _TOKENS * usual) / (spread + _TOKENS)
        return mean + max(slope, 0.0) * (length - middle)


@dataclass(frozen=True)
class KeptSeconds:
    """The seconds of a call by the number of its tokens, as they were measured once: straight lines between those.

    Args:
        calls: (tokens, seconds), ascending.
    """

    calls: Sequence[tuple[int, float]]

    def add(self, length: int, seconds: float) -> None:
        """Take no note of a call, as seeds must repeat their texts."""

    def at(self, length: int) -> float:
        """Return the seconds of a call of ``length`` tokens.

        Example:
            >>> KeptSeconds(((1, 0.02), (2, 0.03), (4, 0.04))).at(3)
            0.035
        """
        known = self.calls
        k = next((k for k in range(1, len(known) - 1) if known[k][0] >= length), len(known) - 1)
        (low, before), (high, behind) = known[max(k - 1, 0)], known[k]
        return before + (behind - before) * (length - low) / max(high - low, 1)


@dataclass
class Share:
    """The share of drafts that was accepted of late."""

    _accepted: float
    _count: float = _DRAFTS

    def add(self, accepted: bool) -> None:
        """Note whether one more draft was accepted."""
        self._accepted, self._count = _KEPT * self._accepted + accepted, _KEPT * self._count + 1

    @property
    def value(self) -> float:
        """The share, from 0 to 1."""
        return self._accepted / self._count


@dataclass
class Pace:
    """The choice of how many tokens the cheapest member drafts before the others read them.

    Where the costs of all calls are kept, it hangs on nothing but these, and which drafts were accepted.

    Args:
        n: the number of members.
        cheapest: the number of the member that drafts.
        rows: the number of sequences; a draft is accepted if it is right in all of them.
        kept: for each member (tokens, seconds) of its calls, as they are kept; () to learn them from a clock.
        v: the number of tokens that there are.

    Attributes:
        calls: for each member the seconds of a call by its tokens.
        rule: the seconds of the rule by its positions.
        drafting: the seconds of drafting a token from a distribution that is known.
        shares: for each member the share of its drafts that was accepted, then for readers that claim, and for what a
            text repeats.
    """

    n: int
    cheapest: int
    rows: int = 1
    kept: Sequence[Sequence[tuple[int, float]]] = ()
    v: int = 0
    calls: Sequence[Seconds | KeptSeconds] = field(init=False)
    shares: list[Share] = field(init=False)
    rule: Seconds | KeptSeconds = field(default_factory=Seconds)
    drafting: Seconds | KeptSeconds = field(default_factory=Seconds)
    _waited: int = 0
    _begun: bool = False

    def __post_init__(self) -> None:
        """Begin with what is kept, or without observations."""
        self.calls = [Seconds() for _ in range(self.n)]
        if self.kept:
            self.calls, self._begun = [KeptSeconds(calls) for calls in self.kept], True
            one, more = (KeptSeconds([(k, k * _A_NUMBER * count * self.v) for k in (1, 2)]) for count in (1, self.n))
            self.drafting, self.rule = one, more
        self.shares = [Share(_DRAFTS * _ACCEPTED**self.rows) for _ in range(self.n + 2)]

    def speed(self, count: int) -> float:
        """Estimate the tokens a second with ``count`` drafts of the cheapest member at a turn; 0 for no drafts."""
        others = [i for i in range(self.n) if i != self.cheapest]
        single = self.calls[self.cheapest].at(1)
        if not count:
            return 1 / max(single + sum(self.calls[i].at(1) for i in others) + self.rule.at(1), 1e-9)
        one = self.shares[self.cheapest].value
        all_of_them = one**count
        # Each position up to the first draft that is rejected gives a token, as does the one behind a whole turn, which
        # another member has drafted: the cheapest member reads it at its next turn, too, and again what it should have
        # been if it is rejected.
        tokens = sum(one**k for k in range(count)) + all_of_them
        wrong = 1 - min(self.shares[i].value for i in others)
        own = count * single + all_of_them * (self.calls[self.cheapest].at(2) - single + wrong * single)
        reading = sum(self.calls[i].at(count + 1) for i in others)
        drafts = (count + 1) * self.drafting.at(1)
        return tokens / max(own + reading + drafts + self.rule.at(count + 1), 1e-9)

    def best(self) -> float:
        """Return the tokens a second without drafts or with as many as are best, by members alone."""
        return max(self.speed(count) for count in range(MOST + 1 if self.n > 1 else 1))

    def worth(self, tokens: Sequence[float], pending: int) -> int:
        """Return how many drafts are worth their time for which no member is run.

        They are if tokens then come at a higher rate than without them, and as many as have the highest.

        Args:
            tokens: how many tokens are expected with 0, 1, … drafts, with the one behind the last draft.
            pending: how many of the drafts a member made, so that they stay.
        """
        if not self.reading(1):
            return 0
        rates = [expected / self.reading(count + 1) for count, expected in enumerate(tokens)][pending:]
        best = max(range(len(rates)), key=rates.__getitem__)
        return best if pending or rates[best] > _GAIN * self.best() else 0

    def reading(self, count: int) -> float:
        """Return the seconds in which every member reads ``count`` tokens, and the rule is asked for each."""
        return sum(own.at(count) for own in (*self.calls, self.rule))

    def choose(self) -> int:
        """Return how many tokens to draft at the next turn: 0 where it does not pay."""
        if not self._begun or 0 < self._waited < _WAIT:
            self._waited += self._begun
            self._begun = True
            return 0
        speeds = [self.speed(count) for count in range(MOST + 1)]
        best = max(range(1, MOST + 1), key=speeds.__getitem__)
        if speeds[best] >= _GAIN * speeds[0]:
            self._waited = 0
            return best
        # The estimates take a while themselves, so they are not made anew for every token.
        is_over = self._waited >= _WAIT
        self._waited = 0 if is_over else 1
        return int(is_over)
