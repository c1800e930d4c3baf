"""What followed the last symbols of a text in files: an n-gram model of unbounded order on a suffix array.

P_0 is uniform, and for each order n of a few, as far as the last n symbols stand in the files, with c their counts of
what follows,

    P_n(w) = [max(c(w) - 0.6, 0) + (1 + 0.6 #w) P_{n-1}(w)] / (C + 1),

which is absolute discounting with a back-off to the shorter order. Kneser and Ney (1995) back off so; models of
unbounded order on suffix arrays are infini-gram's (Liu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

_DISCOUNT, _BACKED_OFF = 0.6, 1.0
# Of more places than the first number, evenly spread ones are counted, at least as many as the second.
_MOST, _SAMPLE = 4000, 2000


@runtime_checkable
class Sorted(Protocol):
    """What is read of an index: its symbols, and where they stand in the order of what ends there."""

    @property
    def symbols(self) -> Int32[np.ndarray, " n"]:
        """Each file's symbols, and behind them the number of symbols, which is none."""

    @property
    def order(self) -> Int32[np.ndarray, " n"]:
        """The positions of all symbols, sorted by what ends there, read backwards."""


@dataclass(frozen=True, eq=False)
class Match:
    """What followed a text in files.

    Attributes:
        size: the number of symbols that there are.
        levels: for each order that matched, the symbols that followed, ascending, and how often.
    """

    size: int
    levels: Sequence[tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]]

    @property
    def order(self) -> int:
        """The number of orders for which something followed the text in the files."""
        return len(self.levels)

    @cached_property
    def _parts(self) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """For each order the symbols that followed, their own part of P_n, and what is left to the shorter order."""
        return [
            (
                ids,
                (counts - _DISCOUNT) / (total + _BACKED_OFF),
                (_BACKED_OFF + _DISCOUNT * len(ids)) / (total + _BACKED_OFF),
            )
            for ids, counts in self.levels
            for total in [int(counts.sum())]
        ]

    def probs(self, allowed: Bool[np.ndarray, " v"] | None = None) -> Float64[np.ndarray, " v"]:
        """Return the distribution, (v,).

        Args:
            allowed: the symbols that can follow; None for all. The others get 0, and the rest sums to 1.
        """
        rest, found = 1.0, np.zeros(self.size)
        for ids, own, left in reversed(self._parts):
            found[ids] += rest * own
            rest *= left
        found += rest / self.size
        if allowed is not None:
            found[~allowed] = 0.0
            found /= found.sum()
        return found


def match(index: Sorted, text: Sequence[int], orders: Sequence[int], size: int) -> Match:
    """Return what followed the end of a text in files, behind each order as far as they have it.

    Matches never cross files, and a file's end is no symbol that follows.

    Args:
        index: the files.
        text: the symbols.
        orders: the numbers of symbols to match, ascending.
        size: the number of symbols that there are.

    Example:
        >>> from types import SimpleNamespace
        >>> toy = SimpleNamespace(symbols=np.intc([5, 7, 5, 8, 9]), order=np.intc([0, 2, 1, 3, 4]))
        >>> found = match(toy, [7, 5], (1, 2, 3), 9)
        >>> found.order, int(found.probs().argmax())
        (2, 8)
    """
    found = intervals(index, text[-orders[-1] :])
    levels = list[tuple[np.ndarray, np.ndarray]]()
    for k, n in enumerate(orders):
        if n > len(found):
            break
        if k and found[n - 1] == found[orders[k - 1] - 1]:
            levels.append(levels[-1])
            continue
        counted = _followed(index, *found[n - 1], size)
        if not len(counted[0]):
            break
        levels.append(counted)
    return Match(size, levels)


def intervals(index: Sorted, text: Sequence[int]) -> list[tuple[int, int]]:
    """Return for each n from 1 the interval of ``order`` of all places where the last n symbols end, while there are.

    Each lies in the one before, and is found by bisection of the symbol that stands n before.
    """
    # Numbers of Python, which are quicker than numpy's.
    symbols, order = index.symbols.view(np.intc).data, index.order.view(np.intc).data
    low, high, found = 0, len(order), list[tuple[int, int]]()
    for n, symbol in enumerate(reversed(text)):
        start, end = low, high
        while start < end:
            middle = (start + end) // 2
            place = order[middle] - n
            if place >= 0 and symbols[place] >= symbol:
                end = middle
            else:
                start = middle + 1
        low, end = start, high
        while start < end:
            middle = (start + end) // 2
            place = order[middle] - n
            if place >= 0 and symbols[place] > symbol:
                end = middle
            else:
                start = middle + 1
        high = start
        if low == high:
            break
        found.append((low, high))
    return found


def _followed(index: Sorted, low: int, high: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the symbols that follow the places of an interval of ``order``, ascending, and how often each does."""
    step = (high - low) // _SAMPLE if high - low > _MOST else 1
    # Every file ends with a symbol that is none, so that something stands behind each that is matched.
    following = index.symbols[np.asarray(index.order[low:high:step]) + 1]
    ids, counts = np.unique(following[following < size], return_counts=True)
    return ids.astype(np.int64), counts
