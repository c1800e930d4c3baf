"""A member that reads another one's text, and cuts all of it anew at each step."""

from __future__ import annotations

from collections.abc import Container, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from operator import eq

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError, SoftmeetError
from softmeet.members.prompting import ids_of
from softmeet.readers.open_rows import ReaderOfRows
from softmeet.readers.reader import Explanation, Predictions, Read, Reader, Row
from softmeet.readers.union_alphabet import Union
from softmeet.readers.union_reader import OverUnion, UnionReader
from softmeet.readers.union_tokens import TokensOfSymbols
from softmeet.suspended import Done


class UnionLogits(OverUnion):
    """What a member predicts, over a union; its hidden states are logits over its own tokens."""

    def hidden(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k d"]:
        """Return the member's logits over its own tokens, in nats, at some places."""
        return self.told.logits(self.which[places])


class UnionLogitsReader(UnionReader):
    """A reader over a union, for what combines members by their logits over their own tokens."""

    def over(
        self, told: Predictions, which: Int[Tensor, " k"], counts: Sequence[int], errors: dict[int, SoftmeetError]
    ) -> UnionLogits:
        """Return what the member predicts, over the union, from what it predicts over its own tokens."""
        return UnionLogits(self, told, which, counts, errors)


@dataclass(eq=False)
class AnothersText(Row):
    """A row: another member's prompt as its tokens, and the symbols that were read.

    Attributes:
        own: the tokens of the prompt.
        text: the symbols.
        most: how many tokens there is room for.
        tokens: how many tokens the newest text was.
        below: the member's row, in which the newest text was read; None if there is none.
        read: the tokens that were read there, the first of the text among them.
    """

    own: tuple[int, ...]
    most: int
    text: tuple[int, ...] = ()
    tokens: int = 0
    below: Row | None = None
    read: tuple[int, ...] = ()

    @property
    def length(self) -> int:  # type: ignore[override]
        """The number of symbols that were read."""
        return len(self.text)

    @property
    def full(self) -> bool:  # type: ignore[override]
        """Whether there is hardly room for more tokens."""
        return self.tokens + 2 >= self.most


class RetokenizedReader(ReaderOfRows[AnothersText]):
    """A reader of another member's text: behind each symbol it reads all tokens of the whole text anew.

    The text is what the other member's tokenizer decodes, with the tokens that begin a text, without which the prompt
    alone is read. What was read of the same tokens before is kept.

    Args:
        reader: the member, over its own tokens.
        own: for which of these the symbols stand.
        alphabet: the union.
        tokens: the other member's token for each symbol but the last.
        another: the other member's tokenizer.
        tokenizer: the member's.
        nothing: its tokens for a text of none.
    """

    def __init__(
        self,
        reader: Reader,
        own: TokensOfSymbols,
        alphabet: Union,
        tokens: Sequence[int],
        another: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
        nothing: Sequence[int],
    ) -> None:
        super().__init__(AnothersText)
        self.below, self.alphabet, self.name, self.limit = reader, alphabet, reader.name, reader.limit
        self._over, self._start = UnionLogitsReader(reader, own, alphabet), own.start
        self.traits = self._over.traits
        self._tokens, self._another, self._tokenizer = tokens, another, tokenizer
        self._nothing = nothing
        # What the other tokenizer puts before a text, which is no part of the prompt as it was given.
        self._put = tuple(ids_of(another, ""))

    @property
    def bytes(self) -> int:
        """The bytes of what is kept of texts."""
        return self.below.bytes

    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row behind another member's prompt, ``own``."""
        return self._opened(AnothersText(tuple(own) or self._start, self.below.limit))

    def close(self, row: Row) -> None:
        """Give a row up, with the member's own."""
        one = self._mine(row)
        self._rows.pop(one)
        self._close_below(one)

    def _close_below(self, row: AnothersText) -> None:
        if row.below is not None:
            self.below.close(row.below)
            row.below = None

    def _copied(self, row: AnothersText) -> AnothersText:
        return replace(row, below=None)

    def crop(self, row: Row, length: int) -> None:
        """Take back the symbols behind the first ``length``."""
        one = self._mine(row)
        one.text = one.text[:length]

    def explain(self, row: Row, top: int = 10, at: int | None = None) -> Explanation:
        """Say nothing, as no row of the member is kept."""
        self._mine(row)
        return Explanation()

    def _cut(self, own: tuple[int, ...], text: Sequence[int]) -> list[int]:
        """Return the member's tokens for a prompt and symbols behind it."""
        tokens = [self._tokens[symbol] for symbol in text if symbol < len(self._tokens)]
        if not tokens and own == self._start:
            return list(self._nothing)
        if not tokens and own[: len(self._put)] == self._put:
            own = own[len(self._put) :]
        written = self._another.decode([*own, *tokens])
        return ids_of(self._tokenizer, str(written)) or list(self._nothing)

    def read(self, asked: Sequence[Read]) -> Generator[Done, None, Predictions]:
        """Read on in some rows, as of :meth:`Reader.read`."""
        rows, errors, below = self._each_once(asked), dict[int, SoftmeetError](), list[tuple[int, Read]]()
        temporary = list[Row]()
        try:
            for k, (row, one) in enumerate(zip(rows, asked, strict=True)):
                try:
                    below += [(k, read) for read in self._below(row, one, temporary)]
                except SoftmeetError as error:
                    errors[k] = error
            told = yield from self.below.read([read for _, read in below])
        except BaseException:
            for row in rows:
                self._close_below(row)
            raise
        finally:
            for own in temporary:
                self.below.close(own)
        numbers = [k for k, _ in below]
        errors |= {numbers[j]: error for j, error in told.errors.items()}
        self._settle(rows, asked, errors)
        starts = accumulate(told.counts, initial=0)
        which = [start for k, start in zip(numbers, starts, strict=False) if k not in errors]
        counts = [0 if k in errors else len(one.at) for k, one in enumerate(asked)]
        return self._over.over(told, torch.tensor(which, dtype=torch.long), counts, errors)

    def _settle(self, rows: Sequence[AnothersText], asked: Sequence[Read], errors: Container[int]) -> None:
        """Note of rows what was read in them, and give up the member's rows of those that failed."""
        for k, (row, one) in enumerate(zip(rows, asked, strict=True)):
            if k in errors:
                self._close_below(row)
            elif one.keep:
                row.text = (*row.text, *one.symbols)
                row.tokens = len(self._cut(row.own, row.text))

    def _below(self, row: AnothersText, one: Read, temporary: list[Row]) -> list[Read]:
        """Return what the member is to read for one read of a row; rows that are opened for it alone are added."""
        self._check(row, one.symbols)
        if self.below.traits.can_crop and one.keep and list(one.at) == [len(one.symbols)]:
            return [self._goes_on(row, one.symbols)]
        found = list[Read]()
        for place in one.at:
            found.append(self._opened_below(row, one.symbols[:place]))
            temporary.append(found[-1].row)
        return found

    def _goes_on(self, row: AnothersText, symbols: Sequence[int]) -> Read:
        """Return what the member is to read of a row's text in the row that is held for it, behind what stays so."""
        every = self._cut(row.own, (*row.text, *symbols))[: self.below.limit]
        if row.read[:1] != tuple(every[:1]):
            self._close_below(row)
        if row.below is None:
            row.below = self.below.open(every[1:], every[:1])
            row.read = tuple(every[: 1 + row.below.known])
        same = sum(1 for _ in takewhile(bool, map(eq, row.read, every)))
        self.below.crop(row.below, same - 1)
        row.read = tuple(every)
        return Read(row.below, every[same:], [len(every) - same])

    def _opened_below(self, row: AnothersText, symbols: Sequence[int]) -> Read:
        """Return what the member is to read of a row's text and some symbols behind it, in a row of its own."""
        # Of a text for which there is too little room, what fits is read: the row is full then.
        first, *rest = self._cut(row.own, (*row.text, *symbols))[: self.below.limit]
        below = self.below.open(rest, (first,))
        return Read(below, rest[below.known :], [len(rest) - below.known])

    def _check(self, row: AnothersText, symbols: Sequence[int]) -> None:
        if wrong := [symbol for symbol in symbols if not 0 <= symbol < self.alphabet.size]:
            raise InvalidInputError(f"expected symbols of {self.name} below {self.alphabet.size:,}, got {wrong[0]}")
        if (length := row.length + len(symbols)) > self.limit:
            raise InvalidInputError(f"expected at most {self.limit:,} symbols of {self.name}, got {length:,}")
