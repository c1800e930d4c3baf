"""Reading a text whose bytes are all known: the tokenizer's tokens in one call of the model, others in few more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.members.covers import Covers, NextTokenProbs, Open, ProbsAlongText, Pruning
from softmeet.members.reading import Work
from softmeet.members.token_tree import Growth, Path

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
    (:mod:`softmeet.members.covers`). On construction the model is run on the tokenizer's own tokens; then the caller
    alternates :meth:`walk` and :meth:`ask` until :meth:`walk` returns an empty dict.

    Args:
        member: the member that reads.
        prefix: ids of the tokens before the text, at least one.
        text: any bytes.
        look_back: the number of last bytes in which several tokenizations are followed; 0 for the whole text.

    Attributes:
        text: the bytes that the member's tokens spell: the tokenizer's dummy prefix and the text, without unwritable
            bytes.
        place: the index in this text of the byte from which several tokenizations are followed.
        covers: a list; entry k has the :class:`Covers` of the first ``place + k`` bytes of ``self.text``.
        tree: the keys and values of the tokens that have been run.
        work: the cost of reading so far, without the prefix.

    Raises:
        InvalidInputError: if the prefix is empty or has an unknown id, or prefix and text exceed the model's context.
    """

    def __init__(self, member: ByteMember, prefix: Sequence[int], text: bytes, look_back: int) -> None:
        spelling = member.spelling
        self.member, self.text = member, spelling.dummy + text.translate(None, spelling.unwritable)
        self._places: dict[int, int] = {}
        tokens, first = spelling.encode(text), 0
        ends = spelling.bounds(tokens)
        if look_back:
            first = int(np.searchsorted(ends, max(0, len(self.text) - look_back), side="right")) - 1
        self.place = int(ends[first])
        self.tree, hidden = member.behind(prefix)
        self.work = Work()
        if tokens:
            self.tree, states = member.run_chain(tokens, self.tree)
            self.work, hidden = Work(1, len(tokens)), torch.cat([hidden, states])
        before = len(prefix) - 1
        columns = range(before + first, len(prefix) + len(tokens))
        along = self._along([np.arange(c + 1) for c in columns], ends[first:].tolist(), hidden[first:])
        # The next token's probabilities after the tokenizer's own tokens, by the byte at which these end.
        self._own = dict(zip(ends[first:].tolist(), along, strict=True))
        self._behind: dict[Step, NextTokenProbs] = {
            (column - 1, token): probs
            for column, token, probs in zip(columns[1:], tokens[first:], list(self._own.values())[1:], strict=True)
        }
        self.covers = [Covers.begun(self._own[self.place], spelling)]
        self._sure = 1  # This many of them, the first, need no answer that is missing.

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
            probs = probs or self._behind.get(step)
            if probs is None:
                missing[step] = one
            else:
                found.append((one, probs))
        return found

    def _end(self, one: Open) -> int:
        """Return the index in the text of the byte at which an open cover's last token ends."""
        return self._places[int(one.probs.path[-1])] + len(self.member.spelling.spelled([one.token]))

    def ask(self, missing: dict[Step, Open]) -> None:
        """Run the model on the last tokens of the covers that :meth:`walk` returned, in one call, for the next walk.

        ``tree`` and ``work`` are replaced. ``missing`` is that dict, and must not be empty.

        Raises:
            InvalidInputError: if a cover has more tokens, with the prefix, than the model's context.
        """
        opened, before = list(missing.values()), self.tree.columns
        self.work = self.work.and_(calls=1, tokens=len(opened))
        growth = Growth(self.tree, [one.probs.path for one in opened], [[one.token] for one in opened])
        ((self.tree, states),) = self.member.run([growth])
        paths = [np.append(one.probs.path, before + i) for i, one in enumerate(opened)]
        places = [self._end(one) for one in opened]
        self._behind |= zip(missing, self._along(paths, places, torch.cat(states)), strict=True)
