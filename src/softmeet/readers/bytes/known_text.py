"""Reading a text whose bytes are all known: the tokenizer's tokens in one call of the model, others in few more."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from softmeet.readers.bytes.covers import Answers, Covers, Open
from softmeet.readers.bytes.next_tokens import NextTokenProbs, ProbsAlongText
from softmeet.readers.bytes.nodes import Chain, Next, Path
from softmeet.readers.bytes.own_path import is_own, parting, path_of, way
from softmeet.readers.bytes.reading import Guess, Reading
from softmeet.readers.bytes.token_model import TokenModel
from softmeet.readers.reader import Work

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
