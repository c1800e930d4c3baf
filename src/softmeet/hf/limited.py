"""A time limit for code that comes with a model, such as a chat template, which may never end."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TookTooLongError(Exception):
    """The error that ends code in this thread whose time is over."""

    def __str__(self) -> str:
        """Return what happened."""
        return "it takes too long"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise :class:`TookTooLongError` in this thread once a context has taken so many seconds.

    Code of Python is ended between two of its steps; a single call of a compiled library is waited for.

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
    try:
        yield
    finally:
        with lock:
            over.set()
        timer.cancel()
