"""The engine that runs calls in threads of this process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from itertools import takewhile
from types import FrameType
from typing import Any

import torch

from softmeet.scaling.base import Engine, Items, R, T
from softmeet.suspended import interrupts_raise


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _deferred_interrupt(on_first: Callable[[str], None] | None) -> Iterator[Callable[[], bool]]:
    """Note a first Ctrl-C instead of raising it, and raise a second one; yields a function that tells if one has come.

    Nothing changes outside of the main thread, or if something else handles Ctrl-C.

    Args:
        on_first: called with a sentence to show at the first Ctrl-C; None to change nothing.
    """
    came = False
    here = threading.current_thread() is threading.main_thread()
    if on_first is None or not here or not interrupts_raise():
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True
        on_first("finishing what is under way; Ctrl-C again leaves it")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


class LocalEngine(Engine):
    """The engine that runs calls in threads of this process; compiled code in them, such as torch's, runs in parallel.

    Args:
        workers: the number of threads; with 1, calls run in the caller's own thread.
        threads: the number of torch's threads in each.
        on_stop: called with a sentence to show, on the main thread, at a first Ctrl-C during :meth:`map`. No further
            call begins then; running calls finish and their results are yielded before ``KeyboardInterrupt`` is raised.
            A second Ctrl-C raises ``KeyboardInterrupt`` at once. With None the first one does. Ignored if ``map`` runs
            outside the main thread, or if the program handles Ctrl-C in another way.
    """

    def __init__(self, workers: int = 1, threads: int = 1, *, on_stop: Callable[[str], None] | None = None) -> None:
        self.workers, self.threads, self._on_stop = workers, threads, on_stop

    def map(self, function: Callable[..., R], items: Items) -> Iterator[tuple[int, R]]:
        """Call ``function(*item)`` for each item; yield (index, result) as calls finish, as in :meth:`Engine.map`.

        Raises:
            KeyboardInterrupt: if Ctrl-C came; with ``on_stop``, after the results of the running calls.
        """
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
        """Run calls in a pool of threads; abandon the running ones if Ctrl-C or the caller stops the map."""
        running, patient = dict[Future[R], int](), True
        pool = ThreadPoolExecutor(self.workers, "softmeet", torch.set_num_threads, (self.threads,))
        try:
            while True:
                while len(running) < self.workers and (found := next(left, None)) is not None:
                    running[pool.submit(copy_context().run, function, *found[1])] = found[0]
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
        """Return the values themselves: threads share them, with all changes that calls make to them."""
        return list(values)
