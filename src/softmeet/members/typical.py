"""What a member expects behind a token, by the token's last byte alone: from a short text that it is given once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from softmeet.members.spelling import Spelling

# Prose, code, lists and figures, so that every kind of last byte occurs in several surroundings.
SAMPLE = '''The harbour was quiet when the boat came in. "You are late," said the keeper, who had waited for hours;
"the tide won't wait for anyone." Nobody answered. In 1987, about 2,400 people lived here (most of them fishermen);
by the spring of 2003 only 310 were left, and the school had closed. Why did they go? It isn't easy: work, money.

def mean(values: list[float], weights=None) -> float:
    """Return the weighted mean of some numbers."""
    if weights is None:
        weights = [1.0] * len(values)
    total = sum(w * x for w, x in zip(weights, values))
    return total / max(sum(weights), 1e-12)

class Reader:
    def __init__(self, path, encoding="utf-8"):
        self.path = path
        self._lines = open(path, encoding=encoding).read().split("\\n")

## Changes

- Fixed a bug in `Reader.next()` that skipped empty lines (#1342).
- Added `--verbose`; see the [guide](https://example.org/guide.html) for details.

1. Install the package: `pip install reader==0.3.1`
2. Übersetzungen, naïve façades and “quoted” words — all of them kept.
'''
# So many boundaries' worth of the tokens' own first bytes are mixed in, for kinds that hardly occur.
_PRIOR = 4.0


def kind(byte: int) -> int:
    """Sort a byte into a part of a letter (0), digit, space, end of a line, opening bracket, or other mark (5).

    Example:
        >>> [kind(byte) for byte in b"a1 \\n(."]
        [0, 1, 2, 3, 4, 5]
    """
    character = chr(byte)
    if byte >= 0x80 or character.isalpha():
        return 0
    if character.isdigit():
        return 1
    if character in " \t":
        return 2
    if character in "\r\n":
        return 3
    return 4 if character in "([{<" else 5


def typical(
    spelling: Spelling, tokens: Sequence[int], roots: Sequence[np.ndarray[Any, np.dtype[np.float64]]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Average what follows tokens, by the kind of their last byte.

    Args:
        spelling: of the tokens.
        tokens: of :data:`SAMPLE`.
        roots: (257,), the probabilities of the first byte of what follows each.

    Returns:
        (256, 257), for each last byte the probabilities of the first byte of what follows.
    """
    sums, counts = _PRIOR * spelling.typical[:6], np.full(6, _PRIOR)
    for token, root in zip(tokens, roots, strict=True):
        own = kind(spelling.last(token))
        sums[own] += root
        counts[own] += 1
    found: np.ndarray[Any, np.dtype[np.float64]] = (sums / counts[:, None])[[kind(byte) for byte in range(256)]]
    return found
