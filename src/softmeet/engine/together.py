"""Members at the same time, in a thread each, or one after the other: as is told, or as is measured to be faster."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from statistics import median
from typing import Any, Literal, TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")
# Either way is tried so many times for a size of batch before the faster one is kept.
_TRIES = 6
# Threads have to save so much of the time.
_GAIN = 0.95


class Together:
    """Applies a function to members: in threads at the same time, or one after the other.

    Threads share torch's: with 4 of them, each of two members gets 2.

    Args:
        n: the number of members.
        parallel: whether they run at the same time; "auto" for what is faster where :meth:`measured` is called, and one
            after the other elsewhere. "auto" is False where torch has one thread or there is one member.

    Example:
        >>> Together(2, True).map(len, ["a", "bc"])
        [1, 2]
    """

    def __init__(self, n: int, parallel: bool | Literal["auto"]) -> None:
        threads = torch.get_num_threads()
        self.parallel = parallel if n > 1 and (threads > 1 or parallel is True) else False
        # For the same items and each size the seconds of calls one after the other, and in threads.
        self._seconds: dict[Any, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        self._chosen: dict[Any, bool] = {}
        if not self.parallel:
            return
        begun, share = threading.Barrier(n), max(1, threads // n)

        def begin(_: int) -> None:
            # What is set holds for threads that begin later, too; a thread keeps it once it was asked for.
            torch.set_num_threads(share)
            torch.get_num_threads()
            begun.wait()

        self._pool = ThreadPoolExecutor(n)
        list(self._pool.map(begin, range(n)))
        torch.set_num_threads(threads)

    def map(self, function: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Return [function(item) for item in items], at the same time if that is told."""
        return self._mapped(function, items, in_threads=self.parallel is True)

    def measured(self, function: Callable[[T], U], items: Sequence[T], size: int) -> list[U]:
        """Return [function(item) for item in items], in the way that is faster for such a size of the work, if "auto".

        Args:
            function: takes about as long for the same items and equal sizes.
            items: those to which it is applied; they live as long as this.
            size: what the time depends on, such as the number of sequences; sizes between two powers of two count as
                one.
        """
        if self.parallel != "auto" or len(items) < 2:
            return self.map(function, items)
        known = (*map(id, items), size.bit_length())
        if known in self._chosen:
            return self._mapped(function, items, in_threads=self._chosen[known])
        alone, threads = self._seconds[known]
        in_threads = len(threads) < len(alone)
        begun = time.perf_counter()
        found = self._mapped(function, items, in_threads=in_threads)
        (threads if in_threads else alone).append(time.perf_counter() - begun)
        if len(threads) == _TRIES:
            self._chosen[known] = median(threads) < _GAIN * median(alone)
        return found

    def _mapped(self, function: Callable[[Any], U], items: Sequence[Any], *, in_threads: bool) -> list[U]:
        if not in_threads:
            return [function(item) for item in items]
        running = [self._pool.submit(function, item) for item in items]
        # Where one fails, the others still work on what they were given.
        wait(running)
        return [one.result() for one in running]
