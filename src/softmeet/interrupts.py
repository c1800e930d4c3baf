"""Ctrl-C that comes where its exception is lost: in a callback of compiled code, or in an import that makes another."""

from __future__ import annotations

import signal
import threading
from typing import Any

_came = threading.Event()


def note() -> None:
    """Have Ctrl-C noted from now on, beside the KeyboardInterrupt that it raises; one that is ignored stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _heard)


def raises() -> bool:
    """Return whether Ctrl-C raises KeyboardInterrupt: nothing else handles or ignores it."""
    return signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _heard)


def _heard(number: int, frame: Any) -> None:
    """Handle the signal."""
    _came.set()
    raise KeyboardInterrupt


def came() -> bool:
    """Return whether Ctrl-C has come."""
    return _came.is_set()


def check() -> None:
    """Raise KeyboardInterrupt in the main thread, which is where it would have been raised, if Ctrl-C has come."""
    if came() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
