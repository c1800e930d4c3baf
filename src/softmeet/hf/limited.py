"""A time limit for code that comes with a model, such as a chat template, which may never end."""

from __future__ import annotations

import ctypes
import faulthandler
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# When the process ends, for each context that is entered; by a key of its own.
_ends = dict[object, float]()
_ends_lock = threading.Lock()


class TookTooLongError(Exception):
    """The error that ends code in this thread whose time is over."""

    def __str__(self) -> str:
        """Return what happened."""
        return "it takes too long"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise :class:`TookTooLongError` in this thread once a context has taken so many seconds.

    Code of Python is ended between two of its steps. Within a single one, such as the power of a large number, nothing
    but the process can be ended: it is once twice the time is over, as all its threads may be waiting for that step.
    What they do is then written to the standard error output.

    Example:
        >>> with limited(10):
        ...     sum(range(10))
        45
    """
    own, lock, over = threading.get_ident(), threading.Lock(), threading.Event()

    def end() -> None:
        with lock:
            if not over.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(own), ctypes.py_object(TookTooLongError))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    _end_process(over, time.monotonic() + 2 * seconds)
    try:
        try:
            yield
        finally:
            with lock:
                over.set()
            timer.cancel()
    finally:  # even if the error above comes while the context is left
        _end_process(over, None)


def _end_process(key: object, when: float | None) -> None:
    """End the process at a time of the monotonic clock unless it is told None for the same key before."""
    with _ends_lock:
        _ends.pop(key, None)
        if when is not None:
            _ends[key] = when
        if _ends:
            left = max(round(min(_ends.values()) - time.monotonic(), 2), 0.01)
            faulthandler.dump_traceback_later(left, exit=True, file=2)
        else:
            faulthandler.cancel_dump_traceback_later()
