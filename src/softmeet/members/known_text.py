"""Reading a text whose bytes are all known: the tokenizer's tokens in one call of the model, others in few more."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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


class KnownText:
    """A text whose bytes are all known, with the covers that are followed and the model's answers about them so far.

    A cover is one way to cut the bytes into tokens, open if the model has not been run on its last token
    (:mod:`softmeet.members.covers`). It is made by :meth:`begun`, which runs the model on the tokenizer's own tokens,
    or by :meth:`after`; then the caller alternates :meth:`walk` and :meth:`ask` until nothing is missing.

    Args:
        member: the member that reads.
        text: the bytes that the member's tokens spell: the tokenizer's dummy prefix and the text, without unwritable
            bytes.
        place: the index in this text of the byte from which several tokenizations are followed.
        tree: the keys and values of the tokens before that byte.

    Attributes:
        text, place: as given.
        covers: a list; entry k has the :class:`Covers` of the first ``place + k`` bytes of ``self.text``.
        tree: the keys and values of the tokens that have been run.
        work: the cost of reading so far, without the prefix.
    """

    def __init__(self, member: ByteMember, text: bytes, place: int, tree: TokenTree) -> None:
        self.member, self.text, self.place, self.tree, self.work = member, text, place, tree, Work()
        self.covers = list[Covers]()
        self._sure = 1  # This many of them, the first, need no answer that is missing.
        # By its column, the byte at which a token ends; the next token's probabilities after the tokenizer's own
        # tokens, by the byte at which these end; and after others.
        self._places = dict[int, int]()
        self._own = dict[int, NextTokenProbs]()
        self._behind = dict[Step, NextTokenProbs]()
        # What was run ahead of need, and how to run the tokenizer's own tokens if that does not do.
        self._guesses = dict[tuple[int, int], Guess]()
        self._run_late: Callable[[], None] | None = None

    @classmethod
    def begun(cls, member: ByteMember, prefix: Sequence[int], text: bytes, look_back: int) -> KnownText:
        """Begin to read a text.

        Args:
            member: the member that reads.
            prefix: ids of the tokens before the text, at least one.
            text: any bytes.
            look_back: the number of last bytes in which several tokenizations are followed; 0 for the whole text.

        Raises:
            InvalidInputError: if the prefix is empty or has an unknown id, or prefix and text exceed the context.
        """
        tokens, first = member.spelling.encode(text), 0
        ends = member.spelling.bounds(tokens).tolist()
        written = _written(member, text)
        if look_back:
            first = bisect_right(ends, max(0, len(written) - look_back)) - 1
        tree, hidden = member.behind(prefix)
        known = cls(member, written, ends[first], tree)
        known._run_own(np.arange(len(prefix)), tokens, ends, first, hidden)
        known.covers.append(Covers.begun(known._own[known.place], member.spelling))
        return known

    @classmethod
    def after(cls, member: ByteMember, reading: Reading, more: bytes) -> KnownText:
        """Go on to read ``more`` bytes, at least one, after those of a reading that has not ended.

        Nothing is run before :meth:`ask`: the reading's guesses may do.
        """
        written, place = _written(member, reading.text + more), len(_written(member, reading.text))
        known = cls(member, written, place, reading.tree)
        known.covers.append(reading.covers)
        for one in reading.covers.closed:
            known._places[int(one.probs.path[-1])] = place - len(one.rest)
        for light in reading.covers.open:
            length = len(member.spelling.spelled([light.token])) + len(light.rest)
            known._places[int(light.probs.path[-1])] = place - length
        tokens = member.spelling.encode(reading.text + more)
        ends = member.spelling.bounds(tokens).tolist()
        on_its_way = [one for one in reading.covers.closed if place - len(one.rest) in ends]
        if on_its_way:
            last = min(on_its_way, key=lambda one: len(one.rest))
            first = ends.index(place - len(last.rest))
            known._run_late = partial(known._run_own, last.probs.path, tokens[first:], ends[first:], 1, None)
        known._guesses = {(id(guess.behind), guess.token): guess for guess in reading.guesses}
        return known

    def _run_own(
        self, path: Path, tokens: Sequence[int], ends: Sequence[int], first: int, hidden: Float[Tensor, "1 d"] | None
    ) -> None:
        """Run the tokenizer's own tokens, and keep the next token's probabilities after those from ``first`` on.

        Args:
            path: the columns of the tokens before them.
            tokens: their ids.
            ends: the byte at which the first begins, and those at which each of them ends.
            first: the number of tokens, at least 1 without ``hidden``, after which probabilities are wanted.
            hidden: the last hidden state at the last token of ``path``.
        """
        before, states = self.tree.columns, [] if hidden is None else [hidden]
        whole = np.concatenate([path, before + np.arange(len(tokens))])
        if tokens:
            ((self.tree, (own,)),) = self.member.run([Growth(self.tree, [path], [list(tokens)])])
            self.work = self.work.and_(calls=1, tokens=len(tokens))
            states.append(own)
        paths = [whole[: len(path) + k] for k in range(first, len(tokens) + 1)]
        if paths:
            along = self._along(paths, ends[first:], torch.cat(states)[-len(paths) :])
            self._own |= zip(ends[first:], along, strict=True)
        for k in range(max(first, 1), len(tokens) + 1):
            self._behind[int(whole[len(path) + k - 2]), tokens[k - 1]] = self._own[ends[k]]

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

    def walk(self, pruning: Pruning) -> dict[Step, Open]:
        """Follow the text byte by byte to its end, with the model's answers so far, and complete ``covers``.

        Args:
            pruning: which covers have to be closed, that is, to have the model run on their last token.

        Returns:
            The open covers that have to be closed and were estimated instead, for :meth:`ask`, by (column in ``tree``
            of the token before the last, last token's id). If it is empty, the reading is complete.

        Raises:
            InvalidInputError: if ``pruning.covers`` is None and there are more than 2,048 tokenizations to follow.
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

    def ask(self, missing: dict[Step, Open]) -> None:
        """Run the model on the last tokens of the covers that :meth:`walk` returned, in one call, for the next walk.

        If the tokenizer's own tokens have not been run, they are instead. ``tree`` and ``work`` are replaced.
        ``missing`` is that dict, and must not be empty.

        Raises:
            InvalidInputError: if a cover has more tokens, with the prefix, than the model's context.
        """
        if self._run_late is not None:
            self._run_late()
            self._run_late = None
            return
        opened, before = list(missing.values()), self.tree.columns
        self.work = self.work.and_(calls=1, tokens=len(opened))
        growth = Growth(self.tree, [one.probs.path for one in opened], [[one.token] for one in opened])
        ((self.tree, states),) = self.member.run([growth])
        paths = [np.append(one.probs.path, before + i) for i, one in enumerate(opened)]
        places = [self._end(one) for one in opened]
        self._behind |= zip(missing, self._along(paths, places, torch.cat(states)), strict=True)


def _written(member: ByteMember, text: bytes) -> bytes:
    """Return the bytes that a member's tokens spell for a text."""
    return member.spelling.dummy + text.translate(None, member.spelling.unwritable)
