"""Reading a text whose bytes are known: the tokenizer's tokens in one call of the model, other covers in few more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.members.covers import (
    Asked,
    AskedAlong,
    Covers,
    Open,
    Pruning,
    begun,
    closed,
    followed,
    wanted,
)
from softmeet.members.token_tree import Growth, Path

if TYPE_CHECKING:
    from softmeet.members.byte_member import ByteMember

# Probabilities of next tokens that are held at once: 128 MiB in fp32.
_ELEMENTS = 1 << 25
# The tree's node that tokens stand behind, and the token.
Step = tuple[int, int]


class KnownText:
    """A text, and what a member says behind its covers, as far as the model was asked.

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
        calls, tokens: of the model, and tokens run in them.
    """

    def __init__(self, member: ByteMember, prefix: Sequence[int], text: bytes, look_back: int) -> None:
        spelling = member.spelling
        self.member, self.text = member, spelling.dummy + text.translate(None, spelling.unwritable)
        self._longest = spelling.longest
        self._places: dict[int, int] = {}
        self._behind: dict[Step, Asked] = {}
        tokens = spelling.encode(text)
        ends = np.cumsum([0, *(len(spelling.spelled([token])) for token in tokens)])
        first = 0
        if look_back:
            first = int(np.searchsorted(ends, max(0, len(self.text) - look_back), side="right")) - 1
        self.place = int(ends[first])
        self.tree, hidden = member.behind(prefix)
        self.calls, self.tokens = 0, len(tokens)
        if tokens:
            ((self.tree, (states,)),) = member.run([Growth(self.tree, [np.arange(len(prefix))], [tokens])])
            self.calls, hidden = 1, torch.cat([hidden, states])
        before = len(prefix) - 1
        columns = range(before + first, len(prefix) + len(tokens))
        along = self._along([np.arange(c + 1) for c in columns], ends[first:].tolist(), hidden[first:])
        # By the byte at which it ends, the tokenizer's own cover.
        self._own = dict(zip(ends[first:].tolist(), along, strict=True))
        self._behind |= {
            (column - 1, token): asked
            for column, token, asked in zip(columns[1:], tokens[first:], list(self._own.values())[1:], strict=True)
        }
        self.covers = [begun(self._own[self.place], spelling)]
        self._sure = 1  # So many of them rest on no answer that was missing.

    def _along(self, paths: Sequence[Path], places: Sequence[int], hidden: Float[Tensor, "k d"]) -> Iterator[Asked]:
        """What comes behind each path, whose tokens end at a byte of the text, some at a time."""
        size = max(1, _ELEMENTS // self.member.head.v)
        for start in range(0, len(paths), size):
            some = slice(start, start + size)
            for asked, place in zip(self.member.asked(paths[some], hidden[some]), places[some], strict=True):
                self._places[int(asked.path[-1])] = place
                if place + self._longest < len(self.text):
                    yield AskedAlong(asked, self.member.spelling, self.text[place : place + self._longest])
                else:
                    yield asked

    def walk(self, pruning: Pruning) -> dict[Step, Open]:
        """Follow the text, with the model's answers as far as they are there.

        Returns:
            open covers that the model should have been asked about; they were estimated.
        """
        spelling, missing = self.member.spelling, dict[Step, Open]()
        del self.covers[self._sure :]
        for byte in self.text[self.place + self._sure - 1 :]:
            covers = followed(spelling, self.covers[-1], byte, pruning)
            while answers := self._answers(covers, missing, pruning):
                covers = closed(spelling, covers, answers, pruning)
            self.covers.append(covers)
            if not missing:
                self._sure = len(self.covers)
        return missing

    def _answers(self, covers: Covers, missing: dict[Step, Open], pruning: Pruning) -> list[tuple[Open, Asked]]:
        """Those there are, of the open covers that the model is to be asked about; the others go to ``missing``."""
        found = []
        for one in wanted(covers, pruning):
            step = int(one.asked.path[-1]), one.token
            # Covers that end at one byte differ little, and the tokenizer's own was run with the others.
            asked = self._own.get(self._end(one)) if pruning.prune else None
            asked = asked or self._behind.get(step)
            if asked is None:
                missing[step] = one
            else:
                found.append((one, asked))
        return found

    def _end(self, one: Open) -> int:
        return self._places[int(one.asked.path[-1])] + len(self.member.spelling.spelled([one.token]))

    def ask(self, missing: dict[Step, Open]) -> None:
        """Ask the model about open covers in one call."""
        opened, before = list(missing.values()), self.tree.columns
        self.calls, self.tokens = self.calls + 1, self.tokens + len(opened)
        growth = Growth(self.tree, [one.asked.path for one in opened], [[one.token] for one in opened])
        ((self.tree, states),) = self.member.run([growth])
        paths = [np.append(one.asked.path, before + i) for i, one in enumerate(opened)]
        places = [self._end(one) for one in opened]
        self._behind |= zip(missing, self._along(paths, places, torch.cat(states)), strict=True)
