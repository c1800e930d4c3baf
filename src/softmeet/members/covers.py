"""What a token model says of a text's next byte: the sum over all tokenizations of the text, as far as their mass goes.

A *cover* of the bytes x is a sequence of whole tokens that the model was asked about, and the *rest* of x, with which
the next token has to begin. Its mass is the probability of its tokens and of a next token that is longer than the rest.
Where the rest is a token itself, that token begins a new cover, behind which the model has to be asked: until then it
is *open*, and what comes next is estimated. Open covers whose share of all mass may be ``prune`` or more are closed, by
asking, before the next byte is predicted. With ``prune=0`` nothing is estimated, and the product of the bytes'
probabilities is the sum over all tokenizations of the text (Phan et al., arXiv:2410.09303, proposition 2).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from softmeet.errors import InvalidInputError
from softmeet.members.spelling import Spelling
from softmeet.members.token_tree import Path

# The 256 bytes, and the end of the text.
SYMBOLS = 257
END = 256
Masses = np.ndarray[Any, np.dtype[np.float64]]
# Of what is estimated to follow a token, the part that is typical of its last byte; the rest follows what it stands on.
_TYPICAL = 0.75
# The probability, as it is estimated, that an open cover which is a byte old or more goes on as closed ones do.
_ALIKE = 0.1
# How probable a byte is behind an open cover by a good guess: where a byte surprises the closed covers, open ones may
# be right, and the model is asked about those that by such guesses have the share ``prune`` of all mass.
_GOOD = 0.2
AnyCover = TypeVar("AnyCover", "Cover", "Open")
# Share of the heaviest cover's mass from which one of fewer tokens may stand for all that end where it does.
_NOT_LIGHT = 0.05
# The share that a token needs of all that begin with its bytes to be asked about before it is known to come.
_NOT_RARE = 0.02
# Shares of mass below which covers are let go while there are others.
_LIGHT = 1e-12
# All covers' mass below which their weights are scaled: it falls with every byte.
_SMALL = 1e-30
# The most that are followed where none is let go; each keeps the probabilities of a vocabulary.
_FOLLOWED = 2048


def by_symbol(symbols: np.ndarray[Any, np.dtype[np.uint8]], masses: Masses) -> Masses:
    """(257,), the sum of the masses of each symbol."""
    return np.bincount(symbols, masses, SYMBOLS).astype(np.float64, copy=False)


@dataclass(frozen=True)
class Pruning:
    """How far tokenizations are followed.

    Attributes:
        prune: share of all mass that an open cover may have before it is followed by asking the model; 0 to follow all.
        covers: the heaviest so many, open or closed, are kept; None for all.
    """

    prune: float = 0.01
    covers: int | None = 8


@dataclass(frozen=True, eq=False)
class Asked:
    """The next token's probabilities behind whole tokens.

    Attributes:
        path: of the last token in the tree of all that the model has run for this text.
        probs: (m,) of the spelling's tokens in its order; with the end's they sum to one.
        root: (257,) of the next token's first byte, and of the end.
    """

    path: Path
    probs: Masses
    root: Masses

    def moved(self, path: Path) -> Asked:
        """The same at another place in the tree."""
        found = copy.copy(self)
        object.__setattr__(found, "path", path)
        return found

    def masses(self, spelling: Spelling, length: int, longer: int, end: int) -> Masses:
        """(257,) of the byte after the first ``length`` of tokens ``longer`` to ``end``."""
        tokens = slice(longer, end)
        return by_symbol(spelling.flat[spelling.offsets[:-1][tokens] + length], self.probs[tokens])

    def total(self, longer: int, end: int) -> float:
        """The probability of tokens ``longer`` to ``end``."""
        return float(self.probs[longer:end].sum())

    def prob(self, k: int) -> float:
        """Of token k of the spelling."""
        return float(self.probs[k])


class AskedAlong(Asked):
    """The same for a text whose next bytes are known: what it takes along them, without the vocabulary."""

    def __init__(self, asked: Asked, spelling: Spelling, text: bytes) -> None:
        self._masses: dict[int, Masses] = {}
        self._totals: dict[tuple[int, int], float] = {}
        self._probs: dict[int, float] = {}
        longer, end = 0, len(spelling.words)
        for length in range(1, len(text) + 1):
            first, longer, end = spelling.among(text[:length], longer, end)
            self._probs |= {k: asked.prob(k) for k in range(first, longer)}
            if longer == end:
                break
            self._masses[length] = asked.masses(spelling, length, longer, end)
            self._totals[longer, end] = asked.total(longer, end)
        super().__init__(asked.path, np.empty(0), asked.root)

    def masses(self, spelling: Spelling, length: int, longer: int, end: int) -> Masses:
        """Give what was kept of :meth:`Asked.masses` along the text."""
        return self._masses[length]

    def total(self, longer: int, end: int) -> float:
        """Give what was kept of :meth:`Asked.total` along the text."""
        return self._totals[longer, end]

    def prob(self, k: int) -> float:
        """Give what was kept of :meth:`Asked.prob` along the text."""
        return self._probs[k]


class Cover(NamedTuple):
    """Tokens that were asked about, and a rest, from which tokens ``longer`` to ``end`` of the spelling go on.

    ``weight`` is the probability of the tokens, ``mass`` theirs with the next token's, both up to the scale of
    :class:`Covers`.
    """

    asked: Asked
    weight: float
    mass: float
    rest: bytes
    longer: int
    end: int

    def masses(self, spelling: Spelling) -> Masses:
        """(257,), how much of the mass each next symbol takes."""
        if not self.rest:
            return self.weight * self.asked.root
        return self.weight * self.asked.masses(spelling, len(self.rest), self.longer, self.end)

    def times(self, x: float) -> Cover:
        """The same with so many times the mass."""
        return Cover(self.asked, self.weight * x, self.mass * x, self.rest, self.longer, self.end)


class Open(NamedTuple):
    """A cover, a token behind it and the bytes since, about which the model was not asked; ``mass`` is an estimate.

    ``most`` is what its mass may be, had each byte since been as probable behind it as a good guess.
    """

    asked: Asked
    token: int
    weight: float
    mass: float
    rest: bytes
    most: float

    def estimate(self, live: Masses, spelling: Spelling) -> Masses:
        """(257,), what comes next: at first what follows such a token, later what follows the closed covers."""
        if not self.rest:
            usual: Masses = spelling.typical[spelling.last(self.token)]
            return _TYPICAL * usual + (1 - _TYPICAL) * self.asked.root
        return _ALIKE * np.where(live > 0, live, self.asked.root)

    def longer(self, byte: int, live: float, spelling: Spelling) -> Open:
        """The same with one byte more, to which the closed covers gave the probability ``live``."""
        root = float(self.asked.root[byte])
        if self.rest:
            share = _ALIKE * (live or root)
        else:
            share = _TYPICAL * float(spelling.typical[spelling.last(self.token), byte]) + (1 - _TYPICAL) * root
        most = self.most * max(share, _GOOD)
        return Open(self.asked, self.token, self.weight, self.mass * share, self.rest + bytes([byte]), most)

    def times(self, x: float) -> Open:
        """The same with so many times the mass, and so many times what it may be."""
        return Open(self.asked, self.token, self.weight * x, self.mass * x, self.rest, self.most * x)


@dataclass(frozen=True, eq=False)
class Covers:
    """All covers of one text by one member, as far as they are followed.

    Attributes:
        closed, open: with masses on one scale.
        total: all their masses together.
        dropped: the share of mass that was let go at the last byte.
    """

    closed: tuple[Cover, ...]
    open: tuple[Open, ...] = ()
    total: float = 1.0
    dropped: float = 0.0

    @property
    def unasked(self) -> float:
        """The share of mass that is estimated, or was let go at this byte."""
        return self.dropped + sum(cover.mass for cover in self.open) / self.total


def begun(asked: Asked, spelling: Spelling) -> Covers:
    """The covers of no bytes."""
    return Covers((Cover(asked, 1.0, 1.0, b"", 0, len(spelling.words)),))


def prediction(spelling: Spelling, covers: Covers) -> Masses:
    """(257,), the next symbol's probabilities."""
    found = sum((cover.masses(spelling) for cover in covers.closed), np.zeros(SYMBOLS))
    if covers.open:
        live = found / (found.sum() or 1.0)
        for cover in covers.open:
            found += cover.mass * cover.estimate(live, spelling)
    whole: Masses = found / found.sum()
    return whole


def followed(spelling: Spelling, covers: Covers, byte: int, pruning: Pruning) -> Covers:
    """The covers of one byte more; none is left where the member cannot write it."""
    own, opened = _longer(spelling, covers.closed, covers.open, byte)
    return _kept(own, opened, pruning)


def wanted(covers: Covers, pruning: Pruning) -> list[Open]:
    """The open covers that the model is to be asked about before the next byte is predicted."""
    found = [cover for cover in covers.open if cover.most >= pruning.prune * covers.total]
    return found or (list(covers.open[:1]) if not covers.closed else [])


def likely(spelling: Spelling, covers: Covers, least: float, most: int) -> list[tuple[Asked, int, float]]:
    """The tokens, and what they stand behind, about which the model will likely have to be asked.

    That is so where the text goes on with a token's bytes, by it or by a longer one, unless the token is a rare way to.

    Args:
        spelling: of the member.
        covers: of a text.
        least: how probable that has to be.
        most: so many, the likeliest first.

    Returns:
        Of each, what the model was asked behind which it stands, its number in the spelling, and how probable it is
        that the text goes on with its bytes.
    """
    found = list[tuple[Asked, int, float]]()
    for cover in covers.closed:
        low, probs, share = cover.longer, cover.asked.probs[cover.longer : cover.end], cover.weight / covers.total
        for k in np.flatnonzero(share * probs >= _NOT_RARE * least):
            _, _, end = spelling.among(spelling.words[low + k], low + int(k), cover.end)
            along = float(probs[k : end - low].sum())
            if share * along >= least and probs[k] >= _NOT_RARE * along:
                found.append((cover.asked, low + int(k), share * along))
    return sorted(found, key=lambda one: -one[2])[:most]


def closed(spelling: Spelling, covers: Covers, answers: Sequence[tuple[Open, Asked]], pruning: Pruning) -> Covers:
    """The same covers, some of which the model was asked about."""
    answered = {id(cover) for cover, _ in answers}
    whole, opened = list(covers.closed), [cover for cover in covers.open if id(cover) not in answered]
    for cover, asked in answers:
        own = [Cover(asked, cover.weight, cover.weight, b"", 0, len(spelling.words))]
        new: list[Open] = []
        for byte in cover.rest:
            own, new = _longer(spelling, own, new, byte)
        whole += own
        opened += new
    return _kept(whole, opened, pruning)


def _longer(
    spelling: Spelling, closed: Sequence[Cover], opened: Sequence[Open], byte: int
) -> tuple[list[Cover], list[Open]]:
    """All covers with one byte more, and the tokens that end with it."""
    own: list[Cover] = []
    new: list[Open] = []
    for cover in closed:
        rest = cover.rest + bytes([byte])
        first, longer, end = spelling.among(rest, cover.longer, cover.end)
        asked, weight = cover.asked, cover.weight
        if longer < end:
            own.append(Cover(asked, weight, weight * asked.total(longer, end), rest, longer, end))
        for k in range(first, longer):
            mass = weight * asked.prob(k)
            new.append(Open(asked, int(spelling.tokens[k]), mass, mass, b"", mass))
    if opened:
        before = _mass(closed)
        live = _mass(own, new) / before if before else 0.0
        new += [cover.longer(byte, live, spelling) for cover in opened]
    return own, new


def _kept(whole: Sequence[Cover], opened: Sequence[Open], pruning: Pruning) -> Covers:
    """Covers without the lightest, which are let go."""
    kept = [cover for cover in whole if cover.mass > 0]
    light = [cover for cover in opened if cover.mass > 0]
    if pruning.prune:
        kept, light = _recombined(kept, light)
    if pruning.covers is None and len(kept) + len(light) > _FOLLOWED:
        raise InvalidInputError(
            f"following all tokenizations of a text, of which there are more than {_FOLLOWED:,} here, is for a few "
            "words: give a prune above 0, such as 0.01"
        )
    light.sort(key=_by_mass)
    before = total = _mass(kept, light)
    if pruning.covers is not None:
        least = _LIGHT * before
        kept = sorted(kept, key=_by_mass)[: pruning.covers]
        kept = [cover for k, cover in enumerate(kept) if not k or cover.mass > least]
        light = [cover for k, cover in enumerate(light[: pruning.covers]) if not k or cover.mass > least]
        total = _mass(kept, light)
    if not total:
        return Covers(())
    dropped = 1 - total / before
    if total < _SMALL:
        kept = [one.times(1 / total) for one in kept]
        light = [one.times(1 / total) for one in light]
        total = 1.0
    return Covers(tuple(kept), tuple(light), total, dropped)


def _recombined(whole: list[Cover], opened: list[Open]) -> tuple[list[Cover], list[Open]]:
    """Of the covers that begin their rest at one byte, that of fewest tokens which is not light, with the mass of all.

    They differ by the tokens before that byte, of which what comes next depends little; the one of fewest tokens is
    nearly always the tokenizer's own.
    """
    if len({len(cover.rest) for group in (whole, opened) for cover in group}) == len(whole) + len(opened):
        return whole, opened
    best: dict[int, Cover] = {}
    for cover in _few_tokens_first(whole):
        place = len(cover.rest)
        best[place] = _heavier(best[place], cover.mass) if place in best else cover
    light: dict[int, Open] = {}
    for other in _few_tokens_first(opened):
        place = len(other.rest)
        if place in best:
            best[place] = _heavier(best[place], other.mass)
        else:
            light[place] = _heavier(light[place], other.mass) if place in light else other
    return list(best.values()), list(light.values())


def _few_tokens_first(covers: Sequence[AnyCover]) -> list[AnyCover]:
    heaviest: dict[int, float] = {}
    for cover in covers:
        heaviest[len(cover.rest)] = max(cover.mass, heaviest.get(len(cover.rest), 0.0))
    return sorted(
        covers,
        key=lambda cover: (cover.mass < _NOT_LIGHT * heaviest[len(cover.rest)], len(cover.asked.path), -cover.mass),
    )


def _mass(*groups: Sequence[Cover | Open]) -> float:
    """All of it together."""
    return sum(cover.mass for group in groups for cover in group)


def _by_mass(cover: Cover | Open) -> float:
    return -cover.mass


def _heavier(cover: AnyCover, mass: float) -> AnyCover:
    """A cover with so much more mass."""
    return cover.times((cover.mass + mass) / cover.mass)
