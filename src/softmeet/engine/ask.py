"""``Members``: the readers of texts that are written, each of which reads what it has not read of them.

Usually each member reads the newest tokens of all its texts in one call. What it predicts for a text then depends on
the others up to rounding. If members are *reproducible*, every text is read by itself, at the price of the batch: its
numbers are the same, to the last bit, whatever else is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, cast

from jaxtyping import Float
from torch import Tensor

from softmeet.engine.continuation import Continuation
from softmeet.engine.together import Together
from softmeet.errors import SoftmeetError
from softmeet.readers.reader import Predictions, Read, Reader, Row
from softmeet.suspended import Done

# For each member, its last hidden states of one text at the same t tokens, (t, d_i); or log-probabilities, (t, v).
Hidden: TypeAlias = list[Float[Tensor, "t _"]]
# A text, which of its members a reader is (an ensemble may have one several times, with prompts of its own), and
# whether the text is new to it.
Part = tuple[Continuation, int, bool]
C = TypeVar("C", bound=Continuation)


class Members:
    """The members of ensembles, as those who read texts.

    Args:
        n: the number of members.
        parallel: whether members read at the same time, in a thread each; it pays if they are on different devices, and
            "auto" measures whether it does for the newest tokens of so many texts.
        reproducible: whether every text is read by itself.
    """

    def __init__(self, n: int, *, parallel: bool | Literal["auto"] = False, reproducible: bool = False) -> None:
        self._together, self._reproducible = Together(n, parallel), reproducible

    def read_on(
        self,
        texts: Sequence[C],
        members: slice | Mapping[C, slice] = slice(None),
        *,
        every: bool = False,
        pause: Callable[[], None] | None = None,
    ) -> dict[C, Hidden]:
        """Read the tokens and drafts of texts that members have not read, each member those of all together.

        Args:
            texts: why a member cannot read them is added to their ``failures``.
            members: the members that read, as a slice; or for each text those that read it.
            every: whether the next token is to be predicted behind all t tokens that a member has not read, in place of
                the newest alone. What is kept of earlier texts is then not used.
            pause: called between the pieces of a long text, if members do not read in threads of their own; None for
                new tokens alone, which members read in the way that was measured to be faster for so many texts.

        Returns:
            for each text and each of those members the last hidden states, (t, d_i), or of a member without a head
            log-probabilities in nats, (t, v); (1, …) for the newest token alone.
        """
        if self._reproducible and len(texts) > 1:
            return {one: self.read_on([one], members, every=every, pause=pause)[one] for one in texts}
        asked = [
            (one, i)
            for one in texts
            for i in range(len(one.rows))[members if isinstance(members, slice) else members[one]]
        ]
        parts = _by_reader(asked, every=every)
        run = partial(_read_by, parts, every=every)
        if pause is None:
            told = self._together.measured(run, list(parts), len(texts))
        else:
            told = self._together.map(run, list(parts), pause)
        found: dict[Any, Any] = {text: [None] * len(text.rows) for text in texts}
        for reader, own, predictions in zip(parts, parts.values(), told, strict=True):
            for (one, i, _), behind in zip(own, predictions.states().split(predictions.counts), strict=True):
                found[one][i] = behind
            for k, error in predictions.errors.items():
                own[k][0].failures.append((reader.name, error))
        return {text: [states for states in own if states is not None] for text, own in found.items()}


def _by_reader(asked: Sequence[tuple[C, int]], *, every: bool) -> dict[Reader, list[Part]]:
    """Return what each reader is to read, with a row open for it; a text in which none can be open fails."""
    parts = defaultdict[Reader, list[Part]](list)
    for text, i in asked:
        reader, is_new = text.readers[i], text.rows[i] is None
        try:
            if is_new:
                text.row(i, reuse=not every)
        except SoftmeetError as refused:
            text.failures.append((reader.name, refused))
        else:
            parts[reader].append((text, i, is_new))
    return parts


def _read_by(parts: dict[Reader, list[Part]], reader: Reader, *, every: bool) -> Generator[Done, None, Predictions]:
    """Have a reader read on in its parts."""
    asked = []
    for text, i, is_new in parts[reader]:
        row = cast(Row, text.rows[i])
        start = row.length + text.skipped[i]
        symbols = [*text.tokens[start:], *text.drafts[max(0, start - len(text.tokens)) :]]
        # What follows a first token in whose place the member reads its own is predicted before any symbol.
        first = len(symbols) if not every else 0 if is_new and text.skipped[i] else 1
        asked.append(Read(row, symbols, range(first, len(symbols) + 1)))
    return (yield from reader.read(asked))
