"""Ctrl-C that waits for what is under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self


class DeferredInterrupt:
    """A context in which a first Ctrl-C is noted, and a second one is raised at once.

    Where Ctrl-C is not the main thread's to handle, or is handled in another way already, nothing changes.

    Args:
        on_first: called with a sentence; None to change nothing.

    Attributes:
        came: whether there was a first one.
    """

    def __init__(self, on_first: Callable[[str], None] | None) -> None:
        self._on_first, self._ours, self.came = on_first, False, False

    def __enter__(self) -> Self:
        here = threading.current_thread() is threading.main_thread()
        free = here and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._ours = free and self._on_first is not None
        if self._ours:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came or self._on_first is None:
            raise KeyboardInterrupt
        self.came = True
        self._on_first("finishing what is under way; Ctrl-C again leaves it")
