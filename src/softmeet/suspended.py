"""Work as generators: it yields where it may be left for a while, and returns what it has found."""

from __future__ import annotations

from collections.abc import Callable, Generator
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
