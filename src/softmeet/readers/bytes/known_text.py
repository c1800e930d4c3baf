"""Reading a text whose bytes are all known: the tokenizer's tokens in one call of the model, others in few more."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.members.token_tree import Growth, Path, TokenTree
from softmeet.readers.bytes.covers import Answers, Covers, NextTokenProbs, Open, ProbsAlongText, Pruning
from softmeet.readers.bytes.own_path import is_own, parting, path_of, way
from softmeet.readers.bytes.reading import Guess, Reading
from softmeet.readers.bytes.token_model import TokenModel
from softmeet.readers.reader import Work

# Probabilities of next tokens that are held at once: 128 MiB in fp32.
_ELEMENTS = 1 << 25
# How far before a place the way to it may branch off from that to another place.
_NEAR = 32


@dataclass(frozen=True)
class _Own:
    """The tokenizer's own tokens for a text, from some place on, and where they end.

    Attributes:
        path: the columns of the tokens before them.
        tokens: their ids.
        ends: the byte at which the first begins, and those at which each of them ends.
        first: the number of tokens after which next tokens' probabilities are wanted first; at least 1 without
            ``hidden``.
        hidden: (1, d), the last hidden state at the last token of ``path``.
    """

    path: Path
    tokens: list[int]
    ends: list[int]
    first: int = 1
    hidden: Float[Tensor, "1 d"] | None = None


class KnownText:
    """A text whose bytes are all known, with the covers that are followed and the model's answers about them so far.

    A cover is one way to cut the bytes into tokens, open if the model has not been run on its last token
    (:mod:`softmeet.readers.bytes.covers`). It is made by :meth:`begun` or :meth:`after`. Then the caller asks what the
    model has to be run on (:meth:`wanted`), runs it, perhaps for several texts at once, and hands the results over
    (:meth:`grown`), until nothing is wanted.

    Args:
        member: the member that reads.
        pruning: which covers have to be closed, that is, to have the model run on their last token.
        text: the bytes that the member's tokens spell: the tokenizer's dummy prefix and the text, without unwritable
            bytes.
        place: the index in this text of the byte from which several tokenizations are followed.
        tree: the keys and values of the tokens before that byte.
        own: the tokenizer's own tokens, if they may have to be run.

    Attributes:
        text, place: as given.
        covers: a list; entry k has the :class:`Covers` of the first ``place + k`` bytes of ``self.text``.
        tree: the keys and values of the tokens that have been run.
        work: the cost of reading so far, without the prefix.
    """

    def __init__(
        self, member: TokenModel, pruning: Pruning, text: bytes, place: int, tree: TokenTree, own: _Own | None
    ) -> None:
        self.member, self.pruning, self.text, self.place = member, pruning, text, place
        self.tree, self.work = tree, Work()
        self.covers = list[Covers]()
        self._sure = 1  # This many of them, the first, need no answer that is missing.
        # The model's answers and what it has still to answer, by what a cover's answer depends on.
        self._known = dict[Hashable, NextTokenProbs]()
        self._missing = dict[Hashable, tuple[Open, int]]()
        # The tokenizer's own tokens that have been run: the columns of all, and the bytes at which they end.
        self._path, self._ends = np.empty(0, np.int64), list[int]()
        self._own = dict[int, NextTokenProbs]()
        self._guesses = dict[int, Guess]()
        self._growth: Growth | None = None
        self._unrun = own

    @classmethod
    def begun(
        cls, member: TokenModel, pruning: Pruning, prefix: Sequence[int], text: bytes, look_back: int | None
    ) -> KnownText:
        """Begin to read a text.

        Args:
            member, pruning: as for the class.
            prefix: ids of the tokens before the text, at least one.
            text: any bytes.
            look_back: the number of last bytes in which several tokenizations are followed, at least; None for all.

        Raises:
            InvalidInputError: if the prefix is empty, has an unknown id or exceeds the model's context.
        """
        spelling, first = member.spelling, 0
        written = spelling.written(text)
        tokens = path_of(spelling, written)
        ends = spelling.bounds(tokens).tolist()
        if look_back is not None:
            first = bisect_right(ends, parting(spelling, written, max(0, len(written) - look_back))) - 1
        tree, hidden = member.behind(prefix)
        own = _Own(np.arange(len(prefix)), tokens, ends, first, hidden)
        known = cls(member, pruning, written, ends[first], tree, own)
        if not tokens:
            known._keep_own(own, [])
        return known

    @classmethod
    def after(cls, member: TokenModel, pruning: Pruning, reading: Reading, more: bytes) -> KnownText:
        """Go on to read ``more`` bytes, at least one, after those of a reading that has not ended.

        Guesses of the reading are used before anything is run.
        """
        spelling = member.spelling
        written, place = spelling.written(reading.text + more), len(spelling.written(reading.text))
        behind = reading.covers.places
        own = None
        if len(written) > place:
            path, tokens = way(spelling, reading.tree, written, [(one.path, one.place) for one in behind])
            own = _Own(path, tokens, (len(written) - spelling.bounds(tokens)[-1] + spelling.bounds(tokens)).tolist())
        known = cls(member, pruning, written, place, reading.tree, own)
        known.covers.append(reading.covers)
        known._guesses = {
            one.place: one for one in reading.guesses if written[one.place - len(one.word) : one.place] == one.word
        }
        if pruning.prune:
            known._known |= {probs.place: probs for probs in behind}
        return known

    def wanted(self) -> Growth | None:
        """Return what the model has to be run on next, for :meth:`grown`; None if the reading is complete.

        Raises:
            InvalidInputError: if ``pruning.covers`` is None and there are more than 2,048 tokenizations to follow.
        """
        if self.covers:
            self._missing = self._walk()
            if not self._missing:
                return None
        if self._unrun is not None:
            own = self._unrun
            return Growth(self.tree, [own.path], [own.tokens], min(len(own.tokens), len(own.tokens) + 1 - own.first))
        chains = [self._way(one, place) for one, place in self._missing.values()]
        self._growth = Growth(self.tree, [path for path, _ in chains], [tokens for _, tokens in chains])
        return self._growth

    def grown(self, tree: TokenTree, states: Sequence[Float[Tensor, "t d"]]) -> None:
        """Take what running the model on :meth:`wanted` gave: the new tree, and each chain's last hidden states."""
        before, self.tree = self.tree.columns, tree
        self.work = self.work.and_(calls=1, tokens=tree.columns - before)
        if self._unrun is not None:
            self._keep_own(self._unrun, states, before)
            return
        assert self._growth is not None
        places = [place for _, place in self._missing.values()]
        self._known |= zip(
            self._missing, self._along(self._growth.grown, places, [own[-1] for own in states]), strict=True
        )

    def _way(self, one: Open, place: int) -> tuple[Path, list[int]]:
        """Return (the columns of a cover's first tokens, which have been run; the ids of its others, at least one)."""
        if not self.pruning.prune:
            return one.probs.path, [one.token]
        known = [self._known[k] for k in range(max(0, place - _NEAR), place) if k in self._known]
        paths = [(probs.path, probs.place) for probs in known]
        if self._ends:
            count = bisect_right(self._ends, place) - 1
            paths.append((self._path[: len(self._path) - len(self._ends) + 1 + count], self._ends[count]))
        return way(self.member.spelling, self.tree, self.text[:place], paths)

    def _keep_own(self, own: _Own, states: Sequence[Float[Tensor, "t d"]], before: int = 0) -> None:
        """Keep the next token's probabilities after the tokenizer's own tokens; ``before`` columns were before them."""
        self._ends = own.ends
        whole = self._path = np.concatenate([own.path, before + np.arange(len(own.tokens))])
        paths = [whole[: len(own.path) + k] for k in range(own.first, len(own.tokens) + 1)]
        if paths:
            hidden = torch.cat([*([] if own.hidden is None else [own.hidden]), *states])[-len(paths) :]
            self._own |= zip(
                own.ends[own.first :], self._along(paths, own.ends[own.first :], list(hidden)), strict=True
            )
        for k in range(max(own.first, 1), len(own.tokens) + 1):
            self._known[int(whole[len(own.path) + k - 2]), own.tokens[k - 1]] = self._own[own.ends[k]]
        if not self.covers:
            self.covers.append(Covers.begun(self._own[self.place], self.member.spelling))
        self._unrun = None

    def _along(
        self, paths: Sequence[Path], places: Sequence[int], hidden: Sequence[Float[Tensor, " d"]]
    ) -> Iterator[NextTokenProbs]:
        """Compute the next token's probabilities after each path, whose tokens end at its byte in ``places``."""
        size, longest = max(1, _ELEMENTS // self.member.head.v), self.member.spelling.longest
        for start in range(0, len(paths), size):
            some = slice(start, start + size)
            for probs in self.member.next_token_probs(paths[some], places[some], hidden[some]):
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
            key = end if self.pruning.prune else (int(one.probs.path[-1]), one.token)
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
        if own is not None and is_own(self.member.spelling, self.tree, self.text[:place], own):
            return own
        if guess is None:
            return None
        (probs,) = self._along([guess.path], [place], [guess.hidden])
        return probs
