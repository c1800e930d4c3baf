"""Reading a text whose bytes are known: the tokenizer's tokens in one call of the model, other covers in few more."""

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
# The tree's node that a token stands behind, and the token.
Step = tuple[int, int]
Answers = list[tuple[Open, NextTokenProbs]]


class KnownText:
    """A text whose bytes are known, and what a member says behind its covers, as far as the model was asked.

    Args:
        member: who reads it.
        prefix: tokens that it has read before.
        text: of any bytes.
        look_back: follow all tokenizations of so many bytes at the end alone; 0 for all of the text.

    Attributes:
        text: the bytes that the member's tokens spell: with its dummy prefix, without what it cannot write.
        place: the byte from which tokenizations are followed.
        covers: of the text as far as that place, and one byte further each.
        tree: what the model keeps.
        work: what reading has cost.
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
        # By the byte at which it ends, the tokenizer's own cover.
        self._own = dict(zip(ends[first:].tolist(), along, strict=True))
        self._behind: dict[Step, NextTokenProbs] = {
            (column - 1, token): probs
            for column, token, probs in zip(columns[1:], tokens[first:], list(self._own.values())[1:], strict=True)
        }
        self.covers = [Covers.begun(self._own[self.place], spelling)]
        self._sure = 1  # So many of them rest on no answer that was missing.

    def _along(
        self, paths: Sequence[Path], places: Sequence[int], hidden: Float[Tensor, "k d"]
    ) -> Iterator[NextTokenProbs]:
        """Compute, some at a time, what comes behind each path, whose tokens end at a byte of the text."""
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
        """Follow the text, with the model's answers as far as they are there.

        Returns:
            the open covers that the model should have been asked about, and that were estimated.
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
        """Return the answers that are there about the covers that need one; the others go to ``missing``."""
        found = []
        for one in covers.wanted(pruning):
            step = int(one.probs.path[-1]), one.token
            # Covers that end at one byte differ little, and the tokenizer's own was run with the others.
            probs = self._own.get(self._end(one)) if pruning.prune else None
            probs = probs or self._behind.get(step)
            if probs is None:
                missing[step] = one
            else:
                found.append((one, probs))
        return found

    def _end(self, one: Open) -> int:
        return self._places[int(one.probs.path[-1])] + len(self.member.spelling.spelled([one.token]))

    def ask(self, missing: dict[Step, Open]) -> None:
        """Ask the model about open covers in one call."""
        opened, before = list(missing.values()), self.tree.columns
        self.work = self.work.and_(calls=1, tokens=len(opened))
        growth = Growth(self.tree, [one.probs.path for one in opened], [[one.token] for one in opened])
        ((self.tree, states),) = self.member.run([growth])
        paths = [np.append(one.probs.path, before + i) for i, one in enumerate(opened)]
        places = [self._end(one) for one in opened]
        self._behind |= zip(missing, self._along(paths, places, torch.cat(states)), strict=True)
