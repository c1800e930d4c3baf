"""The state of one text that one member has read byte by byte, and what reading has cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from softmeet.readers.bytes.covers import Covers
from softmeet.readers.bytes.next_tokens import ProbsAlongText
from softmeet.readers.bytes.nodes import Next
from softmeet.readers.reader import Work


@dataclass(frozen=True, eq=False)
class Guess:
    """A token that was run because the text of a :class:`Reading` may continue with it, before its bytes have come.

    Attributes:
        place: the number of the text's bytes that it and the tokens before it spell.
        word: the bytes that it spells.
        behind: the prediction behind it.
    """

    place: int
    word: bytes
    behind: Next


@dataclass(frozen=True, eq=False)
class Reading:
    """One text as one member has read it so far; immutable, and made by the methods of :class:`ByteMember`.

    Attributes:
        covers: the tokenizations of the text that are still pursued (the others are too improbable), each with the next
            token's probabilities after it; the last token may run past the text (:mod:`softmeet.readers.bytes.covers`).
        text: the bytes read.
        work: the cost of reading them, without the prefix before the text.
        guesses: likely next tokens that were run ahead of need, in a call for tokens that were needed.
        ended: whether nothing can follow: the end has come, or the model's context is full.
        full: whether it has ended because the model's context is full.
    """

    covers: Covers
    text: bytes
    work: Work = field(default_factory=Work)
    guesses: tuple[Guess, ...] = ()
    ended: bool = False
    full: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether it can be lengthened by any byte, not by those alone that were known to follow it."""
        return not any(isinstance(probs, ProbsAlongText) for probs in self.covers.places)
