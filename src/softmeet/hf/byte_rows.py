"""The rows of a batch over bytes, each a sequence of symbols: the members' cache of them, and reading new symbols.

A *symbol* is one of 257: a byte, 0 to 255, or 256, the end of a text.
"""

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

# The readings kept for each row; fewer symbols than that can be removed without reading the row anew.
_KEPT = 16


@dataclass(frozen=True)
class ByteRow:
    """One sequence of symbols of a batch, and one member's states after its last symbols.

    Attributes:
        symbols: the symbols so far.
        readings: the member's state after each of the last symbols, at most 16, the newest last; empty if the member
            has to read the row from its beginning.
        prefix: the ids of the member's own tokens that it reads before the row; None for those that it reads before
            every text by default.
    """

    symbols: tuple[int, ...] = ()
    readings: tuple[Reading, ...] = ()
    prefix: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """The number of symbols so far."""
        return len(self.symbols)

    @property
    def fills_up(self) -> bool:
        """Whether the text's tokens exceed the member's context since the newest symbol, and did not before it."""
        return bool(self.readings) and self.readings[-1].full and not any(one.full for one in self.readings[:-1])

    def longer(self, symbol: int, reading: Reading) -> ByteRow:
        """Return a copy with ``symbol`` added, and ``reading``, the member's state after it, as the newest reading."""
        return replace(self, symbols=(*self.symbols, symbol), readings=(*self.readings[1 - _KEPT :], reading))

    def shorter(self, by: int) -> ByteRow:
        """Return a copy without the last ``by`` symbols and the readings after them."""
        left = self.readings[: max(0, len(self.readings) - by)]
        return replace(self, symbols=self.symbols[: len(self.symbols) - by], readings=left)


class ByteCache(EnsembleCache):
    """The cache of an ensemble over bytes: a layer for each member, which holds a :class:`ByteRow` for each sequence.

    Args:
        n: the number of members.
    """

    lagging = False

    def __init__(self, n: int) -> None:
        self.members = [RowsLayer() for _ in range(n)]
        Cache.__init__(self, layers=list(self.members))


def fresh_rows(count: int, prefixes: Sequence[Sequence[int] | None] | None) -> list[ByteRow]:
    """Make empty rows for one member.

    Args:
        count: the number of rows.
        prefixes: the ids of the member's own tokens before each row, or before each prompt, in which case the rows of a
            prompt stand side by side; an entry of None, or None for all, stands for the member's default prefix.

    Raises:
        InvalidInputError: if ``count`` is no multiple of the number of prefixes.
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
    """Have a member read the new symbols of every row: symbol by symbol, or at once if it has no reading of the row.

    Args:
        reader: the member.
        rows: the B rows before the new symbols, from :func:`fresh_rows` or an earlier call; they are not changed.
        symbols: each row's new symbols, 0 to 256. They fill the last of ``new`` columns, the columns before them being
            padding.
        new: the number of columns, at least that of any row's new symbols.
        wanted: the indices, from 0 to ``new`` - 1, of the k columns after whose symbols the next symbol's
            log-probabilities are wanted.

    Returns:
        (the rows with the new symbols; the log-probabilities in nats, (B, k, 257), fp64, uniform at padding and, in a
        row that is read at once for more than its last column, before its last end symbol).
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
    """Read a row from its beginning, and write the next symbol's log-probabilities into ``out``.

    Args:
        reader: the member.
        row: the row, new symbols included.
        count: the number of its new symbols.
        new, wanted: as for :func:`read_on`.
        out: (k, 257), written at the wanted columns that hold a new symbol after the last end.

    Returns:
        The row with the reading after its last symbol.
    """
    # An end symbol ends a text: the member reads the text after the last one.
    ends = [k for k, symbol in enumerate(row.symbols) if symbol == END]
    text = bytes(row.symbols[ends[-1] + 1 if ends else 0 :])
    if list(wanted) in ([new - 1], []):
        reading = reader.begin(text, row.prefix)
        if wanted:
            out[0] = reader.log_probs([reading])[0]
        return replace(row, readings=(reading,))
    reading, log_probs, _ = reader.score(text, row.prefix)
    for place, column in enumerate(wanted):
        # The last column, new - 1, is the last symbol, and the last row of the scores is the prediction after it.
        behind = new - 1 - column
        if behind < min(count, len(text) + 1):
            out[place] = torch.from_numpy(log_probs[len(text) - behind])
    return replace(row, readings=(reading,))
