"""The interface of engines: a parallel ``map`` whose results do not depend on where the calls ran.

Callers cut work into the same items for every engine, each call has the same number of threads, and callers put results
together in the order of the items; so results are equal to the last bit on processors of one kind.
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
    """An engine: a parallel ``map`` of a function over items, run by workers, which are threads or processes.

    It is used as a context manager: :meth:`map` and :meth:`keep` are called inside ``with engine:``.

    Attributes:
        threads: the number of torch's threads in each call, and in the caller until the context is left.
    """

    threads: int

    @abstractmethod
    def map(self, function: Callable[..., R], items: Items) -> Iterator[tuple[int, R]]:
        """Call ``function(*item)`` for each item, and yield (index of the item, result) as calls finish, in any order.

        To be called inside the engine's context. No more calls run at once than there are workers, and items are drawn
        from the iterable, on the caller's thread, only as workers need them.

        Args:
            function: a function at the top level of a module, so that other processes can import it; it keeps no state
                that another call could see.
            items: the tuple of arguments of each call; they and the results have to be picklable by cloudpickle if
                workers are processes.

        Raises:
            Exception: if a call raised one: that exception, when its result would have been yielded.
        """

    @abstractmethod
    def keep(self, values: Sequence[T]) -> list[T]:
        """Return a stand-in for each value, in order, to be put into the items of any number of later ``map`` calls.

        To be called inside the engine's context. The called function gets the value itself. Threads share it; a worker
        process holds a copy, with all changes that calls make to it, from the first call that needs it until
        :meth:`keep` is called again.
        """

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        return self

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._before)
