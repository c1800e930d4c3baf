"""Ctrl-C that waits for what is under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt(on_first: Callable[[str], None] | None) -> Iterator[Callable[[], bool]]:
    """A context in which a first Ctrl-C is noted, and a second one is raised at once; it gives whether there was one.

    Where Ctrl-C is not the main thread's to handle, or is handled in another way already, nothing changes.

    Args:
        on_first: called with a sentence; None to change nothing.
    """
    came = False
    here = threading.current_thread() is threading.main_thread()
    if on_first is None or not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True
        on_first("finishing what is under way; Ctrl-C again leaves it")

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
