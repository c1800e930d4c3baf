"""Readers that know which of their rows are open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from softmeet.errors import InvalidInputError
from softmeet.readers.reader import Read, Reader, Row

R = TypeVar("R", bound=Row)


class ReaderOfRows(Reader, Generic[R]):
    """A reader that knows its open rows, all of one class.

    Args:
        kind: the class.
    """

    def __init__(self, kind: type[R]) -> None:
        self._kind, self._rows = kind, dict[R, None]()

    def _opened(self, row: R) -> R:
        most = self.traits.rows
        if most is not None and len(self._rows) >= most:
            raise InvalidInputError(f"expected at most {most} open rows of {self.name}: close one first")
        self._rows[row] = None
        return row

    def _mine(self, row: Row) -> R:
        """Return a row, or raise InvalidInputError if it is closed or another reader's."""
        if not (isinstance(row, self._kind) and row in self._rows):
            raise InvalidInputError(f"expected an open row of {self.name}: open() gives one, and close() ends it")
        return row

    def _copied(self, row: R) -> R:
        """Return a row like another one, which goes on by itself; a reader that can fork defines it."""
        raise self.cannot("fork rows")

    def fork(self, row: Row, count: int = 1, length: int | None = None) -> list[Row]:
        """Open rows that begin with a row's symbols."""
        one = self._mine(row)
        length = one.length if length is None else length
        if length != one.length and not self.traits.can_crop:
            raise self.cannot("fork a row at less than its length")
        forks: list[Row] = [self._opened(self._copied(one)) for _ in range(count)]
        if length != one.length:
            for fork in forks:
                self.crop(fork, length)
        return forks

    def _each_once(self, asked: Sequence[Read]) -> list[R]:
        """Return the rows of a call, or raise InvalidInputError if one is not this reader's, or is there twice."""
        rows = [self._mine(one.row) for one in asked]
        if len(set(map(id, rows))) < len(rows):
            raise InvalidInputError(f"expected each row of {self.name} once in a call of read")
        return rows
