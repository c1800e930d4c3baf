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
    """Return the sum of the masses of each symbol, (257,)."""
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
class NextTokenProbs:
    """The next token's probabilities behind whole tokens, as the model gave them.

    Attributes:
        path: of the last token in the tree of all that the model has run for this text.
        tokens: (m,) of the spelling's tokens in its order; with the end's they sum to one.
        root: (257,) of the next token's first byte, and of the end.
    """

    path: Path
    tokens: Masses
    root: Masses

    def moved(self, path: Path) -> NextTokenProbs:
        """Return the same at another place in the tree."""
        found = copy.copy(self)
        object.__setattr__(found, "path", path)
        return found

    def masses(self, spelling: Spelling, length: int, longer: int, end: int) -> Masses:
        """Sum, by the byte after the first ``length``, the probabilities of tokens ``longer`` to ``end``: (257,)."""
        some = slice(longer, end)
        return by_symbol(spelling.flat[spelling.offsets[:-1][some] + length], self.tokens[some])

    def total(self, longer: int, end: int) -> float:
        """Sum the probabilities of tokens ``longer`` to ``end``."""
        return float(self.tokens[longer:end].sum())

    def prob(self, k: int) -> float:
        """Return the probability of token k of the spelling."""
        return float(self.tokens[k])


class ProbsAlongText(NextTokenProbs):
    """The same for a text whose next bytes are known: what it takes along them, without the vocabulary."""

    def __init__(self, probs: NextTokenProbs, spelling: Spelling, text: bytes) -> None:
        self._masses: dict[int, Masses] = {}
        self._totals: dict[tuple[int, int], float] = {}
        self._probs: dict[int, float] = {}
        longer, end = 0, len(spelling.words)
        for length in range(1, len(text) + 1):
            first, longer, end = spelling.among(text[:length], longer, end)
            self._probs |= {k: probs.prob(k) for k in range(first, longer)}
            if longer == end:
                break
            self._masses[length] = probs.masses(spelling, length, longer, end)
            self._totals[longer, end] = probs.total(longer, end)
        super().__init__(probs.path, np.empty(0), probs.root)

    def masses(self, spelling: Spelling, length: int, longer: int, end: int) -> Masses:
        """Return what :meth:`NextTokenProbs.masses` gave along the text."""
        return self._masses[length]

    def total(self, longer: int, end: int) -> float:
        """Return what :meth:`NextTokenProbs.total` gave along the text."""
        return self._totals[longer, end]

    def prob(self, k: int) -> float:
        """Return what :meth:`NextTokenProbs.prob` gave along the text."""
        return self._probs[k]


class Cover(NamedTuple):
    """Whole tokens that the model was asked about, and the bytes behind them.

    Attributes:
        probs: of the token that goes on behind the tokens.
        weight: the probability of the tokens, on the scale of :class:`Covers`.
        mass: the same with the next token's.
        rest: the bytes behind the tokens, with which the next token begins.
        longer, end: the tokens of the spelling that are longer than the rest and begin with it.
    """

    probs: NextTokenProbs
    weight: float
    mass: float
    rest: bytes
    longer: int
    end: int

    def masses(self, spelling: Spelling) -> Masses:
        """Return how much of the mass each next symbol takes, (257,)."""
        if not self.rest:
            return self.weight * self.probs.root
        return self.weight * self.probs.masses(spelling, len(self.rest), self.longer, self.end)

    def times(self, x: float) -> Cover:
        """Return the same with x times the mass."""
        return self._replace(weight=self.weight * x, mass=self.mass * x)


class Open(NamedTuple):
    """A cover, and a token behind it about which the model was not asked.

    Attributes:
        probs: of the token, behind the cover.
        token: its id.
        weight: the probability of the cover's tokens and of this one, on the scale of :class:`Covers`.
        mass: the same with an estimate of what comes behind.
        rest: the bytes since.
        most: what the mass may be, had each byte since been as probable behind the token as a good guess.
    """

    probs: NextTokenProbs
    token: int
    weight: float
    mass: float
    rest: bytes
    most: float

    def estimate(self, live: Masses, spelling: Spelling) -> Masses:
        """Estimate the next symbol, (257,): at first as behind such a token, later as behind the closed covers."""
        if self.rest:
            return _ALIKE * np.where(live > 0, live, self.probs.root)
        usual: Masses = spelling.typical[spelling.last(self.token)]
        return _TYPICAL * usual + (1 - _TYPICAL) * self.probs.root

    def longer(self, byte: int, live: float, spelling: Spelling) -> Open:
        """Return the same with one byte more, to which the closed covers gave the probability ``live``."""
        root = float(self.probs.root[byte])
        if self.rest:
            share = _ALIKE * (live or root)
        else:
            share = _TYPICAL * float(spelling.typical[spelling.last(self.token), byte]) + (1 - _TYPICAL) * root
        most = self.most * max(share, _GOOD)
        return self._replace(mass=self.mass * share, rest=self.rest + bytes([byte]), most=most)

    def times(self, x: float) -> Open:
        """Return the same with x times the mass, and x times what it may be."""
        return self._replace(weight=self.weight * x, mass=self.mass * x, most=self.most * x)


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

    @staticmethod
    def begun(probs: NextTokenProbs, spelling: Spelling) -> Covers:
        """Return the covers of a text of no bytes, from what its first token may be."""
        return Covers((Cover(probs, 1.0, 1.0, b"", 0, len(spelling.words)),))

    def prediction(self, spelling: Spelling) -> Masses:
        """Return the next symbol's probabilities, (257,)."""
        found = sum((cover.masses(spelling) for cover in self.closed), np.zeros(SYMBOLS))
        if self.open:
            live = found / (found.sum() or 1.0)
            for cover in self.open:
                found += cover.mass * cover.estimate(live, spelling)
        whole: Masses = found / found.sum()
        return whole

    def followed(self, spelling: Spelling, byte: int, pruning: Pruning) -> Covers:
        """Return the covers of one byte more; none is left where the member cannot write it."""
        own, opened = _longer(spelling, self.closed, self.open, byte)
        return _kept(own, opened, pruning)

    def wanted(self, pruning: Pruning) -> list[Open]:
        """Return the open covers that the model is to be asked about before the next byte is predicted."""
        found = [cover for cover in self.open if cover.most >= pruning.prune * self.total]
        return found or (list(self.open[:1]) if not self.closed else [])

    def likely(self, spelling: Spelling, least: float, most: int) -> list[tuple[NextTokenProbs, int, float]]:
        """List the tokens, with what they stand behind, about which the model will likely have to be asked.

        That is so where the text goes on with a token's bytes, by it or by a longer one, unless it is a rare way to.

        Args:
            spelling: of the member.
            least: how probable that has to be.
            most: so many, the likeliest first.

        Returns:
            For each, what it stands behind, its number in the spelling, and how probable it is that the text goes on
            with its bytes.
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

    def answered(self, spelling: Spelling, answers: Sequence[tuple[Open, NextTokenProbs]], pruning: Pruning) -> Covers:
        """Return the same covers, of which the model's answers close some open ones."""
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
    """Follow all covers by one byte more: those that go on, and open ones by the tokens that end with the byte."""
    own: list[Cover] = []
    new: list[Open] = []
    for cover in closed:
        rest = cover.rest + bytes([byte])
        first, longer, end = spelling.among(rest, cover.longer, cover.end)
        probs, weight = cover.probs, cover.weight
        if longer < end:
            own.append(Cover(probs, weight, weight * probs.total(longer, end), rest, longer, end))
        for k in range(first, longer):
            mass = weight * probs.prob(k)
            new.append(Open(probs, int(spelling.tokens[k]), mass, mass, b"", mass))
    if opened:
        before = _mass(closed)
        live = _mass(own, new) / before if before else 0.0
        new += [cover.longer(byte, live, spelling) for cover in opened]
    return own, new


def _kept(whole: Sequence[Cover], opened: Sequence[Open], pruning: Pruning) -> Covers:
    """Let the lightest covers go."""
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
        kept = _heaviest(kept, pruning.covers, _LIGHT * before)
        light = _heaviest(light, pruning.covers, _LIGHT * before)
        total = _mass(kept, light)
    if not total:
        return Covers(())
    dropped = 1 - total / before
    if total < _SMALL:
        kept = [one.times(1 / total) for one in kept]
        light = [one.times(1 / total) for one in light]
        total = 1.0
    return Covers(tuple(kept), tuple(light), total, dropped)


def _heaviest(covers: list[AnyCover], count: int, least: float) -> list[AnyCover]:
    """Return the heaviest covers, so many at most; from the second on, those with more than the least mass."""
    ordered = sorted(covers, key=_by_mass)[:count]
    return ordered[:1] + [cover for cover in ordered[1:] if cover.mass > least]


def _recombined(whole: list[Cover], opened: list[Open]) -> tuple[list[Cover], list[Open]]:
    """Keep, of the covers that begin their rest at one byte, that of fewest tokens which is not light, with all mass.

    They differ by the tokens before that byte, of which what comes next depends little; the one of fewest tokens is
    nearly always the tokenizer's own. Open covers give their mass to a closed one, where there is one.
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
    """Sort covers by their number of tokens, those last that are light beside others of the same rest."""
    heaviest: dict[int, float] = {}
    for cover in covers:
        heaviest[len(cover.rest)] = max(cover.mass, heaviest.get(len(cover.rest), 0.0))
    return sorted(
        covers,
        key=lambda cover: (cover.mass < _NOT_LIGHT * heaviest[len(cover.rest)], len(cover.probs.path), -cover.mass),
    )


def _mass(*groups: Sequence[Cover | Open]) -> float:
    """Sum the mass of all covers."""
    return sum(cover.mass for group in groups for cover in group)


def _by_mass(cover: Cover | Open) -> float:
    return -cover.mass


def _heavier(cover: AnyCover, mass: float) -> AnyCover:
    """Return a cover with so much more mass."""
    return cover.times((cover.mass + mass) / cover.mass)
