"""What every member of a byte ensemble has read of each row, behind the interface of a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import Cache

from softmeet.hf.cache import RowsLayer
from softmeet.members.byte_member import Reading

# Readings of each row that are kept, so that as many symbols can be taken back without reading anew.
_KEPT = 16


@dataclass(frozen=True)
class Row:
    """One row: its symbols, and the readings after the last few of them, the newest last; none if it has to be read.

    ``prefix`` are the member's tokens before it; None for those before every text.
    """

    symbols: tuple[int, ...] = ()
    readings: tuple[Reading, ...] = ()
    prefix: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """How many symbols there are."""
        return len(self.symbols)

    @property
    def fills_up(self) -> bool:
        """Whether the last symbol is the first that the member had no room for."""
        return bool(self.readings) and self.readings[-1].full and not any(one.full for one in self.readings[:-1])

    def longer(self, symbol: int, reading: Reading) -> Row:
        """Add a symbol, and what was read with it."""
        return replace(self, symbols=(*self.symbols, symbol), readings=(*self.readings[1 - _KEPT :], reading))

    def shorter(self, by: int) -> Row:
        """Take the last symbols away; without a reading that is left, the row is read anew."""
        left = self.readings[: max(0, len(self.readings) - by)]
        return replace(self, symbols=self.symbols[: len(self.symbols) - by], readings=left)


class ByteCache(Cache):
    """One layer for each member, so that reordering, cropping and resetting reach them all."""

    lagging = False

    def __init__(self, n: int) -> None:
        self.members = [RowsLayer[Row]() for _ in range(n)]
        super().__init__(layers=list(self.members))
