"""The probabilities of a text's next byte under a model of tokens: a sum over all tokenizations of the text.

A *cover* of the bytes x is a sequence s of whole tokens and the *rest* r: the bytes of x behind those that s spells,
with which the next token has to begin. Its *weight* is P(s), its *mass* P(s) Σ P(t | s) over the tokens t that begin
with r and are longer. If r is itself a token, (s, r) is the beginning of another cover. It is *open*, with an estimate
of what follows its last token, until the model has been run on that token; then it is *closed*. Open covers whose share
of all mass may be ``prune`` or more are closed before the next byte is predicted. With ``prune=0`` nothing is
estimated, and the product of the bytes' probabilities is the sum over all tokenizations of the text (Phan et al.,
arXiv:2410.09303, proposition 2).

A *symbol* is one of the 256 bytes, or ``END`` = 256: the end of the text. A token's *number* is its index in
``Spelling.words``, the sorted strings that tokens spell; its *id* is the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, TypeVar

import numpy as np

from softmeet.errors import InvalidInputError
from softmeet.members.spelling import Spelling
from softmeet.readers.bytes.next_tokens import SYMBOLS, Masses, NextTokenProbs, without_ruled_out

Answers = Sequence[tuple["Open", "NextTokenProbs"]]
# Estimates of what follows a token mix what usually follows its last byte, with this weight, with the probabilities of
# the token's own place.
_TYPICAL = 0.75
# The guessed probability that an open cover with bytes behind its last token continues as closed ones do.
_ALIKE = 0.1
# The least probability of a byte in an open cover's optimistic mass, ``most``, in case the closed covers are wrong.
_GOOD = 0.2
AnyCover = TypeVar("AnyCover", "Cover", "Open")
_by_mass, _rest_of = attrgetter("mass"), attrgetter("rest")
# A token is run before it is needed if it has this share of the probability of all tokens that begin with its bytes.
_NOT_RARE = 0.02
# Share of all mass up to which a cover is dropped: a hundredth of what pruning estimates on average, or less.
_LIGHT = 1e-5
# If the sum of all masses, which falls with every byte, is below this, all are scaled to a sum of 1.
_SMALL = 1e-30
# The greatest number of covers if none is dropped: each keeps the probabilities of a vocabulary.
_FOLLOWED = 2048


@dataclass(frozen=True)
class Pruning:
    """Which tokenizations of a text are followed by running the model on their tokens.

    Attributes:
        prune: the model is run on a tokenization's last token if the tokenization's share of all probability mass may
            be this or more; if not, the bytes after that token are estimated. 0 to run the model on all.
        covers: the number of tokenizations, those of most mass, that are kept after each byte among those on all of
            whose tokens the model has been run, and as many of the others; None for all, InvalidInputError past 2,048.
    """

    prune: float = 0.01
    covers: int | None = 8


class Cover(NamedTuple):
    """A closed cover: whole tokens on all of which the model was run, and the bytes behind them.

    Attributes:
        probs: the next token's probabilities after these tokens.
        weight: the probability of these tokens, up to a factor common to all covers of the same :class:`Covers`.
        mass: ``weight`` times the probability that the next token begins with ``rest`` and is longer.
        rest: the bytes behind the tokens, with which the next token begins.
        longer, end: tokens number ``longer`` to ``end - 1`` of the spelling are those that begin with ``rest`` and are
            longer.
    """

    probs: NextTokenProbs
    weight: float
    mass: float
    rest: bytes
    longer: int
    end: int

    def masses(self, spelling: Spelling, *, exact: bool = False) -> Masses:
        """Split ``mass`` by the next symbol, (257,) fp64 that sum to it: bytes 0 to 255, then the text's end.

        If ``exact``, what is ruled out has none.
        """
        if self.rest:
            return self.weight * self.probs.masses(spelling, len(self.rest), self.longer, self.end, exact=exact)
        return self.weight * (without_ruled_out(self.probs.root) if exact else self.probs.root)

    def times(self, x: float) -> Cover:
        """Return a copy with weight and mass multiplied by ``x``."""
        return self._replace(weight=self.weight * x, mass=self.mass * x)

    def joined(self, weight: float) -> Cover:
        """Return a copy with ``weight`` added to its own, and its mass in proportion."""
        return self.times((self.weight + weight) / self.weight)


class Open(NamedTuple):
    """An open cover: whole tokens, on the last of which the model was not run, and the bytes behind them.

    Attributes:
        probs: the next token's probabilities at the last token's place: after the tokens before it; where covers were
            joined, those of one of them.
        token: the last token's id.
        weight: the probability of all tokens, the last included, up to a factor common to the text's :class:`Covers`.
        mass: ``weight`` times an estimate of the probability of ``rest``.
        rest: the bytes behind the last token.
        most: an optimistic ``mass``, in which every byte of ``rest`` has at least the probability 0.2.
        root: (257,), ``probs.root``; where covers were joined, its mean by their weights.
    """

    probs: NextTokenProbs
    token: int
    weight: float
    mass: float
    rest: bytes
    most: float
    root: Masses

    def estimate(self, live: Masses, spelling: Spelling) -> Masses:
        """Estimate each next symbol's share of ``mass``, (257,), sum at most 1; those of closed covers are ``live``."""
        if self.rest:
            return _ALIKE * np.where(live > 0, live, self.root)
        usual: Masses = spelling.typical[spelling.last(self.token)]
        return _TYPICAL * usual + (1 - _TYPICAL) * self.root

    def longer(self, byte: int, live: float, spelling: Spelling) -> Open:
        """Return a copy with ``byte`` added to ``rest``; ``live`` is its probability under the closed covers."""
        root = float(self.root[byte])
        if self.rest:
            share = _ALIKE * (live or root)
        else:
            share = _TYPICAL * float(spelling.typical[spelling.last(self.token), byte]) + (1 - _TYPICAL) * root
        most = self.most * max(share, _GOOD)
        return self._replace(mass=self.mass * share, rest=self.rest + bytes([byte]), most=most)

    def times(self, x: float) -> Open:
        """Return a copy with weight, mass and ``most`` multiplied by ``x``."""
        return self._replace(weight=self.weight * x, mass=self.mass * x, most=self.most * x)

    def joined(self, other: Open) -> Open:
        """Return a copy with the weight and masses of another cover added, whose last token ends at the same byte."""
        weight = self.weight + other.weight
        root = (self.weight * self.root + other.weight * other.root) / weight
        return self._replace(weight=weight, mass=self.mass + other.mass, most=self.most + other.most, root=root)


@dataclass(frozen=True, eq=False)
class Covers:
    """The followed tokenizations of one text, its covers: each is whole tokens, and the bytes behind them (``rest``).

    Attributes:
        closed, open: those on whose last token the model was run, and the others; their masses share one factor.
        total: the sum of all their masses.
        dropped: the share of all mass, 0 to 1, that was lost when the lightest covers were last dropped.
    """

    closed: tuple[Cover, ...]
    open: tuple[Open, ...] = ()
    total: float = 1.0
    dropped: float = 0.0

    @property
    def places(self) -> list[NextTokenProbs]:
        """The ``probs`` of all covers, each once."""
        found = {id(one.probs): one.probs for one in self.closed} | {id(one.probs): one.probs for one in self.open}
        return list(found.values())

    @property
    def unasked(self) -> float:
        """The share of mass that does not come from the model: that of the open covers, and ``dropped``."""
        return self.dropped + _mass(self.open) / self.total

    @staticmethod
    def begun(probs: NextTokenProbs, spelling: Spelling) -> Covers:
        """Return the covers of a text of no bytes; ``probs`` are its first token's probabilities, after a prefix."""
        return Covers((Cover(probs, 1.0, 1.0, b"", 0, len(spelling.words)),))

    def prediction(self, spelling: Spelling) -> Masses:
        """Return the next symbol's probabilities, (257,) fp64 with sum 1: bytes 0 to 255, then the end of the text."""
        found = np.zeros(SYMBOLS)
        for exact in (True, False):  # where all is ruled out, what stands for it decides
            for one in self.closed:
                found += one.masses(spelling, exact=exact)
            if found.any():
                break
        if self.open:
            live = found / (found.sum() or 1.0)
            for cover in self.open:
                found += cover.mass * cover.estimate(live, spelling)
        whole: Masses = found / found.sum()
        return whole

    def followed(self, spelling: Spelling, byte: int, pruning: Pruning) -> Covers:
        """Return the covers of the text with ``byte`` added; ``closed`` and ``open`` are empty if no token fits."""
        own, opened = _longer(spelling, self.closed, self.open, byte)
        return _kept(own, opened, pruning)

    def wanted(self, pruning: Pruning) -> list[Open]:
        """Return the open covers to run the model on before the next byte is predicted.

        They are all whose ``most`` is at least ``pruning.prune`` · ``total``; if none is, and no cover is closed, they
        are the one of greatest ``mass``.
        """
        found = [cover for cover in self.open if cover.most >= pruning.prune * self.total]
        return found or (list(self.open[:1]) if not self.closed else [])

    def likely(self, spelling: Spelling, least: float, most: int) -> list[tuple[NextTokenProbs, int, float]]:
        """List the tokens on which the model will probably have to be run when the text continues.

        Args:
            spelling: the member's.
            least: a token is listed if, after the cover's tokens, its bytes come (by it or by a longer token) with
                at least this share of all mass, of which 2 % or more are the token's own.
            most: the greatest number of tokens to list.

        Returns:
            For each token, (the cover's ``probs``, from which it is drawn; its number in ``spelling.words``; that share
            of mass), the most probable first.
        """
        found = list[tuple[NextTokenProbs, int, float]]()
        for cover in self.closed:
            low, probs, share = cover.longer, cover.probs.tokens[cover.longer : cover.end], cover.weight / self.total
            for k in np.flatnonzero(share * probs >= _NOT_RARE * least):
                _, _, end = spelling.among(spelling.words[low + k], low + int(k), cover.end)
                along = float(probs[k : end - low].sum())
                if share * along >= least and probs[k] >= _NOT_RARE * along:
                    found.append((cover.probs, low + int(k), share * along))
        return sorted(found, key=lambda one: -one[2])[:most]

    def answered(self, spelling: Spelling, answers: Answers, pruning: Pruning) -> Covers:
        """Return covers with some of ``open`` closed by answers: (open cover, the probabilities after its tokens)."""
        known = {id(cover) for cover, _ in answers}
        whole, opened = list(self.closed), [cover for cover in self.open if id(cover) not in known]
        for cover, probs in answers:
            own = [Cover(probs, cover.weight, cover.weight, b"", 0, len(spelling.words))]
            new: list[Open] = []
            for byte in cover.rest:
                own, new = _longer(spelling, own, new, byte)
            whole += own
            opened += new
        return _kept(whole, opened, pruning)


def _longer(
    spelling: Spelling, closed: Sequence[Cover], opened: Sequence[Open], byte: int
) -> tuple[list[Cover], list[Open]]:
    """Extend all covers by one byte, and return (closed, open): a token that ends with it makes an open cover."""
    own, new, letter = list[Cover](), list[Open](), bytes([byte])
    for probs, weight, _, before, low, high in closed:
        rest = before + letter
        first, longer, end = spelling.among(rest, low, high)
        if longer < end:
            own.append(Cover(probs, weight, weight * probs.total(longer, end), rest, longer, end))
        for k in range(first, longer):
            mass = weight * probs.prob(k)
            new.append(Open(probs, int(spelling.tokens[k]), mass, mass, b"", mass, probs.root))
    if opened:
        live = (_mass(own) + _mass(new)) / _mass(closed) if closed else 0.0
        new += [cover.longer(byte, live, spelling) for cover in opened]
    return own, new


def require_followed(spelling: Spelling, text: bytes) -> None:
    """Check that all covers of a text are few enough to be followed with ``prune=0``, without a model.

    Raises:
        InvalidInputError: if they are more than 2,048 behind some byte.
    """
    written, longest = spelling.written(text), spelling.longest
    ways = [1]  # to cut the first so many bytes into whole tokens
    for place in range(1, len(written) + 1):
        ways.append(0)
        covers = 0
        for start in range(max(0, place - longest), place):
            first, longer, end = spelling.among(written[start:place])
            ways[place] += ways[start] * (longer - first)
            covers += ways[start] * (longer < end)
        if covers + ways[place] > _FOLLOWED:
            raise _too_many()


def _too_many() -> InvalidInputError:
    return InvalidInputError(
        f"following all tokenizations of a text, of which there are more than {_FOLLOWED:,} here, is for a few words: "
        "give a prune above 0, such as 0.01"
    )


def _kept(whole: Sequence[Cover], opened: Sequence[Open], pruning: Pruning) -> Covers:
    """Join covers whose rests are equally long if pruned, drop the lightest, and return the others."""
    kept = [cover for cover in whole if cover.mass > 0]
    light = [cover for cover in opened if cover.mass > 0]
    if pruning.prune:
        kept, light = _recombined(kept, light)
    if pruning.covers is None and len(kept) + len(light) > _FOLLOWED:
        raise _too_many()
    before = _mass(kept) + _mass(light)
    count, least = (_FOLLOWED, 0.0) if pruning.covers is None else (pruning.covers, _LIGHT * before)
    many = len(kept) + len(light)
    kept, light = _heaviest(kept, count, least), _heaviest(light, count, least)
    total = before if len(kept) + len(light) == many else _mass(kept) + _mass(light)
    if not total:
        return Covers(())
    dropped = 1 - total / before
    if total < _SMALL:
        kept = [one.times(1 / total) for one in kept]
        light = [one.times(1 / total) for one in light]
        total = 1.0
    return Covers(tuple(kept), tuple(light), total, dropped)


def _heaviest(covers: list[AnyCover], count: int, least: float) -> list[AnyCover]:
    """Return the heaviest covers, heaviest first: at most ``count``, of more than ``least`` mass.

    However light they are, the first is kept, and the first without a rest, behind which any byte can come.
    """
    if len(covers) < 2:
        return covers
    ordered = sorted(covers, key=_by_mass, reverse=True)
    if len(covers) <= count and ordered[-1].mass > least:
        return ordered
    free = next((cover for cover in ordered if not cover.rest), None)
    return [one for k, one in enumerate(ordered) if not k or one is free or (k < count and one.mass > least)]


def _recombined(whole: list[Cover], opened: list[Open]) -> tuple[list[Cover], list[Open]]:
    """Join covers whose rests begin at the same byte into one: a closed one if there is one.

    They differ by the tokens before that byte, on which the continuation depends little; a closed one has the
    probabilities after the tokenizer's own.
    """
    rests = [*map(_rest_of, whole), *map(_rest_of, opened)]
    if len(set(map(len, rests))) == len(rests):
        return whole, opened
    closed = {len(cover.rest): cover for cover in whole}
    light = dict[int, Open]()
    for other in opened:
        place = len(other.rest)
        if place in closed:
            closed[place] = closed[place].joined(other.weight)
        else:
            light[place] = light[place].joined(other) if place in light else other
    return list(closed.values()), list(light.values())


def _mass(covers: Sequence[Cover] | Sequence[Open]) -> float:
    """Return the sum of the masses of covers."""
    return sum(map(_by_mass, covers), 0.0)
