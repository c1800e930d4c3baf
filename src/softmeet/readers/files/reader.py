"""``FilesReader``: what followed the end of a text in the user's own files, and how much of the mass they claim."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.errors import SoftmeetError
from softmeet.members.files import spelled
from softmeet.readers.files.claim import BYTES, TOKENS, Relevance, claim
from softmeet.readers.files.index import Index
from softmeet.readers.files.matches import Match, intervals, match
from softmeet.readers.open_rows import ReaderOfRows
from softmeet.readers.reader import Alphabet, Given, Predictions, Read, Row, Traits, Work
from softmeet.readers.source import Source
from softmeet.suspended import Done

# Symbols of a text further apart are not matched in one.
_LONGEST = 2048
# The fewest tokens of a stretch of a text whose place in the files is told.
_STRETCH = 6
# Of what stands around it, so many lines are told before and after its own, and no more than so many symbols.
_LINES, _AROUND = 2, 300


@dataclass(eq=False)
class FilesRow(Row):
    """A text.

    Attributes:
        text: its symbols, those before it included.
        before: how many of them stand before it.
        given: how many of them were given, by which the files' relevance is judged; None before the first reading.
        relevance: what they have proved.
    """

    text: list[int] = field(default_factory=list)
    before: int = 0
    given: int | None = None
    relevance: Relevance = field(default_factory=lambda: Relevance(TOKENS))

    @property
    def length(self) -> int:  # type: ignore[override]
        """The number of symbols that were read."""
        return len(self.text) - self.before


class _Distributions(Given):
    """Predictions whose logits are log-probabilities."""

    def log_probs(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k v"]:
        """Return log-probabilities at some places."""
        return self.logits(places)


class FilesReader(ReaderOfRows[FilesRow]):
    """The user's own files as a reader that claims a part of what a rule has answered.

    A text's symbols are given that it is opened with or, if it is opened with none, that are read first; what follows
    was drawn.

    Args:
        name: its name in messages.
        alphabet: the symbols, which are those of the ensemble.
        index: the files' symbols.
        allowed: which symbols can have a probability above 0, (v,) bool; None for all.
        weight: in place of the weight that goes by matches; None for that.
        relevance: in place of the relevance that goes by what was given; None for that.
        folders: those that were named, below which sources tell paths.
    """

    def __init__(
        self,
        name: str,
        alphabet: Alphabet,
        index: Index,
        allowed: Bool[np.ndarray, " v"] | None = None,
        weight: float | None = None,
        relevance: float | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        super().__init__(FilesRow)
        self.name, self.alphabet, self.limit, self.index = name, alphabet, 1 << 30, index
        self._allowed, self._weight, self._relevance, self._folders = allowed, weight, relevance, folders
        self._scheme = TOKENS if alphabet.spelling is None else BYTES
        self.traits = Traits(rounding="bitwise", claims=True)

    @property
    def bytes(self) -> int:
        """The bytes of all open rows: 8 for each symbol, and what is kept of those that were given."""
        return sum(8 * len(row.text) + 200 * len(row.relevance.seen) for row in self._rows)

    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row, in which ``own`` and ``text``, which is yet to be read, are given; or what is read first."""
        if error := self._unknown([*own, *text]):
            raise error
        given = len(own) + len(text) if text else None
        return self._opened(FilesRow(list(own), len(own), given, Relevance(self._scheme)))

    def _copied(self, row: FilesRow) -> FilesRow:
        return replace(row, text=list(row.text), relevance=row.relevance.forked())

    def crop(self, row: Row, length: int) -> None:
        """Take back the symbols behind the first ``length``."""
        one = self._mine(row)
        del one.text[one.before + length :]
        if one.given is not None:
            one.given = min(one.given, len(one.text))

    def read(self, asked: Sequence[Read]) -> Generator[Done, None, Predictions]:
        """Read on in some rows, as of :meth:`Reader.read`."""
        yield from ()
        pairs = list(zip(self._each_once(asked), asked, strict=True))
        errors: dict[int, SoftmeetError] = {
            k: error for k, (_, one) in enumerate(pairs) if (error := self._unknown(one.symbols))
        }
        found, claims = list[np.ndarray](), list[float]()
        for k, (row, one) in enumerate(pairs):
            if k in errors:
                continue
            text, read = [*row.text, *one.symbols], len(row.text)
            given = len(text) if row.given is None else row.given
            relevance = row.relevance if one.keep else row.relevance.forked()
            for place in one.at:
                told, share = self._behind(text, read + place, given, relevance)
                found.append(told)
                claims.append(share)
            if one.keep:
                row.text, row.given = text, given
        counts = [0 if k in errors else len(one.at) for k, one in enumerate(asked)]
        probs = torch.from_numpy(np.stack(found)) if found else torch.zeros(0, self.alphabet.size, dtype=torch.float64)
        work = Work(0, sum(len(one.symbols) for _, one in pairs))
        return _Distributions(probs.log(), counts, errors, work, claims=torch.tensor(claims, dtype=torch.float64))

    def sources(self, text: str, least: int | None = None) -> list[Source]:
        """Return where stretches of a text stand in the files, in order.

        Args:
            text: the text.
            least: the fewest symbols of a stretch; None for 6 tokens, or 24 bytes.
        """
        symbols = self.alphabet.encode(text)
        fewest = least or (_STRETCH if self.alphabet.spelling is None else 4 * _STRETCH)
        end, found = len(symbols), list[Source]()
        # Each is the longest that ends where it does, and the last ones are taken first.
        while end >= fewest:
            length = len(intervals(self.index, symbols[max(0, end - _LONGEST) : end]))
            if length < fewest:
                end -= 1
            elif (one := self._source(symbols[:end], lines=_LINES)) is not None:
                found.append(one)
                end -= length
        return found[::-1]

    def source(self, symbols: Sequence[int]) -> Source | None:
        """Return where the most of the last symbols of a text stand in the files; None if the last one does nowhere."""
        return self._source(symbols)

    def _source(self, symbols: Sequence[int], lines: int | None = None) -> Source | None:
        """Return where the most of the last symbols stand, with so many lines around; None for none of them."""
        found = intervals(self.index, symbols[-_LONGEST:])
        if not found:
            return None
        last, start = int(self.index.order[found[-1][0]]), len(symbols) - len(found)
        path, own = self.index.place(last)
        first = last - len(found) + 1
        line = self.index.line(first, self.alphabet.decode)
        told, below = spelled(str(path)), spelled(self._below(path))
        source = Source(start, len(symbols), told, below, line, self.index.is_stale(path))
        if lines is None:
            return source
        before = self._lines(range(max(own.start, first - _AROUND), first))[-lines - 1 :]
        after = self._lines(range(last + 1, min(own.stop, last + 1 + _AROUND)))[: lines + 1]
        return replace(source, before="\n".join(before), after="\n".join(after))

    def _lines(self, places: range) -> list[str]:
        """Return the lines of some of the index's symbols, without the parts of characters at its ends."""
        symbols = self.index.symbols[places.start : places.stop].tolist()
        return self.alphabet.decode(symbols).decode(errors="ignore").split("\n")

    def _below(self, path: Path) -> str:
        """Return a path below the innermost of the folders; of several, behind that one's name."""
        around = max(
            (one for one in self._folders if path.is_relative_to(one)), key=lambda one: len(one.parts),
            default=path.parent,
        )  # fmt: skip
        return path.relative_to(around.parent if len(self._folders) > 1 else around).as_posix()

    def _behind(self, text: Sequence[int], place: int, given: int, relevance: Relevance) -> tuple[np.ndarray, float]:
        """Return what follows the first ``place`` symbols of a text, (v,), and the share that is claimed there."""
        seen = min(place, given)
        for number in relevance.unseen(seen) if self._relevance is None else ():
            told, own = self._told(text, number)
            relevance.see(number, float(told[text[number]]), own)
        told, own = self._told(text, place)
        return told, claim(own, relevance.behind(seen) if self._relevance is None else self._relevance)

    def _told(self, text: Sequence[int], place: int) -> tuple[np.ndarray, float]:
        """Return what follows the first ``place`` symbols of a text, (v,), and the files' weight there."""
        before = text[max(0, place - self._scheme.orders[-1]) : place]
        found = match(self.index, before, self._scheme.orders, self.alphabet.size)
        told = found.probs(self._may_follow(before))
        return told, self._weight_of(found, told)

    def _weight_of(self, found: Match, told: np.ndarray) -> float:
        if not found.order:
            return 0.0
        return self._scheme.weight(found, float(told.max())) if self._weight is None else self._weight

    def _may_follow(self, before: Sequence[int]) -> Any:
        mask = self.alphabet.may_follow(before)
        return self._allowed if mask is None else mask.numpy()
