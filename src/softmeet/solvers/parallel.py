"""Rows on several cores: compiled loops and library calls leave the interpreter free for one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    # One thread of the linear algebra library for each of ours: the pool already fills the cores.
    return ThreadPoolExecutor(threads, "softmeet", initializer=torch.set_num_threads, initargs=(1,))


def in_parallel(function: Callable[[A], B], arguments: Iterable[A], device: torch.device) -> list[B]:
    """``[function(x) for x in arguments]``, on a processor with as many threads as torch may use."""
    items, threads = list(arguments), torch.get_num_threads()
    if threads == 1 or len(items) < 2 or device.type != "cpu":
        return [function(x) for x in items]
    inference = torch.is_inference_mode_enabled()

    def run(x: A) -> B:
        with torch.inference_mode(inference):
            return function(x)

    return list(_pool(threads).map(run, items))
