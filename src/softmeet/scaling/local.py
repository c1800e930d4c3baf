"""The engine of this process: threads, each on cores of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from softmeet.scaling.base import Engine, Items

R = TypeVar("R")
T = TypeVar("T")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalEngine(Engine):
    """Calls run in threads: products and compiled loops release the interpreter.

    Ctrl-C begins no further call; those under way end, and are answered, before it is raised. A second one leaves them.

    Args:
        workers: threads; one runs every call in the caller's own, which Ctrl-C breaks off.
        threads: of torch, in each.
        on_stop: called with a sentence where Ctrl-C waits for calls.
    """

    def __init__(
        self, workers: int = 1, threads: int = 1, on_stop: Callable[[str], None] = lambda sentence: None
    ) -> None:
        self.workers, self.threads, self._on_stop = workers, threads, on_stop
        self._before = torch.get_num_threads()

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._before)

    def map(self, function: Callable[..., R], items: Items) -> Iterator[tuple[int, R]]:
        """As :meth:`Engine.map`."""
        if self.workers == 1:
            yield from ((k, function(*item)) for k, item in enumerate(items))
            return
        pool = ThreadPoolExecutor(self.workers, "softmeet", torch.set_num_threads, (self.threads,))
        patient = True
        try:
            yield from self._answers(lambda item: pool.submit(function, *item), items)
        except KeyboardInterrupt:  # nothing is under way, or nobody is to wait for it
            patient = False
            raise
        finally:
            pool.shutdown(wait=patient, cancel_futures=True)

    def _answers(self, submit: Callable[[tuple[Any, ...]], Future[R]], items: Items) -> Iterator[tuple[int, R]]:
        left: Iterator[tuple[int, tuple[Any, ...]]] = enumerate(items)
        running = dict[Future[R], int]()
        stopped: KeyboardInterrupt | None = None
        while True:
            while len(running) < self.workers and (found := next(left, None)) is not None:
                running[submit(found[1])] = found[0]
            if not running:
                break
            try:
                ended = wait(running, return_when=FIRST_COMPLETED).done
            except KeyboardInterrupt as stop:
                if stopped:
                    raise
                stopped, left = stop, iter(())
                self._on_stop("finishing what is under way; Ctrl-C again leaves it")
                continue
            for done in ended:
                yield running.pop(done), done.result()
        if stopped:
            raise stopped

    def keep(self, values: Sequence[T]) -> list[T]:
        """The values themselves."""
        return list(values)
