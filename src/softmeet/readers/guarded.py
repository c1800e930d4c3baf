"""A reader from elsewhere, of which every answer is looked at: what breaks a law fails by the reader's name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import RLock
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.errors import NonFiniteError, ReaderError, SoftmeetError
from softmeet.heads import SoftmaxHead
from softmeet.readers.reader import Explanation, Given, Predictions, Read, Reader, Row
from softmeet.suspended import Done

T = TypeVar("T")
_log = logging.getLogger("softmeet")


class _Turns:
    """A lock, in whose place a copy has another one, as locks cannot be copied."""

    def __init__(self) -> None:
        self.lock = RLock()

    def __reduce__(self) -> tuple[type[_Turns], tuple[()]]:
        return _Turns, ()


class GuardedReader(Reader):
    """A reader whose answers are those of another one, or errors of the rows that they harm.

    A row fails with a ReaderError if the other reader raises anything but an error of softmeet's, forgets the row, or
    tells fewer places or symbols than were asked for, and with a NonFiniteError if it tells NaN, +inf or nothing that
    is possible. The other rows of the call are told as they are.

    Args:
        reader: the other one.
        head: what makes logits of its hidden states, which are then told, too; None to tell logits alone.

    Example:
        >>> from softmeet.testing import Uniform
        >>> class Torn(Uniform):
        ...     def next_logits(self, texts):
        ...         return super().next_logits(texts) / torch.zeros(257)
        >>> Torn("torn").read_whole([[1]], [[1]]).log_probs().isnan().all()
        tensor(True)
        >>> GuardedReader(Torn("torn")).read_whole([[1]], [[1]])
        Traceback (most recent call last):
        softmeet.errors.NonFiniteError: expected numbers of torn that make a distribution, got NaN or +inf
    """

    def __init__(self, reader: Reader, head: SoftmaxHead | None = None) -> None:
        self._reader, self.head = reader, head
        self.name, self.alphabet, self.limit = reader.name, reader.alphabet, reader.limit
        self.traits = reader.traits

    @contextmanager
    def to_itself(self) -> Iterator[None]:
        """Return a context in which no other thread has the reader, be it guarded by another one."""
        turns: _Turns = vars(self._reader).setdefault("_softmeet_turns", _Turns())
        with turns.lock, self._reader.to_itself():
            yield

    def __reduce__(self) -> Any:
        """Have a copy guard a copy."""
        return GuardedReader, (self._reader, self.head)

    @property
    def bytes(self) -> int:
        """The bytes of memory of all rows."""
        return self._told(lambda: self._reader.bytes)

    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row of the other reader; what it raises beside softmeet's errors is a ReaderError that names it."""
        return self._told(lambda: self._reader.open(text, own, reuse=reuse))

    def close(self, row: Row) -> None:
        """Give a row up; whoever closes it is done with it, whatever happens."""
        with suppress(SoftmeetError):
            self._told(lambda: self._reader.close(row))

    def abort(self) -> None:
        """End what waits for an answer from elsewhere."""
        self._told(lambda: self._reader.abort())

    def fork(self, row: Row, count: int = 1, length: int | None = None) -> list[Row]:
        """Open rows that begin with a row's symbols."""
        return self._told(lambda: self._reader.fork(row, count, length))

    def crop(self, row: Row, length: int) -> None:
        """Take back the symbols behind the first ``length``."""
        self._told(lambda: self._reader.crop(row, length))

    def explain(self, row: Row, top: int = 10, at: int | None = None) -> Explanation:
        """Say how a row has been read."""
        return self._told(lambda: self._reader.explain(row, top, at))

    def read(self, asked: Sequence[Read]) -> Generator[Done, None, Predictions]:
        """Read on in some rows."""
        before = [one.row.length for one in asked]
        try:
            found = yield from self._reader.read(asked)
            return self._looked_at(asked, before, found)
        except Exception as error:
            every = dict.fromkeys(range(len(asked)), self._named(error))
            return Given(torch.zeros(0, self.alphabet.size), [0] * len(asked), every)

    def _looked_at(self, asked: Sequence[Read], before: Sequence[int], found: Predictions) -> Predictions:
        """Return predictions without those of rows that break a law, which are errors of these rows."""
        if not isinstance(found, Predictions) or len(found.counts) != len(asked):
            raise self._broken(f"told {type(found).__name__} in place of Predictions of {len(asked)} reads")
        logits, v = found.logits(), self.alphabet.size
        if logits.shape != (len(found), v) or logits.dtype not in (torch.float32, torch.float64):
            wanted = f"{(len(found), v)} logits in float32 or float64 were due"
            raise self._broken(f"told {tuple(logits.shape)} {logits.dtype} where {wanted}")
        errors, places, counts = dict(found.errors), list[int](), [0] * len(asked)
        for k, (one, length) in enumerate(zip(asked, before, strict=True)):
            own = found.of(k)
            claims = None if found.claims is None else found.claims[own]
            if k in errors or (error := self._harm(one, length, logits[own], claims)) is None:
                counts[k] = own.stop - own.start
                places += range(own.start, own.stop)
            else:
                errors[k] = error
        # Rows of logits are long: they are copied only where some are left out.
        told = slice(None) if len(places) == len(found) else torch.tensor(places, dtype=torch.long)
        most = found.bounds()
        hidden = None if self.head is None else found.hidden(told)
        claims = None if found.claims is None else found.claims[told]
        return Given(logits[told], counts, errors, found.work, None if most is None else most[told], hidden, claims)

    def _harm(
        self, one: Read, before: int, own: Float[Tensor, "t v"], claims: Float[Tensor, " t"] | None
    ) -> SoftmeetError | None:
        """Return which law an answer to one read breaks; None if it breaks none.

        Args:
            one: what was asked.
            before: the row's length before it was.
            own: what was told.
            claims: how much was claimed.
        """
        if len(own) != len(one.at):
            return self._broken(f"told {len(own)} places of a row, of which {len(one.at)} were asked for")
        if one.row.length != (length := before + one.keep * len(one.symbols)):
            return self._broken(f"left a row at length {one.row.length}, where it was to be {length}")
        if self.traits.claims and (claims is None or len(claims) != len(own) or not _are_shares(claims)):
            return self._broken("claimed no share from 0 to below 1 at each place")
        # numpy is done with a row before torch has woken its threads.
        on_cpu = own.device.type == "cpu"
        most = own.detach().numpy().max(-1, initial=-np.inf) if on_cpu else own.amax(-1).cpu().numpy()
        if not np.isfinite(most).all():  # the most of some numbers, of which one is NaN, is NaN
            error = NonFiniteError(f"expected numbers of {self.name} that make a distribution, got NaN or +inf")
            _log.error("%s", error)
            return error
        return None

    def _told(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except Exception as error:
            raise self._named(error) from error

    def _named(self, error: Exception) -> SoftmeetError:
        """Return an error of softmeet's as it is, and any other as one that names the reader."""
        return error if isinstance(error, SoftmeetError) else self._broken(f"raised {type(error).__name__}: {error}")

    def _broken(self, how: str) -> ReaderError:
        error = ReaderError(f"the reader {self.name} {how}: try it by softmeet.testing.check_reader")
        _log.error("%s", error)
        return error


def _are_shares(claims: Float[Tensor, " t"]) -> bool:
    return bool(((claims >= 0) & (claims < 1)).all())
