"""A member over bytes as a reader: its symbols are bytes, and 256, the end of a text."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from softmeet.errors import SoftmeetError
from softmeet.readers.byte_alphabet import ByteAlphabet, shown_byte
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.next_tokens import END
from softmeet.readers.bytes.reading import Reading
from softmeet.readers.open_rows import ReaderOfRows
from softmeet.readers.reader import Explanation, Given, Predictions, Read, Row, Traits, Work
from softmeet.suspended import Done

# The readings kept of each row; fewer symbols than that can be taken back without reading the row anew.
_KEPT = 16
# What reads texts, and returns for each the states after so many of its bytes.
_Readings = Generator[Done, None, list[dict[int, Reading]]]


@dataclass(eq=False)
class ByteText(Row):
    """A row: the symbols that were read, and the member's states after some of the last.

    Attributes:
        own: the member's own tokens before the text.
        symbols: those that were read.
        readings: the state after so many symbols, for some of the last numbers, at most 16, ascending.
    """

    own: tuple[int, ...] = ()
    symbols: list[int] = field(default_factory=list)
    readings: dict[int, Reading] = field(default_factory=dict)

    @property
    def length(self) -> int:  # type: ignore[override]
        """The number of symbols that were read."""
        return len(self.symbols)

    @property
    def full(self) -> bool:  # type: ignore[override]
        """Whether the text's tokens exceed the member's context."""
        return bool(self.readings) and self.readings[self.known_to].full

    @property
    def known_to(self) -> int:
        """The largest number of symbols after which there is a state; 0 if there is none."""
        return next(reversed(self.readings), 0)


class ByteReader(ReaderOfRows[ByteText]):
    """A causal language model over tokens, read byte by byte.

    A symbol 256 at the beginning of a row, or anywhere in what is read first, begins a text anew; after any other
    symbols it ends the text, after which the end is all that is predicted.

    Args:
        member: the member.
        name: its name in messages.
    """

    def __init__(self, member: ByteMember, name: str) -> None:
        super().__init__(ByteText)
        self.member, self.name, self.limit = member, name, sys.maxsize
        self.alphabet, below = ByteAlphabet(member.spelling), member.reader.traits
        self.traits = Traits(rounding=below.rounding, places=below.places, cost=below.cost)

    @property
    def bytes(self) -> int:
        """The bytes of the keys and values of all open rows, and of the tokens before them that are kept."""
        return self.member.reader.bytes

    def to_itself(self) -> AbstractContextManager[Any]:
        """Return a context in which no other thread has the reader of the member's tokens."""
        return self.member.reader.to_itself()

    def abort(self) -> None:
        """End what waits for an answer from elsewhere."""
        self.member.reader.abort()

    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row, as of :meth:`Reader.open`; nothing is known of earlier texts."""
        row = ByteText(own=tuple(own) or tuple(self.member.prefix))
        self.member.require_prefix(row.own)
        return self._opened(row)

    def _copied(self, row: ByteText) -> ByteText:
        """Return a row that shares what was read."""
        return replace(row, symbols=list(row.symbols), readings=dict(row.readings))

    def crop(self, row: Row, length: int) -> None:
        """Take back the symbols behind the first ``length``."""
        one = self._mine(row)
        self._require_length(one, length)
        del one.symbols[length:]
        one.readings = {count: reading for count, reading in one.readings.items() if count <= length}

    def close(self, row: Row) -> None:
        """Give a row up, with all that was read in it."""
        one = self._mine(row)
        self._rows.pop(one)
        one.readings = {}

    def explain(self, row: Row, top: int = 10, at: int | None = None) -> Explanation:
        """Return the member's own tokens that may come next, over all tokenizations that it follows of the text."""
        one, spelling = self._mine(row), self.member.spelling
        reading = one.readings.get(one.length if at is None else at)
        if reading is None:
            return Explanation()
        found = defaultdict[str, float](float)
        for cover in reading.covers.closed:
            share, probs = cover.weight / reading.covers.total, cover.probs.tokens[cover.longer : cover.end]
            for k in np.argsort(-probs)[:top].tolist():
                word = spelling.words[cover.longer + k]
                found[word.decode(errors="backslashreplace")] += share * float(probs[k])
            if not cover.rest:
                found[shown_byte(END)] += share * float(cover.probs.root[END])
        best = sorted(found.items(), key=lambda one: -one[1])[:top]
        return Explanation(tuple((text, math.log(share)) for text, share in best if share))

    def read(self, asked: Sequence[Read]) -> Generator[Done, None, Predictions]:
        """Read on in some rows, as of :meth:`Reader.read`; each call of the model serves all that it can."""
        rows = self._each_once(asked)
        errors, parts = dict[int, SoftmeetError](), list[_Part]()
        for k, (row, one) in enumerate(zip(rows, asked, strict=True)):
            if error := self._unknown(one.symbols):
                errors[k] = error
            else:
                parts.append(_Part.of(k, row, one))
        for run, some in (
            (self._begin, [part for part in parts if part.reading is None]),
            (self._advance, [part for part in parts if part.reading is not None and len(part.text) == 1]),
            (self._follow, [part for part in parts if part.reading is not None and len(part.text) > 1]),
        ):
            if some:
                errors |= yield from _by_all_or_each(run, some)
        well = [part for part in parts if part.k not in errors]
        work = Work(*map(sum, zip(*(part.spent for part in well), strict=True)))
        for part in well:
            if asked[part.k].keep:
                part.keep(rows[part.k], asked[part.k].symbols)
        states = [state for part in well for state in part.told()]
        counts = [0 if k in errors else len(one.at) for k, one in enumerate(asked)]
        found = Given(self.member.log_probs(states), counts, errors, work)
        shares = [0.0 if state is None or state.ended else state.covers.unasked for state in states]
        found.dropped = torch.tensor(shares, dtype=torch.float64)
        return found

    def _begin(self, parts: Sequence[_Part]) -> _Readings:
        """Read texts from their beginnings."""
        texts, own = [part.text for part in parts], [part.own for part in parts]
        return self.member.beginning(texts, own, [part.wanted for part in parts])

    def _advance(self, parts: Sequence[_Part]) -> _Readings:
        """Read one byte of each of some texts."""
        yield from ()
        before = [part.reading for part in parts if part.reading is not None]
        return [{1: reading} for reading in self.member.advance(before, [part.text[0] for part in parts])]

    def _follow(self, parts: Sequence[_Part]) -> _Readings:
        """Read several bytes of each of some texts."""
        before = [part.reading for part in parts if part.reading is not None]
        return self.member.following(before, [part.text for part in parts], [part.wanted for part in parts])


@dataclass(eq=False)
class _Part:
    """What is read of one row in a call.

    Attributes:
        k: the number of the read.
        own: the member's own tokens before the text.
        base: the number of symbols before the bytes that are read now.
        reading: the state after these; None if the text is read from its beginning.
        text: the bytes.
        end: the number of symbols after which the text has ended; more than there are if it has not.
        places: after how many symbols predictions are wanted.
        readings: the states after so many of the bytes.
    """

    k: int
    own: tuple[int, ...]
    base: int
    reading: Reading | None
    text: bytes
    end: int
    places: list[int]
    readings: dict[int, Reading]

    @classmethod
    def of(cls, k: int, row: ByteText, one: Read) -> _Part:
        """Say what has to be read of a row."""
        base = row.known_to
        reading, symbols, end = row.readings.get(base), [*row.symbols[base:], *one.symbols], sys.maxsize
        if reading is None and END in symbols:
            # A text is read from behind the last symbol that ends one.
            base = len(symbols) - symbols[::-1].index(END)
            symbols = symbols[base:]
        elif reading is not None and (reading.ended or END in symbols):
            end = base + (0 if reading.ended else symbols.index(END))
        text = bytes(symbols[: end - base])
        readings = {} if reading is None else {0: reading}
        return cls(k, row.own, base, reading, text, end, [row.length + place for place in one.at], readings)

    @property
    def wanted(self) -> list[int]:
        """After how many of the bytes states are wanted: where predictions are, and of more of a text the last few."""
        length = len(self.text)
        asked = {place - self.base for place in self.places if 0 <= place - self.base <= length}
        if self.reading is None:
            return sorted(asked | {length})
        return sorted((asked - {0}) | {*range(max(1, length + 1 - _KEPT), length + 1)})

    @property
    def spent(self) -> tuple[int, int, float]:
        """The calls, the tokens and the dropped shares of mass that reading the bytes has cost."""
        now, before = self.readings[len(self.text)].work, Work() if self.reading is None else self.reading.work
        return now.calls - before.calls, now.tokens - before.tokens, now.dropped - before.dropped

    def keep(self, row: ByteText, symbols: Sequence[int]) -> None:
        """Note in a row that its symbols were read, with the last states that can be lengthened."""
        row.symbols += symbols
        known = {self.base + count: one for count, one in self.readings.items() if count or self.reading is None}
        if row.length > self.end:
            known[row.length] = self._ended()
        if len(known) > 1:
            known = {count: one for count, one in sorted(known.items()) if one.goes_on}
        row.readings |= known
        while len(row.readings) > _KEPT:
            del row.readings[next(iter(row.readings))]

    def _ended(self) -> Reading:
        """Return the state after the end of the text."""
        return replace(self.readings[len(self.text)], ended=True)

    def told(self) -> list[Reading | None]:
        """Return the state at each place; None before the text begins."""
        return [self._ended() if place > self.end else self.readings.get(place - self.base) for place in self.places]


def _by_all_or_each(
    run: Callable[[Sequence[_Part]], _Readings], parts: Sequence[_Part]
) -> Generator[Done, None, dict[int, SoftmeetError]]:
    """Run texts together or, if that fails, each by itself; returns by number why some could not be read."""
    errors = dict[int, SoftmeetError]()
    try:
        found = yield from run(parts)
    except SoftmeetError as error:
        if len(parts) == 1:
            return {parts[0].k: error}
        for part in parts:
            errors |= yield from _by_all_or_each(run, [part])
        return errors
    for part, readings in zip(parts, found, strict=True):
        part.readings |= readings
    return errors
