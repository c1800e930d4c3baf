"""``Population``: many texts of one ensemble that are written together, and may begin anew as copies of each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.engine.ask import Members
from softmeet.engine.continuation import Continuation
from softmeet.errors import InvalidInputError
from softmeet.readers.reader import Reader


class Population:
    """Texts behind prompts, several behind each.

    Args:
        prompts: the prompts, of which nothing has been read.
        each: how many texts there are behind each, one prompt's after the other's.
        members: those who read.

    Attributes:
        rows: how many texts there are.

    Raises:
        InvalidInputError: if a member cannot fork, or has too few rows.
    """

    def __init__(self, prompts: Sequence[Continuation], each: int, members: Members) -> None:
        self.rows, self._each, self._members = each * len(prompts), each, members
        # Members that are one model share the rows of its reader.
        for reader, times in Counter(prompts[0].readers).items():
            if each > 1 and not reader.traits.can_fork:
                raise reader.cannot("fork rows")
            require_rows(reader, times * self.rows)
        self._prompts: list[Continuation] | None = list(prompts)
        self._texts = list[Continuation](prompts)
        self._start = [len(one.tokens) for one in prompts for _ in range(each)]

    def log_probs(self, rows: Sequence[int]) -> Float[Tensor, "n k v"]:
        """Return each member's log-probabilities in nats, fp64, of the symbol that follows the texts of k rows.

        Raises:
            SoftmeetError: if a member cannot read a text, or its context is full.
        """
        if self._prompts is None:
            return self._read([self._texts[row] for row in rows])
        # What follows a prompt is read once.
        told = self._read(self._prompts)
        self._texts = [text for one in self._prompts for text in (one, *(one.fork() for _ in range(self._each - 1)))]
        self._prompts = None
        return told[:, [row // self._each for row in rows]]

    def _read(self, texts: Sequence[Continuation]) -> Float[Tensor, "n k v"]:
        told, combiner = self._members.read_on(texts), texts[0].model.combiner
        for one in texts:
            one.check()
            if one.is_full:
                raise InvalidInputError(
                    f"the context of {', '.join(one.full_members)} is full before the limit of the texts: lower it"
                )
        hidden = [torch.cat(own) for own in zip(*(told[one] for one in texts), strict=True)]
        logits = combiner.own_logits(hidden)
        if combiner.support is not None:
            logits = logits.masked_fill(~combiner.support, -torch.inf)
        return combiner.normalised(logits).cpu()

    def add(self, rows: Sequence[int], symbols: Sequence[int]) -> None:
        """Add a symbol to the text of each of some rows."""
        for row, symbol in zip(rows, symbols, strict=True):
            self._texts[row].tokens.append(symbol)

    def finish(self, rows: Sequence[int]) -> None:
        """Have the members forget the texts of some rows."""
        for row in rows:
            self._texts[row].close()

    def replace(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """Have each of some rows be a copy of what another row was before."""
        before, left = list(self._texts), set(sources) & set(rows)
        for row in set(rows) - left:
            before[row].close()
        for row, source in zip(rows, sources, strict=True):
            # A text stays itself once, in its own row if that is none of these; further copies of it are forks.
            self._texts[row] = before[source].fork() if source not in left else before[source]
            left.discard(source)

    def symbols(self, row: int) -> tuple[int, ...]:
        """Return the symbols that were added to a row, or to what it is a copy of."""
        return tuple(self._texts[row].tokens[self._start[row] :])

    def allowed(self, rows: Sequence[int]) -> Bool[Tensor, "k v"] | None:
        """Return which symbols can follow; None if all can."""
        masks = [self._texts[row].readers[0].alphabet.may_follow(self._texts[row].tokens) for row in rows]
        return None if masks[0] is None else torch.stack([mask for mask in masks if mask is not None])

    def close(self) -> None:
        """Have the members forget all texts."""
        for one in self._texts:
            one.close()


def require_rows(reader: Reader, count: int) -> None:
    """Raise InvalidInputError if a reader has fewer rows than so many."""
    if reader.traits.rows is not None and count > reader.traits.rows:
        raise InvalidInputError(
            f"expected at most {reader.traits.rows} texts at once, as {reader.name} has so many rows, got {count}: ask "
            "for fewer, or behind fewer prompts"
        )
