"""The engine of this process: threads, each on cores of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import takewhile
from types import FrameType
from typing import Any

import torch

from softmeet.scaling.base import Engine, Items, R, T


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _deferred_interrupt(on_first: Callable[[str], None] | None) -> Iterator[Callable[[], bool]]:
    """Note a first Ctrl-C instead of raising it, and raise a second one at once; gives a call that says if one came.

    Where Ctrl-C is not the main thread's to handle, or is handled in another way already, nothing changes.

    Args:
        on_first: called with a sentence; None to change nothing.
    """
    came = False
    here = threading.current_thread() is threading.main_thread()
    if on_first is None or not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True
        on_first("finishing what is under way; Ctrl-C again leaves it")

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class LocalEngine(Engine):
    """Runs calls in threads of this process: products and compiled loops release the interpreter.

    Args:
        workers: threads; one runs every call in the caller's own.
        threads: of torch, in each.
        on_stop: called with a sentence at Ctrl-C, which then begins no further call: those under way end, and are
            answered, before it is raised. A second one leaves them. None to raise the first one at once.
    """

    def __init__(self, workers: int = 1, threads: int = 1, *, on_stop: Callable[[str], None] | None = None) -> None:
        self.workers, self.threads, self._on_stop = workers, threads, on_stop

    def map(self, function: Callable[..., R], items: Items) -> Iterator[tuple[int, R]]:
        """Run calls as :meth:`Engine.map` says."""
        with _deferred_interrupt(self._on_stop) as interrupted:
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
        """Return the values themselves: threads share them."""
        return list(values)
