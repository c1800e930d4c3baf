"""The rows of a batch over bytes, each a sequence of symbols: the members' cache of them, and reading new symbols.

A *symbol* is one of 257: a byte, 0 to 255, or 256, the end of a text.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache

from softmeet.errors import InvalidInputError
from softmeet.hf.cache import EnsembleCache
from softmeet.hf.rows import RowsLayer
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import END, SYMBOLS
from softmeet.readers.bytes.reading import Reading

# The readings kept for each row; fewer symbols than that can be removed without reading the row anew.
_KEPT = 16


@dataclass(frozen=True)
class ByteRow:
    """One sequence of symbols of a batch, and one member's states after its last symbols.

    Attributes:
        symbols: the symbols so far.
        readings: (a number of symbols, the member's state after so many) for some of the last numbers, at most 16, the
            largest last; empty if the member has to read the row from its beginning.
        prefix: the ids of the member's own tokens that it reads before the row; None for those that it reads before
            every text by default.
    """

    symbols: tuple[int, ...] = ()
    readings: tuple[tuple[int, Reading], ...] = ()
    prefix: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """The number of symbols so far."""
        return len(self.symbols)

    @property
    def fills_up(self) -> bool:
        """Whether the text's tokens exceed the member's context since the newest symbol, and did not before it."""
        return self.is_full and not any(one.full for _, one in self.readings[:-1])

    @property
    def is_full(self) -> bool:
        """Whether the text's tokens exceed the member's context."""
        return bool(self.readings) and self.newest.full

    @property
    def newest(self) -> Reading:
        """The member's state after the symbols that it has read; there is one if ``readings`` is not empty."""
        return self.readings[-1][1]

    @property
    def pending(self) -> tuple[int, ...]:
        """The symbols after those that the member has read."""
        return self.symbols[self.readings[-1][0] :] if self.readings else self.symbols

    def longer(self, symbols: Sequence[int]) -> ByteRow:
        """Return a copy with ``symbols`` added, which the member has not read."""
        return replace(self, symbols=(*self.symbols, *symbols))

    def read(self, count: int, reading: Reading) -> ByteRow:
        """Return a copy whose member has read ``count`` more symbols, and is in the state ``reading`` after them."""
        count += self.length - len(self.pending)
        return replace(self, readings=(*self.readings[1 - _KEPT :], (count, reading)))

    def shorter(self, by: int) -> ByteRow:
        """Return a copy without the last ``by`` symbols and the readings after them."""
        left = self.symbols[: len(self.symbols) - by]
        return replace(self, symbols=left, readings=tuple(one for one in self.readings if one[0] <= len(left)))


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
    reader: ByteMember,
    rows: Sequence[ByteRow],
    symbols: Sequence[Sequence[int]],
    new: int,
    wanted: Sequence[int],
    asked: Collection[int] | None = None,
) -> tuple[list[ByteRow], Float[Tensor, "B k 257"]]:
    """Have a member read the new symbols of rows: symbol by symbol, or at once if it has no reading of the row.

    Args:
        reader: the member.
        rows: the B rows before the new symbols, from :func:`fresh_rows` or an earlier call; they are not changed.
        symbols: each row's new symbols, 0 to 256. They fill the last of ``new`` columns, the columns before them being
            padding.
        new: the number of columns, at least that of any row's new symbols.
        wanted: the indices, from 0 to ``new`` - 1, of the k columns after whose symbols the next symbol's
            log-probabilities are wanted.
        asked: the numbers of the rows that are read; None for all. The other rows' new symbols are left pending, and
            are read at once when the row is asked for.

    Returns:
        (the rows with the new symbols; the log-probabilities in nats, (B, k, 257), fp64, uniform at padding, in rows
        that are not read and, in a row that is read at once for more than its last column, before its last end symbol).
    """
    out = torch.full((len(rows), len(wanted), SYMBOLS), -math.log(SYMBOLS), dtype=torch.float64)
    found = [row.longer(own) for row, own in zip(rows, symbols, strict=True)]
    reading = [k for k in range(len(rows)) if asked is None or k in asked]
    for k in reading:
        if not rows[k].readings:
            found[k] = _read_whole(reader, found[k], len(symbols[k]), new, wanted, out[k])
        elif rows[k].pending and symbols[k]:
            found[k] = _catch_up(reader, found[k], len(symbols[k]))
    for column in range(new):
        late = [k for k in reading if len(found[k].pending) >= new - column]
        if late:
            states = reader.advance([found[k].newest for k in late], [found[k].pending[0] for k in late])
            for k, state in zip(late, states, strict=True):
                found[k] = found[k].read(1, state)
        now = [k for k in reading if rows[k].readings and column >= new - len(symbols[k])] if column in wanted else []
        if now:
            out[now, list(wanted).index(column)] = reader.log_probs([found[k].newest for k in now])
    return found, out


def _catch_up(reader: ByteMember, row: ByteRow, new: int) -> ByteRow:
    """Read the symbols of a row that are late, and the first of its ``new`` symbols, at once."""
    late = row.pending[: len(row.pending) - new + 1]
    ended = row.newest.ended or END in late
    state = replace(row.newest, ended=True) if ended else reader.follow(row.newest, bytes(late))
    return row.read(len(late), state)


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
        return row.read(row.length, reading)
    reading, log_probs, _ = reader.score(text, row.prefix)
    for place, column in enumerate(wanted):
        # The last column, new - 1, is the last symbol, and the last row of the scores is the prediction after it.
        behind = new - 1 - column
        if behind < min(count, len(text) + 1):
            out[place] = torch.from_numpy(log_probs[len(text) - behind])
    return row.read(row.length, reading)
