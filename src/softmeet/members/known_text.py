"""Reading a text whose bytes are all known: the tokenizer's tokens in one call of the model, others in few more."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.members.covers import Covers, NextTokenProbs, Open, ProbsAlongText, Pruning
from softmeet.members.reading import Guess, Reading, Work
from softmeet.members.token_tree import Growth, Path, TokenTree

if TYPE_CHECKING:
    from softmeet.members.byte_member import ByteMember

# Probabilities of next tokens that are held at once: 128 MiB in fp32.
_ELEMENTS = 1 << 25
# The last token of an open cover: (the column of the token before it, its id).
Step = tuple[int, int]
Answers = list[tuple[Open, NextTokenProbs]]


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
    (:mod:`softmeet.members.covers`). It is made by :meth:`begun` or :meth:`after`. Then the caller asks what the model
    has to be run on (:meth:`wanted`), runs it, perhaps for several texts at once, and hands the results over
    (:meth:`grown`), until nothing is wanted.

    Args:
        member: the member that reads.
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

    def __init__(self, member: ByteMember, text: bytes, place: int, tree: TokenTree, own: _Own | None) -> None:
        self.member, self.text, self.place, self.tree, self.work = member, text, place, tree, Work()
        self.covers = list[Covers]()
        self._sure = 1  # This many of them, the first, need no answer that is missing.
        # By its column, the byte at which a token ends; the next token's probabilities after the tokenizer's own
        # tokens, by the byte at which these end; after others; and what was run ahead of need.
        self._places = dict[int, int]()
        self._own = dict[int, NextTokenProbs]()
        self._behind = dict[Step, NextTokenProbs]()
        self._guesses = dict[tuple[int, int], Guess]()
        self._missing, self._unrun = dict[Step, Open](), own

    @classmethod
    def begun(cls, member: ByteMember, prefix: Sequence[int], text: bytes, look_back: int) -> KnownText:
        """Begin to read a text.

        Args:
            member: the member that reads.
            prefix: ids of the tokens before the text, at least one.
            text: any bytes.
            look_back: the number of last bytes in which several tokenizations are followed; 0 for the whole text.

        Raises:
            InvalidInputError: if the prefix is empty, has an unknown id or exceeds the model's context.
        """
        tokens, first = member.spelling.encode(text), 0
        ends = member.spelling.bounds(tokens).tolist()
        written = _written(member, text)
        if look_back:
            first = bisect_right(ends, max(0, len(written) - look_back)) - 1
        tree, hidden = member.behind(prefix)
        own = _Own(np.arange(len(prefix)), tokens, ends, first, hidden)
        known = cls(member, written, ends[first], tree, own)
        if not tokens:
            known._keep_own(own, [])
        return known

    @classmethod
    def after(cls, member: ByteMember, reading: Reading, more: bytes) -> KnownText:
        """Go on to read ``more`` bytes, at least one, after those of a reading that has not ended.

        Guesses of the reading are used before anything is run.
        """
        written, place = _written(member, reading.text + more), len(_written(member, reading.text))
        tokens = member.spelling.encode(reading.text + more)
        ends = member.spelling.bounds(tokens).tolist()
        on_its_way = [one for one in reading.covers.closed if place - len(one.rest) in ends]
        own = None
        if on_its_way:
            last = min(on_its_way, key=lambda one: len(one.rest))
            first = ends.index(place - len(last.rest))
            own = _Own(last.probs.path, tokens[first:], ends[first:])
        known = cls(member, written, place, reading.tree, own)
        known.covers.append(reading.covers)
        for one in reading.covers.closed:
            known._places[int(one.probs.path[-1])] = place - len(one.rest)
        for light in reading.covers.open:
            length = len(member.spelling.spelled([light.token])) + len(light.rest)
            known._places[int(light.probs.path[-1])] = place - length
        known._guesses = {(id(guess.behind), guess.token): guess for guess in reading.guesses}
        return known

    def wanted(self, pruning: Pruning) -> Growth | None:
        """Return what the model has to be run on next, for :meth:`grown`; None if the reading is complete.

        Args:
            pruning: which covers have to be closed, that is, to have the model run on their last token.

        Raises:
            InvalidInputError: if ``pruning.covers`` is None and there are more than 2,048 tokenizations to follow.
        """
        if self.covers:
            self._missing = self._walk(pruning)
            if not self._missing:
                return None
        if self._unrun is not None:
            own = self._unrun
            return Growth(self.tree, [own.path], [own.tokens], min(len(own.tokens), len(own.tokens) + 1 - own.first))
        opened = list(self._missing.values())
        return Growth(self.tree, [one.probs.path for one in opened], [[one.token] for one in opened])

    def grown(self, tree: TokenTree, states: Sequence[Float[Tensor, "t d"]]) -> None:
        """Take what running the model on :meth:`wanted` gave: the new tree, and each chain's last hidden states."""
        before, self.tree = self.tree.columns, tree
        self.work = self.work.and_(calls=1, tokens=tree.columns - before)
        if self._unrun is not None:
            self._keep_own(self._unrun, states, before)
            return
        opened = list(self._missing.values())
        paths = [np.append(one.probs.path, before + i) for i, one in enumerate(opened)]
        along = self._along(paths, [self._end(one) for one in opened], torch.cat(list(states)))
        self._behind |= zip(self._missing, along, strict=True)

    def _keep_own(self, own: _Own, states: Sequence[Float[Tensor, "t d"]], before: int = 0) -> None:
        """Keep the next token's probabilities after the tokenizer's own tokens; ``before`` columns were before them."""
        whole = np.concatenate([own.path, before + np.arange(len(own.tokens))])
        paths = [whole[: len(own.path) + k] for k in range(own.first, len(own.tokens) + 1)]
        if paths:
            hidden = torch.cat([*([] if own.hidden is None else [own.hidden]), *states])
            self._own |= zip(
                own.ends[own.first :], self._along(paths, own.ends[own.first :], hidden[-len(paths) :]), strict=True
            )
        for k in range(max(own.first, 1), len(own.tokens) + 1):
            self._behind[int(whole[len(own.path) + k - 2]), own.tokens[k - 1]] = self._own[own.ends[k]]
        if not self.covers:
            self.covers.append(Covers.begun(self._own[self.place], self.member.spelling))
        self._unrun = None

    def _along(
        self, paths: Sequence[Path], places: Sequence[int], hidden: Float[Tensor, "k d"]
    ) -> Iterator[NextTokenProbs]:
        """Compute the next token's probabilities after each path, whose tokens end at its byte in ``places``."""
        size, longest = max(1, _ELEMENTS // self.member.head.v), self.member.spelling.longest
        for start in range(0, len(paths), size):
            some = slice(start, start + size)
            for probs, place in zip(self.member.next_token_probs(paths[some], hidden[some]), places[some], strict=True):
                self._places[int(probs.path[-1])] = place
                if place + longest < len(self.text):
                    yield ProbsAlongText(probs, self.member.spelling, self.text[place : place + longest])
                else:
                    yield probs

    def _walk(self, pruning: Pruning) -> dict[Step, Open]:
        """Follow the text byte by byte to its end, with the model's answers so far, and complete ``covers``.

        Returns:
            The open covers that have to be closed and were estimated instead, by (the column of the token before the
            last, the last token's id).
        """
        spelling, missing = self.member.spelling, dict[Step, Open]()
        del self.covers[self._sure :]
        for byte in self.text[self.place + self._sure - 1 :]:
            covers = self.covers[-1].followed(spelling, byte, pruning)
            while answers := self._answers(covers, missing, pruning):
                covers = covers.answered(spelling, answers, pruning)
            self.covers.append(covers)
            if not missing:
                self._sure = len(self.covers)
        return missing

    def _answers(self, covers: Covers, missing: dict[Step, Open], pruning: Pruning) -> Answers:
        """Return the open covers to close and the model's answers; add those without an answer to ``missing``."""
        found = []
        for one in covers.wanted(pruning):
            step = int(one.probs.path[-1]), one.token
            # Predictions after tokens that end at one byte differ little, and the tokenizer's own have been run.
            probs = self._own.get(self._end(one)) if pruning.prune else None
            probs = probs or self._behind.get(step) or self._guessed(one)
            if probs is None:
                missing[step] = one
            else:
                found.append((one, probs))
        return found

    def _guessed(self, one: Open) -> NextTokenProbs | None:
        """Return the next token's probabilities after an open cover whose last token was run ahead of need."""
        guess = self._guesses.get((id(one.probs), one.token))
        if guess is None:
            return None
        (probs,) = self._along([guess.path], [self._end(one)], guess.hidden[None])
        self._behind[int(one.probs.path[-1]), one.token] = probs
        return probs

    def _end(self, one: Open) -> int:
        """Return the index in the text of the byte at which an open cover's last token ends."""
        return self._places[int(one.probs.path[-1])] + len(self.member.spelling.spelled([one.token]))


def _written(member: ByteMember, text: bytes) -> bytes:
    """Return the bytes that a member's tokens spell for a text."""
    return member.spelling.dummy + text.translate(None, member.spelling.unwritable)
