"""The rows of a byte ensemble: what each member has read of them, kept as a cache, and how it reads on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache

from softmeet.errors import InvalidInputError
from softmeet.hf.cache import EnsembleCache, RowsLayer
from softmeet.members.byte_member import ByteMember
from softmeet.members.covers import END, SYMBOLS
from softmeet.members.reading import Reading

# Readings of each row that are kept, so that as many symbols can be taken back without reading anew.
_KEPT = 16


@dataclass(frozen=True)
class ByteRow:
    """One row of a batch, as one member has read it.

    Attributes:
        symbols: bytes, and 256 for the end.
        readings: after the last few symbols, the newest last; none if the row has to be read from its beginning.
        prefix: the member's tokens before the row; None for those before every text.
    """

    symbols: tuple[int, ...] = ()
    readings: tuple[Reading, ...] = ()
    prefix: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """The number of symbols."""
        return len(self.symbols)

    @property
    def fills_up(self) -> bool:
        """Whether the last symbol is the first that the member had no room for."""
        return bool(self.readings) and self.readings[-1].full and not any(one.full for one in self.readings[:-1])

    def longer(self, symbol: int, reading: Reading) -> ByteRow:
        """Add a symbol, and the reading after it."""
        return replace(self, symbols=(*self.symbols, symbol), readings=(*self.readings[1 - _KEPT :], reading))

    def shorter(self, by: int) -> ByteRow:
        """Take the last symbols away, and the readings after them."""
        left = self.readings[: max(0, len(self.readings) - by)]
        return replace(self, symbols=self.symbols[: len(self.symbols) - by], readings=left)


class ByteCache(EnsembleCache):
    """A cache of byte members: one layer for each, so that reordering, cropping and resetting reach them all.

    Args:
        n: how many members there are.
    """

    lagging = False

    def __init__(self, n: int) -> None:
        self.members = [RowsLayer() for _ in range(n)]
        Cache.__init__(self, layers=list(self.members))


def fresh_rows(count: int, prefixes: Sequence[Sequence[int] | None] | None) -> list[ByteRow]:
    """Make rows of which a member has read nothing.

    Args:
        count: how many.
        prefixes: the member's tokens before each row, or before each of as many prompts as divide the rows evenly;
            None for those before every text.

    Raises:
        InvalidInputError: the rows cannot be dealt out to so many prefixes.
    """
    if prefixes is None:
        return [ByteRow()] * count
    if not prefixes or count % len(prefixes):
        raise InvalidInputError(f"expected prefixes for each of {count} prompts, got {len(prefixes)}")
    own = [None if prefix is None else tuple(prefix) for prefix in prefixes]
    return [ByteRow(prefix=prefix) for prefix in own for _ in range(count // len(prefixes))]


def read_on(
    reader: ByteMember, rows: Sequence[ByteRow], symbols: Sequence[Sequence[int]], new: int, wanted: Sequence[int]
) -> tuple[list[ByteRow], Float[Tensor, "B k 257"]]:
    """Have a member read the new symbols of every row: of known rows one by one, of others all at once.

    Args:
        reader: the member.
        rows: what it has read.
        symbols: each row's new ones, which stand at the end of ``new`` columns, behind padding.
        new: how many columns there are.
        wanted: the columns behind whose symbols the next one's log-probabilities are wanted.

    Returns:
        (the rows with their new symbols; the log-probabilities in nats, the same for all symbols at padding).
    """
    out = torch.full((len(rows), len(wanted), SYMBOLS), -math.log(SYMBOLS), dtype=torch.float64)
    found = list(rows)
    known = [k for k, row in enumerate(rows) if row.readings]
    for k, own in enumerate(symbols):
        if not rows[k].readings:
            row = replace(rows[k], symbols=(*rows[k].symbols, *own))
            found[k] = _read_whole(reader, row, len(own), new, wanted, out[k])
    for column in range(new):
        now = [k for k in known if column >= new - len(symbols[k])]
        if not now:
            continue
        given = [symbols[k][column - new] for k in now]
        readings = reader.advance([found[k].readings[-1] for k in now], given)
        for k, symbol, reading in zip(now, given, readings, strict=True):
            found[k] = found[k].longer(symbol, reading)
        if column in wanted:
            out[now, list(wanted).index(column)] = reader.log_probs(readings)
    return found, out


def _read_whole(
    reader: ByteMember, row: ByteRow, count: int, new: int, wanted: Sequence[int], out: Float[Tensor, "k 257"]
) -> ByteRow:
    """Read a row from its beginning, and fill in what follows its last ``count`` symbols, where it is wanted."""
    # What comes after the end is another text.
    ends = [k for k, symbol in enumerate(row.symbols) if symbol == END]
    text = bytes(row.symbols[ends[-1] + 1 if ends else 0 :])
    if list(wanted) in ([new - 1], []):
        reading = reader.begin(text, row.prefix)
        if wanted:
            out[0] = reader.log_probs([reading])[0]
        return replace(row, readings=(reading,))
    reading, log_probs, _ = reader.score(text, row.prefix)
    for place, column in enumerate(wanted):
        # Column new - 1 is the last symbol, after which the last row of the scores comes.
        behind = new - 1 - column
        if behind < min(count, len(text)):
            out[place] = torch.from_numpy(log_probs[len(text) - behind])
    return replace(row, readings=(reading,))
