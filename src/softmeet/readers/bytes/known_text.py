"""Reading a text whose bytes are all known: the tokenizer's tokens in one call of the model, others in few more."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from softmeet.members.spelling import Spelling
from softmeet.readers.bytes.covers import Answers, Covers, Open
from softmeet.readers.bytes.next_tokens import NextTokenProbs, ProbsAlongText
from softmeet.readers.bytes.nodes import Chain, Next, Node, Path
from softmeet.readers.bytes.reading import Guess, Reading
from softmeet.readers.bytes.token_model import TokenModel
from softmeet.readers.reader import Work

# A space between a byte that is none and a letter or digit: every pre-tokenizer begins anew there.
_BREAKS = re.compile(rb"[^\s](?= [0-9A-Za-z])")
_SPACES, _LETTER = re.compile(rb"\s\s\Z"), b"a"
# The bytes after which a text without such a space is cut.
_STRETCH = 256
# The bytes among which a place is looked for that no token spans.
_PARTING = 1024


def path_of(spelling: Spelling, written: bytes) -> list[int]:
    """Return the ids of the tokens that a model is given for the bytes ``written``.

    They are those of :meth:`Spelling.encode`, but for two things. A stretch of more than 256 bytes without a place that
    surely separates tokens is cut every 256 bytes, so that the tokens of a longer text are found by its end alone. And
    white space at the end is cut as it is before a letter: GPT-2's pre-tokenizer has a token of two line breaks only
    where no text follows, and a model expects none behind it.

    Args:
        spelling: the member's.
        written: the bytes that tokens spell, as :meth:`Spelling.written` makes them of a text.
    """
    breaks = (found.start() + 1 for found in _BREAKS.finditer(written))
    ends = [0, *(place for place in breaks if _separates(spelling, written, place)), len(written)]
    places = [0, *(place for start, end in pairwise(ends) for place in _forced(written, start, end)), len(written)]
    return [token for start, end in pairwise(places) for token in _cut(spelling, written[start:end])]


def _cut(spelling: Spelling, written: bytes) -> list[int]:
    """Return the tokenizer's own tokens, those of white space at the end as before a letter, if they end there."""
    if _SPACES.search(written):
        tokens = spelling.cut(written + _LETTER)
        if spelling.spelled(tokens[-1:]) == _LETTER:
            return tokens[:-1]
    return spelling.cut(written)


def anchor_of(spelling: Spelling, written: bytes) -> int:
    """Return the last place before the end of some bytes at which :func:`path_of` surely ends a token, 0 if none.

    The path of these bytes, and of all that begin with them, is the path up to the anchor, and behind it the path of
    the bytes behind it.
    """
    start = _break(spelling, written)
    return next(reversed(_forced(written, start, len(written))), start)


def parting(spelling: Spelling, written: bytes, latest: int) -> int:
    """Return the last place up to ``latest`` that no word which fits the bytes around it spans.

    If there is none in the 1,024 places before, the last is returned at which :func:`path_of` ends a token.
    """
    for place in range(latest, max(latest - _PARTING, 0), -1):
        if not _is_spanned(spelling, written, place):
            return place
    if latest < _PARTING:
        return 0
    ends = spelling.bounds(path_of(spelling, written))
    return int(ends[np.searchsorted(ends, latest, side="right") - 1])


def _is_spanned(spelling: Spelling, written: bytes, place: int) -> bool:
    """Return whether a word begins before a place and ends behind it in these bytes, or could behind their end."""
    for start in range(place - 1, max(-1, place - spelling.longest), -1):
        low, high = 0, len(spelling.words)
        for end in range(place + 1, min(len(written), start + spelling.longest) + 1):
            first, low, high = spelling.among(written[start:end], low, high)
            if first < low:
                return True
            if low == high:
                break
        else:
            return place < len(written)
    return False


def _separates(spelling: Spelling, written: bytes, space: int) -> bool:
    """Return whether no word of the vocabulary has the byte before a space and the space."""
    return written[space - 1 : space + 1] not in spelling.inner_spaces


def _break(spelling: Spelling, written: bytes) -> int:
    """Return the last place, two bytes or more before the end, at which a space surely begins a token; 0 if none."""
    end = len(written) - 1
    while (space := written.rfind(b" ", 1, max(1, end))) > 0:
        if _BREAKS.match(written, space - 1) and _separates(spelling, written, space):
            return space
        end = space
    return 0


def _forced(written: bytes, start: int, end: int) -> list[int]:
    """Return the places at which a stretch without breaks is cut: every 256 bytes, before a whole character."""
    found = list[int]()
    while end - start > _STRETCH:
        start += _STRETCH
        while start < end and written[start] & 0xC0 == 0x80:
            start += 1
        if start < end:
            found.append(start)
    return found


def way(spelling: Spelling, written: bytes, known: Iterable[tuple[Path, int]]) -> Chain:
    """Return how a model gets behind all tokens of the path of some bytes.

    Args:
        spelling: the member's.
        written: the bytes, at least one, as :meth:`Spelling.written` makes them.
        known: at least one path that has been run, (it, the number of bytes that its tokens spell); it begins with the
            tokens before the text, and follows the tokenizer's own tokens.

    Returns:
        Those tokens of it that have been run, with the others, at least one, behind the last of which a prediction is
        wanted.
    """
    candidates, anchor, tokens = list(known), len(written), list[int]()
    while True:
        start = anchor_of(spelling, written[:anchor])
        tokens = [*path_of(spelling, written[start:anchor]), *tokens]
        anchor = start
        paths = dict[int, tuple[Node, int]]()
        for path, place in candidates:
            if place >= anchor:
                _note(paths, spelling, path, place, anchor)
        ends = anchor + spelling.bounds(tokens)
        for count in range(len(tokens) - 1, -1, -1):
            found = paths.get(int(ends[count]))
            if found is not None and (path := Path(*found)).last(count) == tuple(tokens[:count]):
                return Chain(path, tokens[count:], [len(tokens) - count])


def _note(paths: dict[int, tuple[Node, int]], spelling: Spelling, path: Path, place: int, anchor: int) -> None:
    """Put the beginnings of a path into ``paths``, by the place at which they end, back to ``anchor``."""
    node, length = path
    while True:
        paths.setdefault(place, (node, length))
        if place <= anchor:
            return
        length -= 1
        place -= spelling.length(node.tokens[length])


def is_own(spelling: Spelling, written: bytes, probs: NextTokenProbs) -> bool:
    """Return whether ``probs`` are those behind the path of some bytes, if they are behind that to its anchor."""
    tokens = path_of(spelling, written[anchor_of(spelling, written) :])
    return probs.place == len(written) and probs.path.last(len(tokens)) == tuple(tokens)


# Probabilities of next tokens that are held at once: 128 MiB in fp32.
_ELEMENTS = 1 << 25
# Several tokenizations are followed in this many last bytes of a prompt; before them, the tokenizer's alone.
_LOOK_BACK = 64
# How far before a place the way to it may branch off from that to another place.
_NEAR = 32


@dataclass(frozen=True)
class _Own:
    """The tokenizer's own tokens for a text, from some place on, and where they end.

    Attributes:
        chain: them, behind those before them.
        ends: the byte at which the first begins, and those at which each of them ends.
        first: the number of tokens after which next tokens' probabilities are wanted first; at least 1 without
            ``before``.
        before: the prediction behind the tokens before them.
    """

    chain: Chain
    ends: list[int]
    first: int = 1
    before: Next | None = None


class KnownText:
    """A text whose bytes are all known, with the covers that are followed and the model's answers about them so far.

    A cover is one way to cut the bytes into tokens, open if the model has not been run on its last token
    (:mod:`softmeet.readers.bytes.covers`). It is made by :meth:`begun` or :meth:`after`. Then the caller asks what the
    model has to be run on (:meth:`wanted`), runs it, perhaps for several texts at once, and hands the results over
    (:meth:`grown`), until nothing is wanted.

    Args:
        member: the member that reads; its ``pruning`` says which covers have to be closed, that is, to have the model
            run on their last token.
        text: the bytes that the member's tokens spell: the tokenizer's dummy prefix and the text, without unwritable
            bytes.
        place: the index in this text of the byte from which several tokenizations are followed.
        own: the tokenizer's own tokens, if they may have to be run.

    Attributes:
        text, place: as given.
        covers: a list; entry k has the :class:`Covers` of the first ``place + k`` bytes of ``self.text``.
        work: the cost of reading so far, without the prefix.
    """

    def __init__(self, member: TokenModel, text: bytes, place: int, own: _Own | None) -> None:
        self.member, self.pruning, self.text, self.place = member, member.pruning, text, place
        self.work = Work()
        self.covers = list[Covers]()
        self._sure = 1  # This many of them, the first, need no answer that is missing.
        # The model's answers and what it has still to answer, by what a cover's answer depends on.
        self._known = dict[Hashable, NextTokenProbs]()
        self._missing = dict[Hashable, tuple[Open, int]]()
        # The tokenizer's own tokens that have been run, with those before them, and the bytes at which they end.
        self._path: Path | None = None
        self._ends = list[int]()
        self._own = dict[int, NextTokenProbs]()
        self._guesses = dict[int, Guess]()
        self._chains = list[Chain]()
        self._unrun = own

    @classmethod
    def begun(cls, member: TokenModel, prefix: Sequence[int] | None, text: bytes, end: bool) -> KnownText:
        """Begin to read a text.

        Args:
            member: as for the class.
            prefix: ids of the tokens before the text, at least one; None for the member's own.
            text: any bytes.
            end: whether only what follows the whole text is wanted: then several tokenizations are followed in the last
                64 bytes alone, or a little more, unless nothing is pruned.

        Raises:
            InvalidInputError: if the prefix is empty, has an unknown id or exceeds the model's context.
        """
        spelling, first = member.spelling, 0
        written = spelling.written(text)
        tokens = path_of(spelling, written)
        ends = spelling.bounds(tokens).tolist()
        if end and member.pruning.prune:
            first = bisect_right(ends, parting(spelling, written, max(0, len(written) - _LOOK_BACK))) - 1
        before = member.behind(member.prefix if prefix is None else prefix)
        own = _Own(Chain(before.path, tokens, range(max(first, 1), len(tokens) + 1)), ends, first, before)
        known = cls(member, written, ends[first], own)
        if not tokens:
            known._keep_own(own, [])
        return known

    @classmethod
    def after(cls, member: TokenModel, reading: Reading, more: bytes) -> KnownText:
        """Go on to read ``more`` bytes, at least one, after those of a reading that has not ended.

        Guesses of the reading are used before anything is run.
        """
        spelling = member.spelling
        written, place = spelling.written(reading.text + more), len(spelling.written(reading.text))
        behind = reading.covers.places
        own = None
        if len(written) > place:
            path, tokens, _ = way(spelling, written, [(one.path, one.place) for one in behind])
            ends = spelling.bounds(tokens)
            own = _Own(Chain(path, tokens, range(1, len(tokens) + 1)), (len(written) - ends[-1] + ends).tolist())
        known = cls(member, written, place, own)
        known.covers.append(reading.covers)
        known._guesses = {
            one.place: one for one in reading.guesses if written[one.place - len(one.word) : one.place] == one.word
        }
        if member.pruning.prune:
            known._known |= {probs.place: probs for probs in behind}
        return known

    def wanted(self) -> list[Chain]:
        """Return what the model has to be run on next, for :meth:`ran`; nothing if the reading is complete.

        Raises:
            InvalidInputError: if ``pruning.covers`` is None and there are more than 2,048 tokenizations to follow.
        """
        if self.covers:
            self._missing = self._walk()
            if not self._missing:
                return []
        if self._unrun is not None:
            self._chains = [self._unrun.chain]
        else:
            self._chains = [self._way(one, place) for one, place in self._missing.values()]
        return self._chains

    def ran(self, found: Sequence[list[Next]]) -> None:
        """Take what running the model on :meth:`wanted` gave: of each chain the predictions along it."""
        self.work = self.work.and_(calls=1, tokens=sum(len(chain.tokens) for chain in self._chains))
        if self._unrun is not None:
            self._keep_own(self._unrun, found[0])
            return
        places = [place for _, place in self._missing.values()]
        self._known |= zip(self._missing, self._along([own[-1] for own in found], places), strict=True)

    def _way(self, one: Open, place: int) -> Chain:
        """Return a cover's first tokens, which have been run, with its others, at least one."""
        if not self.pruning.prune:
            return Chain(one.probs.path, [one.token], [1])
        known = [self._known[k] for k in range(max(0, place - _NEAR), place) if k in self._known]
        paths = [(probs.path, probs.place) for probs in known]
        if self._path is not None:
            count = bisect_right(self._ends, place) - 1
            before = Path(self._path.node, self._path.length - len(self._ends) + 1 + count)
            paths.append((before, self._ends[count]))
        return way(self.member.spelling, self.text[:place], paths)

    def _keep_own(self, own: _Own, found: Sequence[Next]) -> None:
        """Keep the next token's probabilities after the tokenizer's own tokens."""
        self._ends, self._path = own.ends, found[-1].path if found else own.chain.path
        behind = found if own.first or own.before is None else [own.before, *found]
        self._own |= zip(own.ends[own.first :], self._along(behind, own.ends[own.first :]), strict=True)
        if not self.pruning.prune:
            for one in found:
                before = Path(one.path.node, one.path.length - 1)
                end = own.ends[one.path.length - own.chain.path.length]
                self._known[before.tokens, *one.path.last(1)] = self._own[end]
        if not self.covers:
            self.covers.append(Covers.begun(self._own[self.place], self.member.spelling))
        self._unrun = None

    def _along(self, behind: Sequence[Next], places: Sequence[int]) -> Iterator[NextTokenProbs]:
        """Compute the next token's probabilities behind paths, whose tokens end at their bytes in ``places``."""
        size, longest = max(1, _ELEMENTS // self.member.reader.alphabet.size), self.member.spelling.longest
        for start in range(0, len(behind), size):
            some = slice(start, start + size)
            for probs in self.member.next_token_probs(behind[some], places[some]):
                if probs.place + longest < len(self.text):
                    yield ProbsAlongText(probs, self.member.spelling, self.text[probs.place : probs.place + longest])
                else:
                    yield probs

    def _walk(self) -> dict[Hashable, tuple[Open, int]]:
        """Follow the text byte by byte to its end, with the model's answers so far, and complete ``covers``.

        Returns:
            The open covers that have to be closed and were estimated instead, each with the place at which its last
            token ends, by what their answers depend on.
        """
        spelling, missing = self.member.spelling, dict[Hashable, tuple[Open, int]]()
        del self.covers[self._sure :]
        for place in range(self.place + self._sure, len(self.text) + 1):
            covers = self.covers[-1].followed(spelling, self.text[place - 1], self.pruning)
            while answers := self._answers(covers, place, missing):
                covers = covers.answered(spelling, answers, self.pruning)
            self.covers.append(covers)
            if not missing:
                self._sure = len(self.covers)
        return missing

    def _answers(self, covers: Covers, place: int, missing: dict[Hashable, tuple[Open, int]]) -> Answers:
        """Return the open covers to close at a place and the model's answers; add those without one to ``missing``."""
        found = []
        for one in covers.wanted(self.pruning):
            end = place - len(one.rest)
            key = end if self.pruning.prune else (one.probs.path.tokens, one.token)
            probs = self._known.get(key) or (self._answer(end) if self.pruning.prune else None)
            if probs is None:
                missing[key] = one, end
            else:
                self._known[key] = probs
                found.append((one, probs))
        return found

    def _answer(self, place: int) -> NextTokenProbs | None:
        """Return the next token's probabilities behind the tokenizer's own tokens of the bytes before a place.

        None is returned if the model has not been run there, in reading the whole text or as a guess.
        """
        own, guess = self._own.get(place), self._guesses.get(place)
        if own is not None and is_own(self.member.spelling, self.text[:place], own):
            return own
        if guess is None:
            return None
        (probs,) = self._along([guess.behind], [place])
        return probs
