"""One byte member's running sequences: they come and go at any byte, and one call of its model serves all of them.

A *symbol* is a byte, 0 to 255, or 256, which at the beginning of a sequence stands for the beginning of a text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import END
from softmeet.readers.bytes.reading import Reading
from softmeet.server.batch import Part
from softmeet.server.sequences import Sequence


class ByteBatch:
    """The running sequences of one member that is read byte by byte.

    A sequence's state is its :class:`Reading`, which is immutable and the sequence's own (``Sequence.trails``).

    Args:
        name: the member's name, for messages.
        member: the member.

    Attributes:
        kept_tokens: 0, as no prompts are kept.
    """

    kept_tokens = 0

    def __init__(self, name: str, member: ByteMember) -> None:
        self.name, self.member = name, member

    @property
    def cache_bytes(self) -> int:
        """The bytes of the keys and values of all running sequences, and of the tokens before them."""
        return self.member.reader.bytes

    def close(self, s: Sequence, i: int) -> None:
        """Do nothing: what a sequence that has ended has read goes with its reading, which is the sequence's own."""

    def step(self, parts: list[Part]) -> Float[Tensor, "B 257"]:
        """Read the newest symbol of sequences, and return the next one's log-probabilities, (B, 257), in nats."""
        return torch.cat(self.catch_up(parts))

    def catch_up(
        self, behind: list[Part], *, every: bool = False, pause: Callable[[], None] = lambda: None
    ) -> list[Float[Tensor, "t 257"]]:
        """Read the symbols of sequences that the member has not read.

        Args:
            behind: (sequence, the number of this member among the sequence's members); each has new symbols.
            every: whether the next symbol's log-probabilities are wanted after each symbol of a new prompt instead of
                after its last alone.
            pause: called between two calls of the model.

        Returns:
            for each sequence, the next symbol's log-probabilities in nats after its last symbol, (1, 257) fp64, or with
            ``every`` after each of its t symbols, (t, 257).
        """
        new = [k for k, (s, i) in enumerate(behind) if not isinstance(s.trails[i], Reading)]
        found = dict(zip(new, self._begun([behind[k] for k in new], every, pause), strict=True))
        rest = [k for k in range(len(behind)) if k not in found]
        if rest:
            self._read_on([behind[k] for k in rest], pause)
            log_probs = self.member.log_probs([_reading(*behind[k]) for k in rest])
            found |= {k: log_probs[j : j + 1] for j, k in enumerate(rest)}
        return [found[k] for k in range(len(behind))]

    def _begun(self, new: list[Part], every: bool, pause: Callable[[], None]) -> list[Float[Tensor, "t 257"]]:
        """Read all symbols of sequences from their beginnings; as :meth:`catch_up`."""
        if not every:
            readings = self.member.begin_all([_text(s) for s, _ in new], [_prefix(s, i) for s, i in new], pause)
            for (s, i), reading in zip(new, readings, strict=True):
                s.trails[i] = reading
            return list(self.member.log_probs(readings).split(1)) if new else []
        found = []
        for s, i in new:
            s.trails[i], log_probs, _ = self.member.score(_text(s), _prefix(s, i))
            # Row 0 predicts the first byte, after the symbol that begins a text if there is one.
            found.append(torch.from_numpy(log_probs[-len(s.tokens) :]))
            pause()
        return found

    def _read_on(self, behind: list[Part], pause: Callable[[], None]) -> None:
        """Read the symbols that sequences have more than their readings."""
        for s, i in behind:
            if len(unread := _unread(s, i)) > 1 and END not in unread:
                s.trails[i] = self.member.follow(_reading(s, i), bytes(unread))
                pause()
        while late := [(s, i) for s, i in behind if _unread(s, i)]:
            readings = self.member.advance([_reading(*one) for one in late], [_unread(*one)[0] for one in late])
            for (s, i), reading in zip(late, readings, strict=True):
                s.trails[i] = reading
            pause()


def _text(s: Sequence) -> bytes:
    """Return a sequence's bytes."""
    return bytes(s.tokens[s.tokens[0] == END :])


def _prefix(s: Sequence, i: int) -> list[int] | tuple[int, ...]:
    """Return the tokens that member ``i`` of a sequence reads before its text: the sequence's own, or the member's."""
    member, own = s.members[i], s.own[i] if s.own else None
    assert isinstance(member, ByteMember)
    return member.prefix if own is None else own


def _reading(s: Sequence, i: int) -> Reading:
    reading = s.trails[i]
    assert isinstance(reading, Reading)
    return reading


def _unread(s: Sequence, i: int) -> list[int]:
    """Return the symbols of a sequence that its member ``i`` has not read; none if the reading has ended."""
    reading, begun = _reading(s, i), s.tokens[0] == END
    return [] if reading.ended else s.tokens[begun + len(reading.text) :]
