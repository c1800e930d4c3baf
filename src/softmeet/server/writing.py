"""Writing long texts beside the batcher, which must not wait for it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds after which a thread that waits for Python's lock gets it.
_SHORT = 1e-4


class Writer:
    """Threads that write texts; while there are any, threads take short turns at Python's lock.

    The batcher's thread gives up that lock at every operation of torch. Beside a busy thread it waits that often until
    it gets the lock back, by default five milliseconds each time. Short turns at all times would cost averages a tenth
    of their rate.
    """

    def __init__(self) -> None:
        self._lock, self._busy, self._usual = threading.Lock(), 0, 0.0

    async def written(self, write: Callable[[], str]) -> str:
        """Call a function that may take seconds to write a text, in a thread of its own, and return the text."""

        def work() -> str:
            with self._short_turns():
                return write()

        return await asyncio.to_thread(work)

    @contextmanager
    def _short_turns(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
            if self._busy == 1:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(_SHORT)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
                if not self._busy:
                    sys.setswitchinterval(self._usual)


WRITER = Writer()
