"""Readers of tables, which are quick and exact: one that does all, and one for each trait that a reader may have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import torch

from softmeet.errors import InvalidInputError
from softmeet.readers.reader import Given, Read, Reader, Row, Traits
from softmeet.suspended import by_turns

LETTERS = "abcdefghijklmnopqrstuvwxyz ."
ROOM = 64


@dataclass(frozen=True)
class Letters:
    """Letters, of which the full stop ends a text."""

    size: int = len(LETTERS)
    ends: frozenset = frozenset({LETTERS.index(".")})
    spelling: None = None

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    def decode(self, symbols):
        return "".join(LETTERS[k] for k in symbols if k not in self.ends).encode()

    def count(self, symbols):
        return len(symbols)

    def may_follow(self, symbols):
        return None


@dataclass(eq=False)
class Text(Row):
    """A row that is all of its symbols."""

    symbols: tuple = ()
    closed: bool = False

    @property
    def length(self):
        return len(self.symbols)


class Table(Reader):
    """What follows depends on all letters before."""

    name, alphabet, limit, traits = "table", Letters(), ROOM, Traits(rounding="bitwise")

    def __init__(self, seed=0):
        v, generator = self.alphabet.size, torch.Generator().manual_seed(seed)
        self.table = torch.randn(97, v, generator=generator, dtype=torch.float64).log_softmax(-1)
        self.rows = []

    @property
    def bytes(self):
        return sum(8 * row.length for row in self.rows)

    def open(self, text=(), own=(), *, reuse=True):
        if self.traits.rows is not None and len(self.rows) >= self.traits.rows:
            raise InvalidInputError(f"expected at most {self.traits.rows} rows of {self.name}")
        self.rows.append(Text())
        return self.rows[-1]

    def close(self, row):
        self.rows.remove(row)

    def fork(self, row, count=1, length=None):
        forks = [replace(row, symbols=row.symbols[:length]) for _ in range(count)]
        self.rows += forks
        return forks

    def crop(self, row, length):
        row.symbols = row.symbols[:length]

    def follows(self, symbols):
        """Return what follows some symbols."""
        return self.table[reduce(lambda number, symbol: (31 * number + symbol + 1) % 97, symbols, 0)]

    def refused(self, row, symbols):
        """Return why some symbols cannot be read."""
        if any(not 0 <= k < self.alphabet.size for k in symbols) or row.length + len(symbols) > self.limit:
            return InvalidInputError(f"{self.name} knows {self.alphabet.size} letters, and {self.limit} of them a text")
        return None

    def checked(self, asked):
        """Refuse what is no call."""
        rows = [one.row for one in asked]
        if any(row not in self.rows for row in rows) or len(set(map(id, rows))) < len(rows):
            raise InvalidInputError(f"expected open rows of {self.name}, each once")

    def read(self, asked):
        self.checked(asked)
        errors = {k: error for k, one in enumerate(asked) if (error := self.refused(one.row, one.symbols))}
        found = []
        for k, one in enumerate(asked):
            if k not in errors:
                found += [self.follows([*one.row.symbols, *one.symbols[:place]]) for place in one.at]
        for k, one in enumerate(asked):
            if one.keep and k not in errors:
                one.row.symbols = (*one.row.symbols, *one.symbols)
        counts = [0 if k in errors else len(one.at) for k, one in enumerate(asked)]
        yield from ()
        return self.told(torch.stack(found) if found else torch.zeros(0, self.alphabet.size), counts, errors)

    def told(self, logits, counts, errors):
        """Make predictions of logits."""
        return Given(logits, counts, errors)


class Few(Table):
    """Knows five symbols of each prediction, as a server of top log-probabilities does."""

    name, traits = "few", Traits(rounding="bitwise", known=5)

    def told(self, logits, counts, errors):
        top, where = logits.topk(5, -1)
        known = torch.full_like(logits, -torch.inf).scatter(-1, where, top)
        return _Known(known, counts, errors, most=top[:, -1])


class _Known(Given):
    def log_probs(self, places=slice(None)):
        return self.logits(places)


class Late(Table):
    """Answers after a while, in which others may be read; ``said`` tells when it was asked and when it answered."""

    name = "late"

    def __init__(self, seed=0, said=None):
        super().__init__(seed)
        self.said = [] if said is None else said

    def read(self, asked):
        self.checked(asked)
        self.said.append(("asked", self))
        for _ in range(3):
            yield
        self.said.append(("answered", self))
        return (yield from super().read(asked))


class Joint(Reader):
    """Readers that know some symbols each, as one: it knows those that any of them knows, at each step others.

    A reader that does not know a symbol says how probable it may be at most, which is taken for what it says.
    """

    def __init__(self, readers):
        self.name, self.readers, self.alphabet, self.limit = readers[0].name, readers, readers[0].alphabet, ROOM
        self.traits = Traits(rounding="bitwise", known=sum(reader.traits.known for reader in readers))

    @property
    def bytes(self):
        return sum(reader.bytes for reader in self.readers)

    def _of(self, rows):
        found = Text()
        found.rows = rows
        return found

    def open(self, text=(), own=(), *, reuse=True):
        return self._of([reader.open(text, own, reuse=reuse) for reader in self.readers])

    def close(self, row):
        for reader, own in zip(self.readers, row.rows, strict=True):
            reader.close(own)

    def fork(self, row, count=1, length=None):
        pairs = zip(self.readers, row.rows, strict=True)
        forks = [self._of(rows) for rows in zip(*(one.fork(own, count, length) for one, own in pairs), strict=True)]
        for fork in forks:
            fork.symbols = row.symbols[:length]
        return forks

    def crop(self, row, length):
        for reader, own in zip(self.readers, row.rows, strict=True):
            reader.crop(own, length)
        row.symbols = row.symbols[:length]

    def read(self, asked):
        works = [
            reader.read([replace(one, row=one.row.rows[k]) for one in asked]) for k, reader in enumerate(self.readers)
        ]
        told = by_turns(works)
        yield
        for k, one in enumerate(asked):
            if one.keep and k not in told[0].errors:
                one.row.symbols = (*one.row.symbols, *one.symbols)
        own = torch.stack([one.log_probs() for one in told])
        least = torch.stack([one.bounds() for one in told])[..., None]
        known = ~own.isneginf().all(0)
        pooled = torch.where(own.isneginf(), least, own).mean(0)
        found = torch.where(known, pooled, -torch.inf)
        return _Known(found, told[0].counts, told[0].errors, most=least[..., 0].mean(0))


class Eight(Table):
    """Has room for eight rows."""

    name, traits = "eight", Traits(rounding="bitwise", rows=8)


class Coarse(Table):
    """Rounds by what else is read in a call, as quantised weights do."""

    name, traits = "coarse", Traits(rounding="coarse", bound=1e-3)

    def read(self, asked):
        found = yield from super().read(asked)
        noise = torch.randn(found.logits().shape, generator=torch.Generator().manual_seed(len(asked)))
        return Given((found.logits() + 0.01 * noise).log_softmax(-1), found.counts, found.errors)


class Onwards(Table):
    """Cannot take back what it has read, as a recurrent state cannot."""

    name, traits = "onwards", Traits(rounding="bitwise", can_crop=False)

    def crop(self, row, length):
        raise self.cannot("take back what it has read")

    def fork(self, row, count=1, length=None):
        if length not in (None, row.length):
            raise self.cannot("fork a row at less than its length")
        return super().fork(row, count)


class Stubborn(Table):
    """Neither forks nor crops, nor keeps anything for texts that begin alike, as a plain server does."""

    name, traits = "stubborn", Traits(rounding="bitwise", can_fork=False, can_crop=False)
    fork, crop = Reader.fork, Reader.crop


def joint():
    """Two readers of which each knows five symbols."""
    return Joint([Few(0), Few(1)])


TOYS = [Table, Few, Late, Eight, Coarse, Onwards, Stubborn, joint]


def read(row, symbols, at=None, keep=True):
    """What is to be read, with predictions behind the last symbol."""
    return Read(row, symbols, [len(symbols)] if at is None else at, keep)
