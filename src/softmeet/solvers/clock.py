"""The time that an answer may take: solvers ask between their steps whether it is over, and end with the best point.

The limit belongs to the calling context, as Python's own ``decimal.localcontext`` does, so that every loop that takes
long can ask for it without an argument that all functions in between would have to pass on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from softmeet.errors import InvalidInputError

_over: ContextVar[Callable[[], bool]] = ContextVar("time_is_over", default=lambda: False)


def time_is_over() -> bool:
    """Return whether the time that :func:`time_limit` allows is over; False if there is no limit.

    A loop that takes long asks between its steps, and then ends with the best that it has. Rules of users may ask, too.
    """
    return _over.get()()


@contextmanager
def time_limit(limit: float | Callable[[], bool]) -> Iterator[None]:
    """Enter a context in which solvers end soon after some time, with the best point that they have found by then.

    Rows that are not solved by then have the status BUDGET, and are answered no worse than by the pool. A step that has
    begun is finished, and averages, which are formulas, are not cut short. Within another limit, the one that is over
    first counts.

    Args:
        limit: seconds from now, 0 or more; or a function that returns whether the time is over, which is called between
            steps and may do other work meanwhile.

    Raises:
        InvalidInputError: if ``limit`` is neither a number from 0 nor a function.

    Example:
        >>> import torch
        >>> import softmeet
        >>> heads = [torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]]
        >>> members = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
        >>> with softmeet.time_limit(10.0):
        ...     solution = softmeet.combine(members, heads)
        >>> softmeet.Status(int(solution.status)).name
        'OPTIMAL'
    """
    outer = _over.get()
    if callable(limit):
        own = limit
    elif not isinstance(limit, int | float) or not limit >= 0:
        raise InvalidInputError(f"expected a limit in seconds, from 0, or a function, got {limit!r}")
    else:
        end = time.monotonic() + limit

        def own() -> bool:
            return time.monotonic() >= end

    token = _over.set(lambda: own() or outer())
    try:
        yield
    finally:
        _over.reset(token)
