"""What a member expects behind a token, by the token's last byte alone: from a short text that it is given once."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from softmeet.members.spelling import Spelling

# Prose, code, lists and figures, so that every kind of last byte occurs in several surroundings.
SAMPLE = files("softmeet.members").joinpath("sample.txt").read_text(encoding="utf-8")
# So many boundaries' worth of the tokens' own first bytes are mixed in, for kinds that hardly occur.
_PRIOR = 4.0


def kind(byte: int) -> int:
    r"""Sort a byte into a part of a letter (0), digit, space, end of a line, opening bracket, or other mark (5).

    Example:
        >>> [kind(byte) for byte in b"a1 \n(."]
        [0, 1, 2, 3, 4, 5]
    """
    one = chr(byte)
    is_letter = byte >= 0x80 or one.isalpha()
    return [is_letter, one.isdigit(), one in " \t", one in "\r\n", one in "([{<", True].index(True)


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
