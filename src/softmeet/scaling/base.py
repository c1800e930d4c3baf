"""An engine: a ``map`` whose answers do not depend on where it ran.

What is mapped is cut the same way for every engine, runs with the same number of threads, and is put together by the
caller in the order of the items; so results are the same to the last bit on processors of one kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar

import torch

R = TypeVar("R")
T = TypeVar("T")
Items = Iterable[tuple[Any, ...]]


class Engine(ABC):
    """Maps a function over items, as a context manager inside of which torch has ``threads`` threads."""

    threads: int

    @abstractmethod
    def map(self, function: Callable[..., R], items: Items) -> Iterator[tuple[int, R]]:
        """Yield (k, ``function(*item)`` of the k-th item), in the order in which they are done.

        Items are taken from the iterable as there is room: no more are under way than there are workers.

        Args:
            function: of a module, so that other processes find it; it keeps no state that another call could see.
            items: the arguments of each call.

        Raises:
            Exception: what a call raised.
        """

    @abstractmethod
    def keep(self, values: Sequence[T]) -> list[T]:
        """Return stand-ins for values, to be used in their place in the items of several ``map``.

        A worker that has met one keeps the value, with whatever calls have stored in it, until the next ``keep``.
        """

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        return self

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._before)
