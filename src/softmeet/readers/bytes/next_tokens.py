"""A model's next-token probabilities as sums by the next byte, of all tokens or of those along bytes that are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from softmeet.members.spelling import Spelling
from softmeet.readers.bytes.nodes import Path

# The 256 bytes, and the end of the text.
SYMBOLS = 257
END = 256
Masses = np.ndarray[Any, np.dtype[np.float64]]
# The least probability of a token: without it, rounding could leave all covers without mass.
LEAST = float(np.finfo(np.float32).tiny)
# What stands, where covers are weighed, for one that a member rules out: it may come all the same, by another member,
# and some cover has to continue then. As a prediction it is 0.
RULED_OUT = LEAST / 2


def by_symbol(symbols: np.ndarray[Any, np.dtype[np.uint8]], masses: Masses) -> Masses:
    """Sum k masses by the symbols that they belong to (both (k,)), and return the sums, (257,) fp64."""
    return np.bincount(symbols, masses, SYMBOLS).astype(np.float64, copy=False)


def without_ruled_out(probs: Masses) -> Masses:
    """Return probabilities with 0 where ``RULED_OUT`` stands for it."""
    return np.where(probs > RULED_OUT, probs, 0.0)


@dataclass(frozen=True, eq=False)
class NextTokenProbs:
    """A model's next-token probabilities after a sequence of tokens, made by :meth:`ByteMember.next_token_probs`.

    Attributes:
        path: the sequence, with the member's own tokens before the text.
        place: the number of the text's bytes that they spell.
        tokens: (m,), the probability of each of the m tokens in the order of ``Spelling.words``, at least ``LEAST``, or
            ``RULED_OUT``; with the end's, ``root[256]``, they sum to 1.
        root: (257,), the probability of each first byte of the next token, and at 256 that of the end, or
            ``RULED_OUT``; 0 is that of a byte with which no token begins.
    """

    path: Path
    place: int
    tokens: Masses
    root: Masses

    def masses(self, spelling: Spelling, length: int, longer: int, end: int, *, exact: bool) -> Masses:
        """Sum the probabilities of the tokens ``longer`` to ``end - 1`` by their byte at index ``length``, (257,) fp64.

        The tokens are given by number (index in ``spelling.words``) and have more than ``length`` bytes; if ``exact``,
        those that are ruled out have none.
        """
        some = slice(longer, end)
        probs = without_ruled_out(self.tokens[some]) if exact else self.tokens[some]
        return by_symbol(spelling.flat[spelling.offsets[:-1][some] + length], probs)

    def total(self, longer: int, end: int) -> float:
        """Return the sum of the probabilities of the tokens whose numbers are ``longer`` to ``end - 1``."""
        return float(self.tokens[longer:end].sum())

    def prob(self, k: int) -> float:
        """Return the probability of the token whose number (index in ``spelling.words``) is ``k``."""
        return float(self.tokens[k])


class ProbsAlongText(NextTokenProbs):
    """Next-token probabilities before known bytes, reduced to the sums that following these bytes asks for.

    Built from the whole ``probs`` and the bytes ``text`` that follow; answers :meth:`masses`, :meth:`total` and
    :meth:`prob` for tokens along these bytes alone. ``tokens`` is empty.
    """

    def __init__(self, probs: NextTokenProbs, spelling: Spelling, text: bytes) -> None:
        self._masses: dict[tuple[int, bool], Masses] = {}
        self._totals: dict[tuple[int, int], float] = {}
        self._probs: dict[int, float] = {}
        longer, end = 0, len(spelling.words)
        for length in range(1, len(text) + 1):
            first, longer, end = spelling.among(text[:length], longer, end)
            self._probs |= {k: probs.prob(k) for k in range(first, longer)}
            if longer == end:
                break
            for exact in (False, True):
                self._masses[length, exact] = probs.masses(spelling, length, longer, end, exact=exact)
            self._totals[longer, end] = probs.total(longer, end)
        super().__init__(probs.path, probs.place, np.empty(0), probs.root)

    def masses(self, spelling: Spelling, length: int, longer: int, end: int, *, exact: bool) -> Masses:
        """Return :meth:`NextTokenProbs.masses` for the first ``length`` known bytes; ignore ``longer`` and ``end``."""
        return self._masses[length, exact]

    def total(self, longer: int, end: int) -> float:
        """Return :meth:`NextTokenProbs.total` for (longer, end) of :meth:`Spelling.among` of some first known bytes."""
        return self._totals[longer, end]

    def prob(self, k: int) -> float:
        """Return :meth:`NextTokenProbs.prob`; token ``k`` must spell a beginning of the known bytes."""
        return self._probs[k]
