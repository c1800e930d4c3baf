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
_failure: ContextVar[Exception | None] = ContextVar("failure", default=None)


def time_is_over() -> bool:
    """Return whether the time that :func:`time_limit` allows is over; False if there is no limit.

    A loop that takes long asks between its steps, and then ends with the best that it has. Rules of users may ask, too.
    """
    return _over.get()()


def failed_to_say(error: Exception) -> bool:
    """Return whether ``error`` is what the function given to :func:`time_limit` raised when it was last asked."""
    return error is _failure.get()


@contextmanager
def time_limit(limit: float | Callable[[], bool]) -> Iterator[None]:
    """Enter a context in which solvers end soon after some time, with the best point that they have found by then.

    Rows that are not solved by then have the status BUDGET, and are answered no worse than by the pool. A step that has
    begun is finished, and averages, which are formulas, are not cut short. Within another limit, the one that is over
    first counts. It holds in this thread alone; ``Ensemble.stream`` takes it along. As with
    ``decimal.localcontext``, a generator should not be suspended within it: until it goes on, its caller has the limit.

    Args:
        limit: seconds from now, 0 or more; or a function that returns whether the time is over, which is called between
            steps and may do other work meanwhile. What it raises comes out of the call that asked, unchanged.

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
    outer, own = _over.get(), limit if callable(limit) else _after(limit)

    def over() -> bool:
        # What the function does is under the limits outside of this one, or it would be asked without end.
        asking = _over.set(outer)
        try:
            return own() or outer()
        except Exception as error:
            _failure.set(error)
            raise
        finally:
            _over.reset(asking)

    token, earlier = _over.set(over), _failure.set(None)
    try:
        yield
    finally:
        _over.reset(token)
        _failure.reset(earlier)


def _after(seconds: float) -> Callable[[], bool]:
    """Return a function that says whether so many seconds from now are over."""
    try:
        end = time.monotonic() + float(seconds)
        if not float(seconds) >= 0:
            raise ValueError("negative, or no number")
    except (TypeError, ValueError, OverflowError):
        shown = repr(seconds)[:40]
        raise InvalidInputError(f"expected a limit in seconds, from 0, or a function, got {shown}") from None
    return lambda: time.monotonic() >= end
