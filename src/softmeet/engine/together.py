"""Members at the same time, in a thread each, or one after the other: as is told, or as is measured to be faster."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from softmeet.suspended import Done, by_turns, controllable, finished, outcomes

T = TypeVar("T")
U = TypeVar("U")
Work: TypeAlias = Generator[Done, None, U]
# Either way is tried so many times for a size of batch before the faster one is kept.
_TRIES = 6
# Threads have to save so much of the time.
_GAIN = 0.95


class Together:
    """Has members work: in threads at the same time, or one beside the other in this thread.

    A member's work is a generator, which yields where it may be left for a while: those who wait for something wait at
    the same time in either way.

    Threads share torch's: with 4 of them, each of two members gets 2.

    Args:
        n: the number of members.
        parallel: whether they run at the same time; "auto" for what is faster where :meth:`measured` is called, and one
            after the other elsewhere. "auto" is False where torch has one thread or there is one member.

    Example:
        >>> def length(word):
        ...     yield
        ...     return len(word)
        >>> Together(2, True).map(length, ["a", "bc"])
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

    def map(
        self, work: Callable[[T], Work[U]], items: Sequence[T], pause: Callable[[], None] = lambda: None
    ) -> list[U]:
        """Return what the work on each item returns; it is done in threads if that is told.

        Args:
            work: begins the work on an item.
            items: the items.
            pause: called where work may be left for a while, if it is done in this thread.
        """
        return self._mapped(work, items, pause, in_threads=self.parallel is True)

    def measured(self, work: Callable[[T], Work[U]], items: Sequence[T], size: int) -> list[U]:
        """Return what the work on each item returns, done in the way that is faster for such a size of it, if "auto".

        Args:
            work: begins the work on an item, which takes about as long for the same items and equal sizes.
            items: those to which it is applied; they live as long as this.
            size: what the time depends on, such as the number of sequences; sizes between two powers of two count as
                one.
        """
        if self.parallel != "auto" or len(items) < 2:
            return self._mapped(work, items, in_threads=self.parallel is True)
        known = (*map(id, items), size.bit_length())
        if known in self._chosen:
            return self._mapped(work, items, in_threads=self._chosen[known])
        alone, threads = self._seconds[known]
        in_threads = len(threads) < len(alone)
        begun = time.perf_counter()
        found = self._mapped(work, items, in_threads=in_threads)
        (threads if in_threads else alone).append(time.perf_counter() - begun)
        if len(threads) == _TRIES:
            self._chosen[known] = median(threads) < _GAIN * median(alone)
        return found

    def _mapped(
        self,
        work: Callable[[Any], Work[U]],
        items: Sequence[Any],
        pause: Callable[[], None] = lambda: None,
        *,
        in_threads: bool,
    ) -> list[U]:
        if not in_threads:
            return by_turns(list(map(work, items)), pause)
        own, context = controllable()
        running = [self._pool.submit(context.copy().run, lambda item: finished(work(item)), item) for item in items]
        return outcomes(running, own)
