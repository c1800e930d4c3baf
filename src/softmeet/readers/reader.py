"""What a reader is: one member that reads texts, each in a row of its own, and predicts the symbol that follows.

Everything above reads through this: decoding, serving, evaluation. A reader's *symbols* are the numbers 0 to v - 1 of
its alphabet; over tokens they are ids, over bytes they are bytes and the end of a text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.errors import InvalidInputError, SoftmeetError, UnsupportedHeadError
from softmeet.members.opaque import Head
from softmeet.members.spelling import Spelling
from softmeet.readers.source import Source
from softmeet.suspended import Done
from softmeet.suspended import finished as finished


@runtime_checkable
class Alphabet(Protocol):
    """The symbols of a reader: how many there are, how texts are made of them, and which of them end a text."""

    @property
    def size(self) -> int:
        """The number v of symbols, which are 0 to v - 1."""

    @property
    def ends(self) -> frozenset[int]:
        """The symbols that end a text."""

    @property
    def spelling(self) -> Spelling | None:
        """How the tokens are spelled that :meth:`count` counts; None where symbols are tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the symbols of a text."""

    def decode(self, symbols: Sequence[int]) -> bytes:
        """Return the bytes that symbols stand for, none for those that end a text, whole characters or not."""

    def count(self, symbols: Sequence[int]) -> int:
        """Return how many tokens symbols are, as limits and prices count them."""

    def may_follow(self, symbols: Sequence[int]) -> Tensor | None:
        """Return which symbols can follow, (v,) bool; None if all can.

        What it returns depends on the last few symbols alone, as of characters that are written by several bytes.
        """


@dataclass(frozen=True)
class Work:
    """The cost of a text for one member, summed over its bytes.

    A call of the model that serves several texts counts once for each of them. The call that reads the member's tokens
    before every text, which is made once and kept, is not counted.

    Attributes:
        calls: the number of calls of the model.
        tokens: the number of tokens that were run in them for this text, over all tokenizations, guesses included.
        dropped: the sum over bytes of the share of probability mass that was estimated or dropped, not computed.
    """

    calls: int = 0
    tokens: int = 0
    dropped: float = 0.0

    def and_(self, calls: int = 0, tokens: int = 0, dropped: float = 0.0) -> Work:
        """Return the sum of this work and of further ``calls``, ``tokens`` and ``dropped`` shares of mass."""
        return Work(self.calls + calls, self.tokens + tokens, self.dropped + dropped)


@dataclass(frozen=True)
class Traits:
    """What a reader can do, and how exactly it does it; what stands above chooses by it, and never asks for a kind.

    Attributes:
        can_fork: whether :meth:`Reader.fork` works.
        can_crop: whether :meth:`Reader.crop` works, and a row can be forked at less than its length. Readers with a
            recurrent state can fork, but not crop.
        rounding: how predictions depend on which rows are read in one call: not in any bit (``bitwise``); as rounding
            of the reader's dtype does (``fine``); or noticeably (``coarse``), as of quantised weights.
        bound: the largest mean KL in nats between predictions of a row read alone and read with others, where rounding
            is ``coarse``; else the largest difference of log-probabilities at symbols of probability 10⁻⁶ or more.
        known: how many symbols of each prediction have a known probability, the others being bounded by
            :meth:`Predictions.bounds`; None if all have.
        rows: the most rows that may be open at once; None for no limit.
        predictions: the most predictions that one :meth:`Reader.read` may ask for; None for no limit.
        places: the names of the devices on which it computes, such as ``cuda:0``; readers with none in common may read
            at the same time.
        cost: the bytes of memory that one call reads, about its time; 0 if that is not known.
        calls: (tokens, seconds) of calls of one row, by ascending numbers of tokens, as they were measured once on this
            machine and kept; () if that was not done.
        row_cost: the time that a call takes longer for each row more, as a share of the time of a call of one row; 0 if
            that is not known. Where it is near 1, nothing is read ahead of need.
        waits: whether :meth:`Reader.read` waits for answers from elsewhere, and yields meanwhile, so that others go on.
        claims: whether predictions have :attr:`Predictions.claims`. Such a reader is no member that a rule combines: it
            takes its share of what the rule has answered.
    """

    can_fork: bool = True
    can_crop: bool = True
    rounding: Literal["bitwise", "fine", "coarse"] = "fine"
    bound: float = 1e-4
    known: int | None = None
    rows: int | None = None
    predictions: int | None = None
    places: tuple[str, ...] = ()
    cost: int = 0
    calls: tuple[tuple[int, float], ...] = ()
    row_cost: float = 0.0
    waits: bool = False
    claims: bool = False


class Row:
    """A text that a reader reads; :meth:`Reader.open` makes it, and only its reader may use it.

    Attributes:
        known: how many symbols of the text that it was opened with need not be read, since an earlier text began alike.
        length: how many symbols have been read, those included.
        full: whether no symbol more can be read, though ``length`` is below the reader's limit.
    """

    known: int = 0
    length: int = 0
    full: bool = False


@dataclass(frozen=True, eq=False)
class Read:
    """What is to be read next in one row.

    Attributes:
        row: the row; a call of :meth:`Reader.read` has each row once.
        symbols: the t symbols that follow those that were read; none, to be told again what follows.
        at: behind how many of them predictions are wanted, each from 0 to t, in ascending order; 0 is before the first.
        keep: whether the symbols count as read afterwards; without it, the row is left as it was.
    """

    row: Row
    symbols: Sequence[int]
    at: Sequence[int]
    keep: bool = True


class Predictions(ABC):
    """What follows at each place that a call of :meth:`Reader.read` was asked for.

    The places are numbered in the order in which they were asked for, read by read. What is computed of them is
    computed when it is asked for, from what these predictions hold by themselves: a later call changes nothing in them.

    Args:
        counts: for each read, how many places it has; 0 if it failed.
        errors: by the number of the read, why its row could not be read; the row is as it was before.
        work: what reading has cost.

    Attributes:
        dropped: at each place the share of probability mass that was estimated or dropped, (k,) fp64; None of a reader
            that leaves nothing out.
        claims: at each place the share of the probability mass that a reader which knows when it knows claims for its
            own predictions, in [0, 1), (k,) fp64; None of all others.
    """

    dropped: Float[Tensor, " k"] | None = None
    claims: Float[Tensor, " k"] | None = None

    def __init__(
        self, counts: Sequence[int], errors: Mapping[int, SoftmeetError] | None = None, work: Work | None = None
    ) -> None:
        self.counts, self.errors, self.work = list(counts), dict(errors or {}), work or Work()

    def __len__(self) -> int:
        """Return the number of places."""
        return sum(self.counts)

    def of(self, k: int) -> slice:
        """Return which places are those of read number ``k``."""
        start = sum(self.counts[:k])
        return slice(start, start + self.counts[k])

    @abstractmethod
    def logits(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k v"]:
        """Return logits at some places, in nats, fp32 or fp64: log-probabilities up to a constant at each place."""

    def log_probs(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k v"]:
        """Return log-probabilities at some places, in nats, in the dtype of :meth:`logits`."""
        return self.logits(places).log_softmax(-1)

    def hidden(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k d"]:
        """Return the last hidden states at some places, which the reader's head turns into logits.

        Raises:
            UnsupportedHeadError: if the reader has no head.
        """
        raise UnsupportedHeadError(
            "expected a reader with an output layer that can be read, for a rule that reads heads: use an average"
        )

    def states(self) -> Float[Tensor, "k _"]:
        """Return what is combined at all places: hidden states, which a head takes; or log-probabilities.

        Behind the log-probabilities of a reader that claims stands the logarithm of its claim, (k, v + 1).
        """
        if self.claims is not None:
            log_probs = self.log_probs()
            return torch.cat([log_probs, self.claims.log()[:, None].to(log_probs)], -1)
        return self.log_probs() if type(self).hidden in (Predictions.hidden, Given.hidden) else self.hidden()

    def bounds(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, " k"] | None:
        """Return, of a reader that knows some symbols alone, the largest log-probability that any other can have.

        Symbols that are not known have -inf among :meth:`log_probs`. None if all symbols are known.
        """
        return None


class Given(Predictions):
    """Predictions of which the logits are there.

    Args:
        found: (k, v), the logits at all places, in nats.
        counts, errors, work: as of :class:`Predictions`.
        most: (k,), the bounds of :meth:`Predictions.bounds`; None if all symbols are known.
        hidden: (k, d), the last hidden states at all places; None of a reader that has no head.
        claims: as of :class:`Predictions`.

    Example:
        >>> import torch
        >>> Given(torch.zeros(1, 2), [1]).log_probs().exp()
        tensor([[0.5000, 0.5000]])
    """

    def __init__(
        self,
        found: Float[Tensor, "k v"],
        counts: Sequence[int],
        errors: Mapping[int, SoftmeetError] | None = None,
        work: Work | None = None,
        most: Float[Tensor, " k"] | None = None,
        hidden: Float[Tensor, "k d"] | None = None,
        claims: Float[Tensor, " k"] | None = None,
    ) -> None:
        super().__init__(counts, errors, work)
        self.claims = claims
        self._found, self._most, self._hidden = found, most, hidden

    def hidden(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k d"]:
        """Return the last hidden states at some places."""
        return super().hidden(places) if self._hidden is None else self._hidden[places]

    def states(self) -> Float[Tensor, "k _"]:
        """Return hidden states, or log-probabilities where there are none; they sum to less where some are unknown."""
        if self._hidden is not None:
            return self._hidden
        return super().states() if self._most is None else self._found

    def logits(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k v"]:
        """Return logits at some places."""
        return self._found[places]

    def bounds(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, " k"] | None:
        """Return the bounds at some places."""
        return None if self._most is None else self._most[places]


@dataclass(frozen=True)
class Explanation:
    """How a reader has read a row, for reports.

    Attributes:
        expected: the member's own tokens that may come next, the most probable first, each as (its text, its
            log-probability in nats); empty where symbols are tokens.
        details: anything more by name, which can be written as JSON.
    """

    expected: tuple[tuple[str, float], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class Reader(ABC):
    """One member that reads texts, each in a row of its own.

    A subclass defines the abstract methods; :func:`softmeet.testing.check_reader` tries the laws that it has to obey.
    Rows never change each other. A call of :meth:`read` is atomic for each row: its symbols have been read, or its
    number is among the errors and the row is as before.

    Attributes:
        name: the member's name in messages.
        alphabet: its symbols.
        limit: the number of symbols for which a row has room.
        traits: what it can do.
        head: the output layer, for rules that read heads; None if there is none.
    """

    name: str
    alphabet: Alphabet
    limit: int
    traits: Traits
    head: Head | None = None

    @property
    @abstractmethod
    def bytes(self) -> int:
        """The bytes of memory of all open rows, and of what is kept of closed ones."""

    @abstractmethod
    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row, of which nothing has been read.

        Args:
            text: the symbols that will be read first, by which a row is found that began alike; ``row.known`` of them
                need not be read. At least one is left to be read.
            own: the member's own tokens before the text, such as a prompt of its own; they are no symbols, and none of
                them is counted. Empty for those with which it begins every text.
            reuse: whether what was read for earlier rows may be used.

        Raises:
            InvalidInputError: if ``own`` cannot be read, or no row more can be open.
        """

    @abstractmethod
    def read(self, asked: Sequence[Read]) -> Generator[Done, None, Predictions]:
        """Read on in some rows, in one call of the model where that is possible.

        The generator yields where it may be left for a while: other rows may be read in between, none of these. It
        yields how many tokens were read, of how many, or None; and returns the predictions. :func:`finished` runs it to
        its end.

        Raises:
            InvalidInputError: if a row is closed or not this reader's, or stands there twice; then nothing was read.
        """

    @abstractmethod
    def close(self, row: Row) -> None:
        """Give a row up; nothing more can be read in it."""

    def read_whole(
        self,
        texts: Sequence[Sequence[int]],
        at: Sequence[Sequence[int]],
        own: Sequence[int] = (),
        given: int | None = None,
    ) -> Predictions:
        """Read texts from their beginnings, each in a row of its own that is closed again.

        Args:
            texts: their symbols.
            at: for each, behind how many of its symbols predictions are wanted, as in :class:`Read`.
            own: the member's own tokens before each, as in :meth:`open`.
            given: to a reader that claims, how many first symbols of each were given, not drawn; None for all.

        Raises:
            SoftmeetError: if a text cannot be read.
        """
        rows = list[Row]()
        try:
            for text in texts:
                rows.append(self.open(text[:given] if given else (), own, reuse=False))
            if given == 0:  # what is read first is given
                finished(self.read([Read(row, (), ()) for row in rows]))
            each = zip(rows, texts, at, strict=True)
            found = finished(self.read([Read(row, text, list(places), keep=False) for row, text, places in each]))
        finally:
            for row in rows:
                self.close(row)
        for error in found.errors.values():
            raise error
        return found

    def to_itself(self) -> AbstractContextManager[Any]:
        """Return a context in which no other thread opens rows, and what is told depends on what is read in it alone.

        Of a reader that threads may share, and of which that is always so, it is an empty one.
        """
        return nullcontext()

    def fork(self, row: Row, count: int = 1, length: int | None = None) -> list[Row]:
        """Open ``count`` rows in which the first ``length`` symbols of another, by default all, have been read.

        Raises:
            InvalidInputError: if the reader cannot fork, or not at less than the row's length.
        """
        raise self.cannot("fork rows")

    def crop(self, row: Row, length: int) -> None:
        """Have all symbols of a row behind the first ``length`` count as not read.

        Raises:
            InvalidInputError: if the reader cannot crop.
        """
        raise self.cannot("take back what it has read")

    def explain(self, row: Row, top: int = 10, at: int | None = None) -> Explanation:
        """Say how a row has been read, and list ``top`` of the tokens that are expected behind its symbols.

        Args:
            row: the row.
            top: how many tokens to list.
            at: behind how many of the row's symbols; None for all. Nothing is listed where that is no longer known.
        """
        return Explanation()

    def source(self, symbols: Sequence[int]) -> Source | None:
        """Return where the most of the last symbols of a text stand in files; None, as most readers know of none."""
        return None

    def sources(self, text: str, least: int | None = None) -> list[Source]:
        """Return where stretches of a text of at least so many symbols stand in files; most readers know of none."""
        return []

    def abort(self) -> None:  # noqa: B027 - most readers wait for nothing
        """End what waits for an answer from elsewhere at once, by an error, from any thread, and ask nothing any more.

        This is for the end of a process. Most readers wait for nothing, and do nothing here.
        """

    def cannot(self, what: str) -> SoftmeetError:
        """Return the error that says that this reader cannot do something, a verb with its object."""
        return InvalidInputError(f"expected a reader that can {what}, which {self.name} cannot: use another member")
