"""Readers that know which of their rows are open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from softmeet.errors import InvalidInputError, SoftmeetError
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

    def _require_length(self, row: R, length: int) -> None:
        if not 0 <= length <= row.length:
            raise InvalidInputError(f"expected a length of {self.name} from 0 to {row.length}, the row's, got {length}")

    def _unknown(self, symbols: Sequence[int]) -> SoftmeetError | None:
        """Return the error that some symbols are none of this reader's; None if all are."""
        if wrong := self._foreign(symbols):
            return InvalidInputError(f"expected symbols of {self.name} below {self.alphabet.size:,}, got {wrong[0]}")
        return None

    def _foreign(self, symbols: Sequence[int]) -> list[int]:
        return [symbol for symbol in symbols if not 0 <= symbol < self.alphabet.size]

    def close(self, row: Row) -> None:
        """Give a row up; nothing more can be read in it."""
        self._rows.pop(self._mine(row))

    def _copied(self, row: R) -> R:
        """Return a row like another one, which goes on by itself; a reader that can fork defines it."""
        raise self.cannot("fork rows")

    def fork(self, row: Row, count: int = 1, length: int | None = None) -> list[Row]:
        """Open rows that begin with a row's symbols."""
        one, forks = self._mine(row), list[Row]()
        length = one.length if length is None else length
        if length != one.length and not self.traits.can_crop:
            raise self.cannot("fork a row at less than its length")
        self._require_length(one, length)
        try:
            for _ in range(count):
                forks.append(self._opened(self._copied(one)))
                if length != one.length:
                    self.crop(forks[-1], length)
        except BaseException:
            for fork in forks:
                self.close(fork)
            raise
        return forks

    def _each_once(self, asked: Sequence[Read]) -> list[R]:
        """Return the rows of a call, or raise InvalidInputError if one is not this reader's, or is there twice."""
        rows = [self._mine(one.row) for one in asked]
        if len(set(map(id, rows))) < len(rows):
            raise InvalidInputError(f"expected each row of {self.name} once in a call of read")
        return rows


class ReaderOfTokens(ReaderOfRows[R]):
    """A reader whose symbols are a model's own tokens, of which its context holds a number."""

    _context: int

    def _require_own(self, own: Sequence[int]) -> None:
        """Check the member's own tokens before a text."""
        if (wrong := self._foreign(own)) or len(own) >= self._context:
            said = f"the id {wrong[0]}" if wrong else f"{len(own):,} tokens"
            raise InvalidInputError(
                f"expected at most {self._context - 1:,} tokens of {self.name} before a text, of ids below "
                f"{self.alphabet.size:,}, got {said}"
            )

    def _refused(self, one: Read, before: int, tokens: Sequence[int]) -> SoftmeetError | None:
        """Return why some tokens cannot be read behind ``before`` others of a row; None if they can."""
        if error := self._unknown(tokens):
            return error
        if (count := before + len(tokens)) > self._context:
            return InvalidInputError(
                f"expected a text of at most {self._context:,} tokens, the context of {self.name}, got {count:,}"
            )
        if one.at and not one.at[0] and count == len(one.symbols):
            return InvalidInputError(
                f"expected a token to predict from, but {self.name} puts none before a text: read a symbol first"
            )
        return None
