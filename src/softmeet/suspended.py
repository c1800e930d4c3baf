"""Work as generators: it yields where it may be left for a while, and returns what it has found."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")


def finished(work: Generator[None, None, T], pause: Callable[[], object] = lambda: None) -> T:
    """Run a generator to its end, and return what it returns.

    Args:
        work: the generator.
        pause: called where it yields.

    Example:
        >>> def work():
        ...     yield
        ...     return 7
        ...
        >>> finished(work())
        7
    """
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        pause()


def by_turns(works: Sequence[Generator[None, None, T]], pause: Callable[[], object] = lambda: None) -> list[T]:
    """Run generators to their ends, each from one of its yields to the next in turn, and return what they return.

    If one raises an exception, the others are closed, and it is raised.

    Args:
        works: the generators.
        pause: called after each round in which one has yielded.

    Example:
        >>> def work(steps):
        ...     for _ in range(steps):
        ...         yield
        ...     return steps
        ...
        >>> by_turns([work(3), work(1)])
        [3, 1]
    """
    found, going = dict[int, T](), dict(enumerate(works))
    try:
        while going:
            for k, work in list(going.items()):
                try:
                    next(work)
                except StopIteration as done:
                    found[k] = done.value
                    del going[k]
            if going:
                pause()
    finally:
        for work in going.values():
            work.close()
    return list(map(found.__getitem__, range(len(works))))
