"""``Continuation``: one text that is being written, with a row in each member's reader."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol, Self, TypeAlias

from torch import nn
from transformers import PreTrainedTokenizerBase

from softmeet.engine.combine import Combiner, Deferral
from softmeet.errors import NonFiniteError, SoftmeetError
from softmeet.readers.reader import Reader, Row

# For each member its own tokens, or None.
Own: TypeAlias = Sequence[Sequence[int] | None]


class Ensembled(Protocol):
    """What the engine knows of an ensemble."""

    members: nn.ModuleList
    combiner: Combiner
    tokenizer: PreTrainedTokenizerBase | None
    garbage: deque[tuple[Reader, Row]]
    claimants: Sequence[Reader]

    @property
    def readers_of_members(self) -> Sequence[Reader]:
        """The readers of the members, in order."""

    def before(self, i: int, prompt: Sequence[int], own: Own) -> tuple[Sequence[int], int]:
        """Return what member i reads of its own at the beginning of a text, and in place of how many of its tokens."""

    def before_claims(self, prompt: Sequence[int], own: Own) -> tuple[Sequence[int], int]:
        """Return the symbols that readers which claim read before a text, and in place of how many of its tokens."""


class Continuation:
    """One text that is being written: its tokens, and a row in the reader of each member.

    A *token* is a symbol of the members' common alphabet: over bytes a byte, or 256, the end of a text.

    Args:
        model: the ensemble.
        prompt: the first tokens, which members share.
        own: for each member what it reads in place of the prompt, over bytes before it; empty, or None, for nothing.
        readers: the members; None for the ensemble's own.

    Attributes:
        prompt, own: as given.
        readers: the members, and behind them the ensemble's readers that claim.
        tokens: the prompt's and those that follow.
        drafts: tokens that may follow them.
        rows: for each member, the row in which it reads the text; None before the first token.
        skipped: for each member, in place of how many of the first tokens it reads its own.
        given: how many of the tokens were given to readers that claim, not drawn; None for all that they read first.
        failures: (the name of a member, why it cannot read the text).
        asked: under the gate ``unsure`` a deferral of one row: whether the members after the first read the newest
            token.
        spent: the text's share of the seconds that these then took.
    """

    def __init__(
        self, model: Ensembled, prompt: Sequence[int], own: Own = (), readers: Sequence[Reader] | None = None
    ) -> None:
        self.model, self.prompt, self.own = model, tuple(prompt), own
        self.readers = [*(model.readers_of_members if readers is None else readers), *model.claimants]
        self.rows: list[Row | None] = [None] * (len(model.members) + len(model.claimants))
        self.tokens, self.drafts = list(prompt), list[int]()
        self.skipped = [0] * len(self.rows)
        self.failures = list[tuple[str, SoftmeetError]]()
        self.given: int | None = None
        self.asked: Deferral | None = None
        self.spent = 0.0

    def row(self, i: int, *, reuse: bool = True) -> Row:
        """Return the row in which member i reads the text; it is opened if there is none.

        Args:
            i: the member's number.
            reuse: whether a row that is opened may begin with what was read of earlier texts.
        """
        found = self.rows[i]
        if found is None and i < len(self.model.members):
            own, self.skipped[i] = self.model.before(i, self.prompt, self.own)
            # What is kept of a member's own tokens may be used all the same.
            known = self.tokens[self.skipped[i] :] if reuse else ()
            found = self.rows[i] = self.readers[i].open(known, own)
        elif found is None:
            own, self.skipped[i] = self.model.before_claims(self.tokens, self.own)
            found = self.rows[i] = self.readers[i].open(self.tokens[self.skipped[i] : self.given], own)
        return found

    def begin_claims(self) -> None:
        """Have all tokens so far count as given to readers that claim, as at the beginning of a call."""
        for i in range(len(self.model.members), len(self.rows)):
            if (row := self.rows[i]) is not None:
                self.readers[i].close(row)
                self.rows[i] = None

    def read_by(self, i: int) -> int:
        """Return how many of the tokens and drafts member i has read."""
        row = self.rows[i]
        return 0 if row is None else row.length + self.skipped[i]

    def crop(self, i: int, length: int) -> None:
        """Have member i take back all tokens and drafts behind the first ``length``."""
        if (row := self.rows[i]) is not None and self.read_by(i) > length:
            self.readers[i].crop(row, max(0, length - self.skipped[i]))
        # What could not be read is taken back, too.
        self.failures = []

    def fork(self) -> Self:
        """Return another text that begins with the same tokens, of which members have read as many."""
        other = type(self)(self.model, self.prompt, self.own, self.readers[: len(self.model.members)])
        other.tokens, other.drafts = list(self.tokens), list(self.drafts)
        other.skipped, other.failures, other.given = list(self.skipped), list(self.failures), self.given
        for i, row in enumerate(self.rows):
            # One by one, so that those that are open are closed if another cannot be.
            other.rows[i] = None if row is None else self.readers[i].fork(row)[0]
        return other

    def close(self) -> None:
        """Give up the rows; whoever keeps the text keeps no keys and values."""
        rows, self.rows = self.rows, [None] * len(self.rows)
        for reader, row in zip(self.readers, rows, strict=True):
            if row is not None:
                reader.close(row)

    def forget(self) -> None:
        """Give up what members have read, and drafts: who reads next begins anew."""
        self.close()
        self.drafts, self.failures = [], []

    @property
    def is_full(self) -> bool:
        """Whether a member's context is full, though its limit was not reached, so that nothing can follow."""
        for row in self.rows:  # noqa: SIM110 - turns of a generator are calls
            if row is not None and row.full:
                return True
        return False

    @property
    def full_members(self) -> list[str]:
        """The names of the members whose contexts are full."""
        return [self.readers[i].name for i, row in enumerate(self.rows) if row is not None and row.full]

    @property
    def error(self) -> SoftmeetError | None:
        """Why members cannot read the text; None if they can."""
        for _, error in self.failures:
            if not isinstance(error, NonFiniteError):
                return error
        if not self.failures:
            return None
        bad = ", ".join(name for name, _ in self.failures)
        return NonFiniteError(
            f"expected finite numbers, got NaN or an infinity from {bad}: leave it out of this request, or change the "
            "prompt"
        )

    def check(self) -> None:
        """Raise the error of a member that cannot read the text, if there is one."""
        if self.failures and (error := self.error) is not None:
            raise error

    def expected(self, top: int) -> list[list[tuple[str, float]]]:
        """Return for each member its most probable own tokens that may come next; empty where that is not known."""
        found = [
            [] if row is None else list(reader.explain(row, top, len(self.tokens) - skipped).expected)
            for reader, row, skipped, _ in zip(self.readers, self.rows, self.skipped, self.model.members, strict=False)
        ]
        return found if all(found) else []


class Dropped(Continuation):
    """A text of which nobody says when it is no longer needed: its rows are closed once it is garbage.

    Garbage may be collected while a reader reads, when no row of its may be closed: the ensemble's ``garbage`` notes
    them, for whoever reads next to close.

    Attributes:
        noted: whether it was said that a context is full.
    """

    noted = False

    def __del__(self) -> None:
        """Note the rows, to be closed when nobody reads."""
        self.model.garbage.extend((self.readers[i], row) for i, row in enumerate(self.rows) if row is not None)
