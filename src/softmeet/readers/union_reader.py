"""A member over the union of several tokenizers' tokens: it reads a byte string that it lacks as tokens of its own."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.errors import SoftmeetError, VocabularyMismatchError
from softmeet.readers.open_rows import ReaderOfRows
from softmeet.readers.reader import Explanation, Predictions, Read, Reader, Row
from softmeet.readers.union_alphabet import Union
from softmeet.readers.union_tokens import TokensOfSymbols
from softmeet.suspended import Done

# The room, in tokens, behind which a text ends: a symbol that a member lacks needs several.
_SPARE = 8


@dataclass(eq=False)
class UnionText(Row):
    """A row: the symbols that were read, as tokens of the row below.

    Attributes:
        below: the member's own row.
        most: how many tokens it has room for.
        tokens: how many of its tokens the first k symbols are, for each k from 0.
    """

    below: Row
    most: int
    tokens: list[int] = field(default_factory=lambda: [0])
    known: int = 0

    @property
    def length(self) -> int:  # type: ignore[override]
        """The number of symbols that were read."""
        return len(self.tokens) - 1

    @property
    def full(self) -> bool:  # type: ignore[override]
        """Whether the member has room for a few tokens at most, fewer than a symbol may need."""
        return self.below.full or self.tokens[-1] + min(_SPARE, self.most // 16) >= self.most


class UnionReader(ReaderOfRows[UnionText]):
    """A reader over tokens that is read over the union of several tokenizers' tokens (GaC, Yu et al., 2024).

    What it predicts of a symbol is the sum over its tokens that the symbol stands for, and 0 where there are none;
    tokens for which no symbol stands are left out, and the others renormalised. The end begins a text where it comes
    first, of which nothing is read.

    Args:
        reader: the member, over its own tokens.
        own: for which of these the symbols stand, and as which they are read.
        alphabet: the union.
    """

    alphabet: Union

    def __init__(self, reader: Reader, own: TokensOfSymbols, alphabet: Union) -> None:
        super().__init__(UnionText)
        self.below, self._own, self.alphabet = reader, own, alphabet
        self.name, self.limit = reader.name, reader.limit
        self.traits = replace(reader.traits, known=None, calls=(), waits=False, claims=False)
        # The ids of all that are told, once; and for each pass, which of them are added to which symbols.
        told = [token for ids in own.ids.values() for token in ids]
        if (last := max(told, default=0)) >= reader.alphabet.size:
            raise VocabularyMismatchError(
                f"expected an output layer of {self.name} with a logit for each of its tokens, got {last:,} as a token "
                f"and {reader.alphabet.size:,} logits: its tokenizer is not its own"
            )
        self._told = torch.tensor(told)
        self._passes = _passes(list(own.ids.values()), list(own.ids))

    @property
    def bytes(self) -> int:
        """The bytes of all open rows, and of what is kept of closed ones."""
        return self.below.bytes

    def abort(self) -> None:
        """End what waits for an answer from elsewhere."""
        self.below.abort()

    def tokens_of(self, symbol: int, *, first: bool = False) -> tuple[int, ...]:
        """Return the member's tokens as which a symbol is read.

        Args:
            symbol: the symbol.
            first: whether nothing stands before it; then the end is no token.
        """
        return () if first and symbol == self.alphabet.end else self._own.read_as(symbol)

    def _cuts(self, symbols: Sequence[int], before: int) -> list[tuple[int, ...]]:
        return [self.tokens_of(symbol, first=not (before + k)) for k, symbol in enumerate(symbols)]

    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row, as of :meth:`Reader.open`; a symbol is known if all of its tokens are."""
        cuts, counts = self._cuts(text, 0), [0]
        for cut in cuts:
            counts.append(counts[-1] + len(cut))
        own = tuple(own) or self._own.start
        below = self.below.open([token for cut in cuts for token in cut], own, reuse=reuse)
        known = min(bisect_right(counts, below.known) - 1, max(0, len(text) - 1))
        if counts[known] != below.known:
            if self.below.traits.can_crop:
                self.below.crop(below, counts[known])
            else:
                self.below.close(below)
                below, known = self.below.open((), own, reuse=False), 0
        most = self.below.limit - len(own)
        return self._opened(UnionText(below, most, counts[: known + 1], known))

    def fork(self, row: Row, count: int = 1, length: int | None = None) -> list[Row]:
        """Open rows that share what was read of another."""
        one = self._mine(row)
        kept = one.length if length is None else length
        self._require_length(one, kept)
        forks = self.below.fork(one.below, count, one.tokens[kept])
        return [self._opened(UnionText(fork, one.most, one.tokens[: kept + 1])) for fork in forks]

    def crop(self, row: Row, length: int) -> None:
        """Take back the symbols behind the first ``length``."""
        one = self._mine(row)
        self._require_length(one, length)
        self.below.crop(one.below, one.tokens[length])
        del one.tokens[length + 1 :]

    def close(self, row: Row) -> None:
        """Give a row up, and the member's own row with it."""
        one = self._mine(row)
        self._rows.pop(one)
        self.below.close(one.below)

    def explain(self, row: Row, top: int = 10, at: int | None = None) -> Explanation:
        """Say what the member says of its own row."""
        one = self._mine(row)
        return self.below.explain(one.below, top, None if at is None else one.tokens[at])

    def read(self, asked: Sequence[Read]) -> Generator[Done, None, Predictions]:
        """Read on in some rows, as of :meth:`Reader.read`."""
        rows, below, errors = self._each_once(asked), dict[int, Read](), dict[int, SoftmeetError]()
        counts, places = dict[int, list[int]](), dict[int, list[int]]()
        for k, (row, one) in enumerate(zip(rows, asked, strict=True)):
            if error := self._unknown(one.symbols):
                errors[k] = error
                continue
            cuts, counts[k] = self._cuts(one.symbols, row.length), [0]
            # Of a symbol for which there is too little room, what fits is read: the row is full then.
            left = row.most - row.tokens[-1] if row.length + len(one.symbols) <= self.limit else sys.maxsize
            for cut in cuts:
                counts[k].append(min(left, counts[k][-1] + len(cut)))
            at = [counts[k][place] for place in one.at]
            # A symbol may be no token at all: a place is asked for once.
            places[k] = sorted(set(at))
            tokens = [token for cut in cuts for token in cut][: counts[k][-1]]
            below[k] = Read(row.below, tokens, places[k], one.keep)
        told = yield from self.below.read(list(below.values()))
        numbers, which, start = list(below), list[int](), 0
        errors |= {numbers[j]: error for j, error in told.errors.items()}
        for k in numbers:
            if k in errors:
                continue
            which += [start + places[k].index(counts[k][place]) for place in asked[k].at]
            start += len(places[k])
            if asked[k].keep:
                rows[k].tokens += [rows[k].tokens[-1] + count for count in counts[k][1:]]
        found = [0 if k in errors else len(one.at) for k, one in enumerate(asked)]
        return self.over(told, torch.tensor(which, dtype=torch.long), found, errors)

    def over(
        self, told: Predictions, which: Int[Tensor, " k"], counts: Sequence[int], errors: dict[int, SoftmeetError]
    ) -> OverUnion:
        """Return what the member predicts, over the union, from what it predicts over its own tokens.

        Args:
            told: the latter.
            which: for each place, which of these predictions.
            counts, errors: as of :class:`Predictions`.
        """
        return OverUnion(self, told, which, counts, errors)

    def over_union(self, logits: Float[Tensor, "k v"]) -> Float[Tensor, "k u"]:
        """Return log-probabilities of the union's symbols, in nats, from logits of the member's own tokens."""
        own = logits[:, self._told.to(logits.device)].log_softmax(-1)
        found = own.new_full((len(own), self.alphabet.size), -torch.inf)
        for first, (which, symbols) in enumerate(self._passes):
            which, symbols = which.to(own.device), symbols.to(own.device)
            added = own[:, which]
            found[:, symbols] = torch.logaddexp(found[:, symbols], added) if first else added
        return found


class OverUnion(Predictions):
    """What a member predicts, over the union.

    Args:
        reader: the member.
        told: what it predicts over its own tokens.
        which: for each place, which of these predictions.
        counts, errors: as of :class:`Predictions`.
    """

    def __init__(
        self,
        reader: UnionReader,
        told: Predictions,
        which: Int[Tensor, " k"],
        counts: Sequence[int],
        errors: dict[int, SoftmeetError],
    ) -> None:
        super().__init__(counts, dict(sorted(errors.items())), told.work)
        self._reader, self.told, self.which = reader, told, which

    def logits(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k v"]:
        """Return log-probabilities at some places."""
        return self._reader.over_union(self.told.logits(self.which[places]))

    def log_probs(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k v"]:
        """Return log-probabilities at some places."""
        return self.logits(places)


def _passes(ids: Sequence[Sequence[int]], symbols: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return, for the first, second and further token of each symbol, (their places among all, the symbols)."""
    passes, place = list[tuple[list[int], list[int]]](), 0
    for own, symbol in zip(ids, symbols, strict=True):
        for k in range(len(own)):
            if k == len(passes):
                passes.append(([], []))
            passes[k][0].append(place)
            passes[k][1].append(symbol)
            place += 1
    return [(torch.tensor(which), torch.tensor(of)) for which, of in passes]
