"""A member over bytes as a reader: its symbols are bytes, and 256, the end of a text."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.errors import InvalidInputError, SoftmeetError
from softmeet.readers.byte_alphabet import ByteAlphabet, shown_byte
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import END, SYMBOLS
from softmeet.readers.bytes.reading import Reading
from softmeet.readers.reader import Explanation, Given, Predictions, Read, ReaderOfRows, Row, Traits, Work

# What is known at a place.
_Told = Reading | Float[Tensor, " v"] | None
# The readings kept of each row; fewer symbols than that can be taken back without reading the row anew.
_KEPT = 16


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
        return bool(self.readings) and self.readings[max(self.readings)].full


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

    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row, as of :meth:`Reader.open`; nothing is known of earlier texts."""
        row = ByteText(own=tuple(own) or tuple(self.member.prefix))
        self.member.behind(row.own)
        return self._opened(row)

    def fork(self, row: Row, count: int = 1, length: int | None = None) -> list[Row]:
        """Open rows that begin with a row's symbols; what was read is shared."""
        one = self._mine(row)
        length = one.length if length is None else length
        forks = [replace(one, symbols=list(one.symbols), readings=dict(one.readings)) for _ in range(count)]
        self._rows |= dict.fromkeys(forks)
        for fork in forks:
            self.crop(fork, length)
        return list(forks)

    def crop(self, row: Row, length: int) -> None:
        """Take back the symbols behind the first ``length``."""
        one = self._mine(row)
        if not 0 <= length <= one.length:
            raise InvalidInputError(f"expected a length from 0 to {one.length}, the row's, got {length}")
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

    def read(self, asked: Sequence[Read]) -> Generator[None, None, Predictions]:
        """Read on in some rows, as of :meth:`Reader.read`; each call of the model serves all that it can."""
        rows = self._each_once(asked)
        spent, errors, parts = self.member.spent, dict[int, SoftmeetError](), list[_Part]()
        for k, (row, one) in enumerate(zip(rows, asked, strict=True)):
            if wrong := [symbol for symbol in one.symbols if not 0 <= symbol <= END]:
                errors[k] = InvalidInputError(f"expected symbols of {self.name} below {SYMBOLS}, got {wrong[0]}")
            else:
                parts.append(_Part.of(k, row, one))
        for run, some in (
            (self._begin, [part for part in parts if part.reading is None and not part.before]),
            (self._score, [part for part in parts if part.reading is None and part.before]),
            (self._advance, [part for part in parts if part.reading is not None and len(part.text) == 1]),
            (self._follow, [part for part in parts if part.reading is not None and len(part.text) > 1]),
        ):
            errors |= yield from _by_all_or_each(run, some)
        well = [part for part in parts if part.k not in errors]
        for part in well:
            if asked[part.k].keep:
                part.keep(rows[part.k], asked[part.k].symbols)
        told = self._told([state for part in well for state in part.told()])
        counts = [0 if k in errors else len(one.at) for k, one in enumerate(asked)]
        now = self.member.spent
        work = Work(now.calls - spent.calls, now.tokens - spent.tokens, now.dropped - spent.dropped)
        return Given(told, counts, errors, work)

    def _told(self, states: Sequence[_Told]) -> Float[Tensor, "k 257"]:
        """Return the log-probabilities, in nats, of the states at all places."""
        known = [state for state in states if isinstance(state, Reading)]
        if known and len(known) == len(states):
            return self.member.log_probs(known)
        found = torch.full((len(states), SYMBOLS), -math.log(SYMBOLS), dtype=torch.float64)
        if known:
            found[[isinstance(state, Reading) for state in states]] = self.member.log_probs(known)
        for row, state in zip(found, states, strict=True):
            if isinstance(state, Tensor):
                row.copy_(state)
        return found

    def _begin(self, parts: Sequence[_Part]) -> Generator[None, None, None]:
        """Read texts from their beginnings, of which the prediction at the end alone is wanted."""
        found = yield from self.member.beginning([part.text for part in parts], [part.own for part in parts])
        for part, reading in zip(parts, found, strict=True):
            part.readings = {len(part.text): reading}

    def _score(self, parts: Sequence[_Part]) -> Generator[None, None, None]:
        """Read texts from their beginnings, of which predictions at any places are wanted."""
        for part in parts:
            reading, log_probs, _ = yield from self.member.scoring(part.text, part.own)
            part.readings, part.scores = {len(part.text): reading}, torch.from_numpy(log_probs)

    def _advance(self, parts: Sequence[_Part]) -> Generator[None, None, None]:
        """Read one byte of each of some texts."""
        yield from ()
        before = [part.reading for part in parts if part.reading is not None]
        for part, reading in zip(parts, self.member.advance(before, [part.text[0] for part in parts]), strict=True):
            part.readings = {1: reading}

    def _follow(self, parts: Sequence[_Part]) -> Generator[None, None, None]:
        """Read several bytes of each of some texts."""
        before = [part.reading for part in parts if part.reading is not None]
        found = yield from self.member.following(before, [part.text for part in parts], [part.wanted for part in parts])
        for part, readings in zip(parts, found, strict=True):
            part.readings = readings


@dataclass(eq=False)
class _Part:
    """What is read of one row in a call.

    Attributes:
        k: the number of the read.
        own: the member's own tokens before the text.
        base: the number of symbols before the bytes that are read now.
        reading: the state after these; None if the text is read from its beginning.
        text: the bytes.
        end: the number of symbols after which the text has ended; None if it has not.
        places: after how many symbols predictions are wanted.
        readings: the states after so many of the bytes.
        scores: (bytes + 1, 257), what follows each number of the bytes, if they were scored.
    """

    k: int
    own: tuple[int, ...]
    base: int
    reading: Reading | None
    text: bytes
    end: int | None
    places: list[int]
    readings: dict[int, Reading] = field(default_factory=dict)
    scores: Float[Tensor, "t 257"] | None = None

    @classmethod
    def of(cls, k: int, row: ByteText, one: Read) -> _Part:
        """Say what has to be read of a row."""
        base = max(row.readings, default=0)
        reading, symbols, end = row.readings.get(base), [*row.symbols[base:], *one.symbols], None
        if reading is None and END in symbols:
            # A text is read from behind the last symbol that ends one.
            base = len(symbols) - symbols[::-1].index(END)
            symbols = symbols[base:]
        elif reading is not None and (reading.ended or END in symbols):
            end = base + (0 if reading.ended else symbols.index(END))
        text = bytes(symbols if end is None else symbols[: end - base])
        return cls(k, row.own, base, reading, text, end, [row.length + place for place in one.at])

    @property
    def before(self) -> bool:
        """Whether predictions are wanted before the last byte."""
        return any(place < self.base + len(self.text) for place in self.places)

    @property
    def wanted(self) -> list[int]:
        """After how many of the bytes states are wanted: where predictions are, and after the last few."""
        length = len(self.text)
        asked = {place - self.base for place in self.places if self.base < place <= self.base + length}
        return sorted(asked | {*range(max(1, length + 1 - _KEPT), length + 1)})

    def keep(self, row: ByteText, symbols: Sequence[int]) -> None:
        """Note in a row that its symbols were read, with the last states that can be lengthened."""
        row.symbols += symbols
        known = {self.base + count: one for count, one in self.readings.items()}
        if self.end is not None:
            known[row.length] = self._ended()
        row.readings |= {count: one for count, one in sorted(known.items()) if len(known) == 1 or one.goes_on}
        while len(row.readings) > _KEPT:
            del row.readings[next(iter(row.readings))]

    def _ended(self) -> Reading:
        """Return the state after the end of the text."""
        newest = self.readings.get(len(self.text), self.reading)
        assert newest is not None
        return replace(newest, ended=True)

    def told(self) -> list[_Told]:
        """Return what is known at each place: the state there, or what follows; None before the text begins."""
        found = list[_Told]()
        for place in self.places:
            count = place - self.base
            if self.end is not None and place > self.end:
                found.append(self._ended())
            elif count == 0 and self.reading is not None:
                found.append(self.reading)
            elif self.scores is not None and count >= 0:
                found.append(self.scores[count])
            else:
                found.append(self.readings.get(count))
        return found


def _by_all_or_each(
    run: Callable[[Sequence[_Part]], Generator[None, None, None]], parts: Sequence[_Part]
) -> Generator[None, None, dict[int, SoftmeetError]]:
    """Run texts together or, if that fails, each by itself; returns by number why some could not be read."""
    if not parts:
        return {}
    try:
        yield from run(parts)
    except SoftmeetError as error:
        if len(parts) == 1:
            return {parts[0].k: error}
        found = dict[int, SoftmeetError]()
        for part in parts:
            found |= yield from _by_all_or_each(run, [part])
        return found
    return {}
