"""The engine of this process: threads, each on cores of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import takewhile
from typing import Any, TypeVar

import torch

from softmeet.scaling.base import Engine, Items
from softmeet.scaling.interrupts import deferred_interrupt

R = TypeVar("R")
T = TypeVar("T")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalEngine(Engine):
    """Calls run in threads: products and compiled loops release the interpreter.

    Args:
        workers: threads; one runs every call in the caller's own.
        threads: of torch, in each.
        on_stop: called with a sentence at Ctrl-C, which then begins no further call: those under way end, and are
            answered, before it is raised. A second one leaves them. None to raise the first one at once.
    """

    def __init__(self, workers: int = 1, threads: int = 1, *, on_stop: Callable[[str], None] | None = None) -> None:
        self.workers, self.threads, self._on_stop = workers, threads, on_stop

    def map(self, function: Callable[..., R], items: Items) -> Iterator[tuple[int, R]]:
        """As :meth:`Engine.map`."""
        with deferred_interrupt(self._on_stop) as interrupted:
            left = takewhile(lambda _: not interrupted(), enumerate(items))
            if self.workers == 1:
                yield from ((k, function(*item)) for k, item in left)
            else:
                yield from self._in_threads(function, left)
        if interrupted():
            raise KeyboardInterrupt

    def _in_threads(
        self, function: Callable[..., R], left: Iterator[tuple[int, tuple[Any, ...]]]
    ) -> Iterator[tuple[int, R]]:
        running, patient = dict[Future[R], int](), True
        pool = ThreadPoolExecutor(self.workers, "softmeet", torch.set_num_threads, (self.threads,))
        try:
            while True:
                while len(running) < self.workers and (found := next(left, None)) is not None:
                    running[pool.submit(function, *found[1])] = found[0]
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        except (KeyboardInterrupt, GeneratorExit):
            patient = False
            raise
        finally:
            pool.shutdown(wait=patient, cancel_futures=True)

    def keep(self, values: Sequence[T]) -> list[T]:
        """The values themselves."""
        return list(values)
