"""What two tokenizers have in common: tokens, and the places where they cut a text."""

from __future__ import annotations

from itertools import accumulate

from softmeet.members.spelling import Spelling


def shared_words(one: Spelling, other: Spelling) -> int:
    """Count the byte strings that are tokens of both."""
    return len(set(one.words) & set(other.words))


def shared_boundaries(one: Spelling, other: Spelling, text: bytes) -> tuple[float, float]:
    """Find the share of the one's token ends in a text at which the other's tokens end too, and the other way round."""
    ends = [
        {end - len(own.dummy) for end in accumulate(len(own.spelled([token])) for token in own.encode(text))}
        for own in (one, other)
    ]
    both = len(ends[0] & ends[1])
    return both / max(1, len(ends[0])), both / max(1, len(ends[1]))
