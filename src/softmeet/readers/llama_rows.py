"""Rows of a GGUF file's reader, and what a call of it has to run in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from softmeet.errors import SoftmeetError
from softmeet.readers.llama_context import RowTokens
from softmeet.readers.reader import Read, Row


@dataclass(eq=False)
class LlamaRow(Row):
    """A row of a context.

    Attributes:
        number: the row's number there.
        own: how many of the tokens are the member's own, before the text.
        tokens: these and the symbols that were read.
        ran: how many of them the context holds; the others are run before anything else is.
        unsure: whether the context may hold more of it, as a call was left before its end.
        last: (1, v), logits behind the last token, of a model that cannot take it back.
    """

    number: int = 0
    own: int = 0
    tokens: tuple[int, ...] = ()
    ran: int = 0
    unsure: bool = False
    last: Float[np.ndarray, "1 v"] | None = None
    known: int = 0
    is_new: bool = True

    @property
    def length(self) -> int:  # type: ignore[override]
        """The number of the text's symbols that were read."""
        return len(self.tokens) - self.own


@dataclass(eq=False)
class Job:
    """What has to be run for one read.

    Attributes:
        row, read: whose, and what.
        number: the number of the row in which it is run.
        start: how many of its tokens the context holds when these are run.
        tokens: those that are to be run.
        told: behind which of them predictions are wanted, counted from 0.
        found: what was predicted.
        done: how many of them were run.
        error: why it failed.
    """

    row: LlamaRow
    read: Read
    number: int
    start: int
    tokens: tuple[int, ...]
    told: list[int]
    found: list[Float[np.ndarray, "t v"]]
    done: int = 0
    error: SoftmeetError | None = None

    @property
    def left(self) -> bool:
        """Whether something is left to be run."""
        return self.done < len(self.tokens)

    def piece(self, room: int, places: int) -> RowTokens:
        """Return the next of what is left: so many tokens at most, and so many predictions."""
        told = [k for k in self.told if self.done <= k < self.done + room]
        end = min(len(self.tokens), self.done + room)
        if len(told) > places:
            end, told = told[places], told[:places]
        return RowTokens(
            self.number, self.start + self.done, self.tokens[self.done : end], [k - self.done for k in told]
        )

    def predictions(self) -> Float[np.ndarray, "t v"]:
        """Return what was predicted at the places that were asked for."""
        found = self.found[0] if len(self.found) == 1 else np.concatenate(self.found)
        return found[: len(self.read.at)]
