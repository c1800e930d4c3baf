"""Readers that keep nothing of a text but its symbols, such as tables of counts and services that are asked anew."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.errors import InvalidInputError, SoftmeetError
from softmeet.readers.open_rows import ReaderOfRows
from softmeet.readers.reader import Given, Predictions, Read, Row, Traits, Work
from softmeet.readers.token_alphabet import TokenAlphabet
from softmeet.suspended import Done

_PLAIN = Traits()


@dataclass(eq=False)
class Symbols(Row):
    """A row: the member's own tokens before a text, the symbols that were read, and how many of both were given."""

    own: tuple[int, ...] = ()
    text: tuple[int, ...] = ()
    given: int | None = None

    @property
    def length(self) -> int:  # type: ignore[override]
        """The number of symbols that were read."""
        return len(self.text)


class StatelessReader(ReaderOfRows[Symbols]):
    """A reader whose predictions are computed of whole texts: a subclass defines :meth:`next_logits` alone.

    Args:
        name: the member's name in messages.
        alphabet: its symbols, the tokens of a tokenizer.
        limit: the most symbols of a text, the member's own tokens before it included; None for any number.
        traits: what it can do; by default as much as any reader, up to rounding.

    Example:
        >>> from softmeet.readers.byte_tokenizer import byte_tokenizer
        >>> from softmeet.readers.reader import finished
        >>> class Uniform(StatelessReader):
        ...     def next_logits(self, texts):
        ...         return torch.zeros(len(texts), self.alphabet.size)
        >>> reader = Uniform("uniform", TokenAlphabet.of(byte_tokenizer()))
        >>> found = finished(reader.read([Read(reader.open(), [104, 105], at=[2])]))
        >>> found.log_probs().shape, round(found.log_probs().exp()[0, 0].item() * 257, 6)
        (torch.Size([1, 257]), 1.0)
    """

    def __init__(self, name: str, alphabet: TokenAlphabet, limit: int | None = None, traits: Traits = _PLAIN) -> None:
        super().__init__(Symbols)
        self.name, self.alphabet, self.limit = name, alphabet, limit or 1 << 30
        self.traits = traits

    @abstractmethod
    def next_logits(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "k v"]:
        """Return what follows each of k texts: logits in nats, fp32 or fp64, log-probabilities up to a constant.

        Args:
            texts: the symbols of each, behind the member's own tokens before it; some may be empty.
        """

    def next_claims(self, texts: Sequence[Sequence[int]], given: Sequence[int]) -> Float[Tensor, " k"]:
        """Return the share of the mass that is claimed behind each of k texts, in [0, 1), if the traits say ``claims``.

        Args:
            texts: as of :meth:`next_logits`.
            given: how many of each one's first symbols were given; the others were drawn, and should prove nothing.
        """
        raise self.cannot("say how much it claims: define next_claims")

    @property
    def bytes(self) -> int:
        """The bytes of the symbols of all open rows, 8 each."""
        return sum(8 * (len(row.own) + len(row.text)) for row in self._rows)

    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row, as of :meth:`Reader.open`; nothing is known of earlier texts."""
        row = Symbols(own=tuple(own), given=len(own) + len(text) if text else None)
        if error := self._refused(row, own):
            raise error
        return self._opened(row)

    def _copied(self, row: Symbols) -> Symbols:
        return replace(row)

    def crop(self, row: Row, length: int) -> None:
        """Take back the symbols behind the first ``length``."""
        one = self._mine(row)
        one.text = one.text[:length]
        one.given = None if one.given is None else min(one.given, len(one.own) + length)

    def read(self, asked: Sequence[Read]) -> Generator[Done, None, Predictions]:
        """Read on in some rows, as of :meth:`Reader.read`, with one call of :meth:`next_logits`."""
        pairs = list(zip(self._each_once(asked), asked, strict=True))
        errors = {k: error for k, (row, one) in enumerate(pairs) if (error := self._refused(row, one.symbols))}
        well = [pair for k, pair in enumerate(pairs) if k not in errors]
        texts = [(*row.own, *row.text, *one.symbols[:place]) for row, one in well for place in one.at]
        found = (yield from self.asked_for(texts)) if texts else torch.zeros(0, self.alphabet.size)
        claims = self._claims(well, texts) if self.traits.claims else None
        for row, one in well:
            if one.keep:
                row.text = (*row.text, *one.symbols)
                row.given = len(row.own) + len(row.text) if row.given is None else row.given
        counts = [0 if k in errors else len(one.at) for k, one in enumerate(asked)]
        work = Work(1 if texts else 0, sum(len(one.symbols) for _, one in well))
        return Given(found, counts, errors, work, claims=claims)

    def _claims(self, well: Sequence[tuple[Symbols, Read]], texts: Sequence[Sequence[int]]) -> Float[Tensor, " k"]:
        """Return what is claimed behind texts, of which as much was given as their rows say, or what is read first."""
        first = [
            len(row.own) + len(row.text) + len(one.symbols) if row.given is None else row.given
            for row, one in well
            for _ in one.at
        ]
        given = [min(count, len(text)) for count, text in zip(first, texts, strict=True)]
        return self.next_claims(texts, given).double() if texts else torch.zeros(0, dtype=torch.float64)

    def asked_for(self, texts: Sequence[Sequence[int]]) -> Generator[Done, None, Tensor]:
        """Return what :meth:`next_logits` does; a reader that waits for it yields meanwhile."""
        yield from ()
        return self.next_logits(texts)

    def _refused(self, row: Symbols, symbols: Sequence[int]) -> SoftmeetError | None:
        """Return why some symbols cannot be read; None if they can."""
        if error := self._unknown(symbols):
            return error
        if (length := len(row.own) + row.length + len(symbols)) > self.limit:
            return InvalidInputError(f"expected at most {self.limit:,} symbols of {self.name}, got {length:,}")
        return None
