"""Agreement: beam search in which members keep their own tokens, and hypotheses agree on bytes."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import merge
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from softmeet.decoders.base import Decoding, ToWrite, WeightedText
from softmeet.decoders.own_tokens import OwnTexts, OwnTokens, OwnTokensDecoder

# What a member adds: what it then adds to the score, and the id of its token; None if it waits.
Choice: TypeAlias = tuple[float, int | None]
# More than scores and their bounds differ by rounding.
_SLACK = 1e-9
# How many candidates are sorted first, and by how much more there are the next time.
_SORTED, _GROWTH = 64, 8


@dataclass(frozen=True)
class Track:
    """What one member has written of a hypothesis.

    Attributes:
        ids: its tokens; the last may end the text.
        text: the bytes that they spell.
        log_prob: their log-probability in nats.
    """

    ids: tuple[int, ...] = ()
    text: bytes = b""
    log_prob: float = 0.0


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A text that grows, as each member has it in its own tokens; every string begins the longest one.

    Attributes:
        tracks: for each member what it has written.
        predicted: for each member the log-probabilities of its next token, by id; None before they are read.
    """

    tracks: tuple[Track, ...]
    predicted: tuple[Float[np.ndarray, " v"] | None, ...]

    @cached_property
    def text(self) -> bytes:
        """The longest of the members' strings."""
        return max((track.text for track in self.tracks), key=len)

    @cached_property
    def lacking(self) -> tuple[bytes | None, ...]:
        """For each member what its string lacks of the longest; None if it waits for others to complete that."""
        lacks = [self.text[len(track.text) :] for track in self.tracks]
        return tuple(own or (None if any(lacks) else b"") for own in lacks)

    @property
    def together(self) -> bool:
        """Whether the strings of all members are equal."""
        return None not in self.lacking

    def log_probs(self, i: int) -> Float[np.ndarray, " v"]:
        """Return the log-probabilities of member i's next token."""
        found = self.predicted[i]
        assert found is not None, "it was read"
        return found


@dataclass(frozen=True)
class Way:
    """One way in which a hypothesis goes on; the first in order is the best.

    Attributes:
        key: the negative score, and then the members' tokens, by which ways of one score are ordered.
        parent: the number of the hypothesis.
        picks: the id that each member adds; None for one that waits.
        ends: whether these end the text.
    """

    key: tuple[float, tuple[tuple[int, ...], ...]]
    parent: int
    picks: tuple[int | None, ...]
    ends: bool = False


def best_extensions(
    hypotheses: Sequence[Hypothesis], tokens: Sequence[OwnTokens], weights: Sequence[float], count: int
) -> list[Way]:
    """Return the ``count`` best of all extensions by ordinary tokens, the best first.

    Members with the longest string wait, unless all strings are equal. The others take one token each, such that every
    string is then the beginning of the longest. The new longest string says which tokens each of them can have taken:
    those that begin what it lacked of that string. So the strings that a token makes the longest are gone through, from
    the one with the largest bound on the score, until no bound reaches the score of the last extension that is kept.

    Args:
        hypotheses: at least one, of which all predictions are known.
        tokens: of each member.
        weights: of each member, at least 0.
        count: how many are wanted, at least 1.
    """
    growths = [_Growth(k, one, tokens, weights) for k, one in enumerate(hypotheses)]
    best, seen = list[Way](), set[tuple[int, bytes]]()
    for growth in growths:
        if not hypotheses[growth.number].together:
            growth.add(b"", best, count)
    streams = [stream for growth in growths for stream in growth.streams()]
    for negative, number, extra in merge(*streams):
        if len(best) == count and negative > best[-1].key[0] + _SLACK:
            break
        if (number, extra) not in seen:
            seen.add((number, extra))
            growths[number].add(extra, best, count)
    return best


def best_ends(
    hypotheses: Sequence[Hypothesis], tokens: Sequence[OwnTokens], weights: Sequence[float], count: int
) -> list[Way]:
    """Return the ``count`` best of all ways to end hypotheses, the best first: all members end one at once."""
    found = list[Way]()
    for k, one in enumerate(hypotheses):
        growth = _Growth(k, one, tokens, weights)
        if one.together and count:
            found += growth.extensions([growth.choices(i, own.ends) for i, own in enumerate(tokens)], count, ends=True)
    return sorted(found, key=lambda one: one.key)[:count]


class _Growth:
    """How one hypothesis can go on.

    Args:
        number: its number.
        hypothesis: itself.
        tokens: of each member.
        weights: of each member.
    """

    def __init__(
        self, number: int, hypothesis: Hypothesis, tokens: Sequence[OwnTokens], weights: Sequence[float]
    ) -> None:
        self.number, self._hypothesis, self._tokens = number, hypothesis, tokens
        self._weights = weights
        # How many tokens each member then has.
        self._lengths = [
            max(1, len(track.ids) + (lacks is not None))
            for track, lacks in zip(hypothesis.tracks, hypothesis.lacking, strict=True)
        ]
        self._known = set[tuple[int | None, ...]]()

    def _part(self, i: int, log_prob: float) -> float:
        """Return what member i adds to the score by a token of some log-probability, or by none."""
        return self._weights[i] * ((self._hypothesis.tracks[i].log_prob + log_prob) / self._lengths[i])

    def choices(self, i: int, ids: Sequence[int]) -> list[Choice]:
        """Return what member i can add, given the ids of some tokens: those of positive probability."""
        told = self._hypothesis.log_probs(i)
        return [(self._part(i, log_prob), token) for token in ids if (log_prob := float(told[token])) > -np.inf]

    def add(self, extra: bytes, best: list[Way], count: int) -> None:
        """Put into ``best``, which is in order, all extensions within the longest string and some bytes behind it."""
        options = [self._within(i, lacks, extra) for i, lacks in enumerate(self._hypothesis.lacking)]
        if not all(options):
            return
        most = sum(max(part for part, _ in own) for own in options)
        if len(best) == count and -most > best[-1].key[0] + _SLACK:
            return
        for one in self.extensions(options, count):
            if one.picks not in self._known:
                self._known.add(one.picks)
                insort(best, one, key=lambda one: one.key)
        del best[count:]

    def _within(self, i: int, lacks: bytes | None, extra: bytes) -> list[Choice]:
        """Return what member i can add within what it lacks and some bytes more."""
        if lacks is None:
            return [(self._part(i, 0.0), None)]
        own, rest = self._tokens[i], lacks + extra
        lengths = range(1, min(len(rest), own.longest) + 1)
        return self.choices(i, [token for end in lengths for token in own.by_word.get(rest[:end], ())])

    def extensions(self, options: Sequence[Sequence[Choice]], count: int, *, ends: bool = False) -> list[Way]:
        """Return the best ``count`` of all combinations of a choice of each member."""
        found: list[tuple[float, tuple[int | None, ...]]] = [(0.0, ())]
        for own in options:
            # Of what members choose one after another, no more than ``count`` ways can be among the best.
            likely = sorted(own, key=lambda choice: (-choice[0], choice[1]))[:count]
            ways = [(score + part, (*picks, token)) for score, picks in found for part, token in likely]
            found = sorted(ways, key=lambda way: (-way[0], way[1]))[:count]
        before = [track.ids for track in self._hypothesis.tracks]
        return [
            Way(
                (-score, tuple(
                    ids if token is None else (*ids, token) for ids, token in zip(before, picks, strict=True)
                )), self.number, picks, ends,
            )
            for score, picks in found
        ]  # fmt: skip

    def streams(self) -> Iterator[Iterator[tuple[float, int, bytes]]]:
        """Yield, for each member that does not wait, the strings that it can make longer than all are, the best first.

        Of each string there is (the negative of a bound on the score, the hypothesis's number, the bytes behind the
        longest string).
        """
        lacking = self._hypothesis.lacking
        likely = [self._likely(i, lacks) for i, lacks in enumerate(lacking)]
        for i, lacks in enumerate(lacking):
            if lacks is None:
                continue
            own, told = self._tokens[i], self._hypothesis.log_probs(i)
            numbers = own.longer(lacks) if lacks else slice(0, len(own.words))
            beginnings = 0 if lacks else own.beginnings
            others = sum(bound[beginnings] for j, bound in enumerate(likely) if j != i)
            bounds = others + self._part_of_all(i, told[own.ids[numbers]])
            yield self._strings(own, numbers.start, len(lacks), bounds)

    def _strings(
        self, own: OwnTokens, start: int, known: int, bounds: Float[np.ndarray, " k"]
    ) -> Iterator[tuple[float, int, bytes]]:
        for bound, k in descending(bounds):
            yield -bound, self.number, own.words[start + k][known:]

    def _part_of_all(self, i: int, log_probs: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
        """Return what member i adds to the score by tokens of some log-probabilities; -inf for probability 0."""
        share = self._weights[i] / self._lengths[i]
        if not share:
            return np.where(np.isneginf(log_probs), -np.inf, 0.0)
        return share * (self._hypothesis.tracks[i].log_prob + log_probs)

    def _likely(self, i: int, lacks: bytes | None) -> Float[np.ndarray, " b"]:
        """Return bounds on what member i adds to the score; if it lacks nothing, by how the longest string goes on."""
        if lacks is None:
            return np.array([self._part(i, 0.0)])
        own, told = self._tokens[i], self._hypothesis.log_probs(i)
        if lacks:
            within = max((part for part, _ in self._within(i, lacks, b"")), default=-np.inf)
            longer = self._part_of_all(i, told[own.ids[own.longer(lacks)]])
            return np.array([longer.max(initial=within)])
        found: Float[np.ndarray, "256 257"] = np.full((256, 257), -np.inf)
        np.maximum.at(found.ravel(), own.beginnings, self._part_of_all(i, told[own.ids]))
        # A word of one byte fits in any string that begins with it.
        found = np.maximum(found, found[:, :1])
        return found.ravel()


def descending(bounds: Float[np.ndarray, " k"]) -> Iterator[tuple[float, int]]:
    """Yield all numbers above -inf, the largest first, each with its index; few are sorted before more are asked for.

    Example:
        >>> list(descending(np.array([1.0, 3.0, -np.inf, 2.0])))
        [(3.0, 1), (2.0, 3), (1.0, 0)]
    """
    left, size = np.flatnonzero(bounds > -np.inf), _SORTED
    while len(left):
        own = bounds[left]
        least = np.partition(own, -size)[-size] if size < len(left) else -np.inf
        now: Int[np.ndarray, " n"] = left[own >= least]
        now = now[np.argsort(-bounds[now], kind="stable")]
        yield from zip(bounds[now].tolist(), now.tolist(), strict=True)
        left, size = left[own < least], size * _GROWTH


class Agreement(OwnTokensDecoder):
    """Search for the text of the largest Σ w_i log P_i, each P_i of the tokens in which member i writes it.

    A hypothesis is a text that each member has in tokens of its own, of which some may have written more bytes than
    others, but each as the beginning of the longest. In a step the members with the longest string wait, unless all
    strings are equal, and the others add a token each; all ways are tried after which each string is again the
    beginning of the longest. Where all strings are equal, all members may end the text, at once. Ways are ordered by
    Σ w_i log P_i / t_i, t_i being how many tokens member i has written, and the best ``beam`` go on; those that have
    ended are set aside. The search is over with ``beam`` texts that have ended, or after as many steps as the limit of
    tokens says, in which no member writes more tokens than that. Then the text of the largest Σ w_i log P_i is chosen
    among those that have ended, and if none has, among those of the last step, of which the longest string counts.

    What members predict of tokens that spell nothing and end nothing, as those of chats, is left out. A member of
    weight 0 does not change a score, but has to agree. From Wicks et al. (Token-level ensembling of models with
    different vocabularies, arXiv:2502.21265), with the waiting of their code, where from three members on all but the
    longest write, not the shortest alone; but that code counts a token more in t_i for one that waits.
    """

    beam: int = Field(default=5, ge=1, le=256)
    """The number of hypotheses that are kept."""

    name = "agreement"
    summary = "beam search by members in their own tokens that agree on bytes (ABE)"
    reference = "https://arxiv.org/abs/2502.21265"

    def rows(self, members: int) -> int:
        """Return how many hypotheses are kept."""
        return self.beam

    def decode(self, texts: Sequence[OwnTexts], job: ToWrite) -> list[Decoding]:
        """Search behind each of B prompts, and read the newest tokens of all searches together."""
        weights: Any = job.settings.weights
        searches = [_Search(texts, weights, k * self.beam, self.beam) for k in range(job.prompts)]
        for _ in range(job.most):
            live = [one for one in searches if not one.over]
            for i, own in enumerate(texts):
                unread = [beam for one in live for beam in one.beams if beam.hypothesis.predicted[i] is None]
                if unread:
                    told = own.texts.log_probs([beam.row for beam in unread])[0].numpy()
                    for beam, log_probs in zip(unread, told, strict=True):
                        beam.learn(i, log_probs)
            for one in live:
                one.extend()
        return [one.found() for one in searches]


@dataclass(eq=False)
class _Beam:
    """A hypothesis, and the row in which all members read it."""

    hypothesis: Hypothesis
    row: int

    def learn(self, i: int, log_probs: Any) -> None:
        """Note what member i predicts."""
        before = self.hypothesis.predicted
        self.hypothesis = Hypothesis(self.hypothesis.tracks, (*before[:i], log_probs, *before[i + 1 :]))


class _Search:
    """A search behind one prompt.

    Args:
        texts: of each member its own.
        weights: of each member.
        start: the first of the search's rows.
        beam: how many rows it has.

    Attributes:
        beams: the hypotheses that go on; of a search that is over, those of its last step.
        over: whether it is over.
    """

    def __init__(self, texts: Sequence[OwnTexts], weights: Sequence[float], start: int, beam: int) -> None:
        self._texts, self._weights, self._rows, self._beam = texts, weights, range(start, start + beam), beam
        nothing = Hypothesis((Track(),) * len(texts), (None,) * len(texts))
        self.beams, self.over = [_Beam(nothing, start)], False
        self._ended = list[Hypothesis]()

    def extend(self) -> None:
        """Go on by a step."""
        given = [one.hypothesis for one in self.beams], [own.tokens for own in self._texts], self._weights
        ways = [*best_extensions(*given, self._beam), *best_ends(*given, self._beam - len(self._ended))]
        following = list[Way]()
        for way in sorted(ways, key=lambda one: one.key):
            if self._beam in (len(following), len(self._ended)):
                break
            if way.ends:
                self._ended.append(self._extended(way))
            else:
                following.append(way)
        self.over = not following or len(self._ended) == self._beam
        if self.over:
            for own in self._texts:
                own.texts.finish(self._rows)
        else:
            self._follow(following)

    def _extended(self, way: Way) -> Hypothesis:
        parent = self.beams[way.parent].hypothesis
        tracks, predicted = list(parent.tracks), list(parent.predicted)
        for i, (before, token, own) in enumerate(zip(parent.tracks, way.picks, self._texts, strict=True)):
            if token is not None:
                log_prob = before.log_prob + float(parent.log_probs(i)[token])
                tracks[i] = Track((*before.ids, token), before.text + own.tokens.spelled([token]), log_prob)
                predicted[i] = None
        return Hypothesis(tuple(tracks), tuple(predicted))

    def _follow(self, ways: Sequence[Way]) -> None:
        """Put extensions in place of the hypotheses: the first of each into its row, others into rows that are free."""
        sources = [self.beams[way.parent].row for way in ways]
        free = [row for row in self._rows if row not in sources]
        rows = list[int]()
        for source in sources:
            rows.append(free.pop() if source in rows else source)
        copied = [(row, source) for row, source in zip(rows, sources, strict=True) if row != source]
        for i, own in enumerate(self._texts):
            own.texts.replace([row for row, _ in copied], [source for _, source in copied])
            own.texts.finish(free)
            added = [(row, token) for row, way in zip(rows, ways, strict=True) if (token := way.picks[i]) is not None]
            own.texts.add([row for row, _ in added], [token for _, token in added])
        self.beams = [_Beam(self._extended(way), row) for way, row in zip(ways, rows, strict=True)]

    def found(self) -> Decoding:
        """Return the texts that have ended, or those of the last step, and choose the best."""
        every = self._ended or [one.hypothesis for one in self.beams]
        texts = tuple(self._text(one, ended=bool(self._ended)) for one in every)
        return Decoding(texts, max(range(len(texts)), key=lambda k: texts[k].log_weight))

    def _text(self, one: Hypothesis, *, ended: bool) -> WeightedText:
        log_probs = tuple(track.log_prob for track in one.tracks)
        score = sum(w * own for w, own in zip(self._weights, log_probs, strict=True))
        return WeightedText(one.tracks[0].ids, ended, score, log_probs, one.text.decode(errors="replace"))
