"""How long a thread keeps Python's lock while another one waits for it.

The batcher's thread gives up that lock at every operation of torch. Beside a busy thread, which writes a long answer or
answers many requests, it waits that often until it gets the lock back, by default five milliseconds each time. Short
turns at all times would cost averages a tenth of their rate, as the event loop has much to do for many sequences.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Hashable

# Seconds after which a thread that waits for Python's lock gets it.
_SHORT = 1e-4
# Up to so many running sequences turns are short.
_FEW = 4


class TurnsAtLock:
    """The turns of a process's threads at Python's lock, short as long as anybody wants them short."""

    def __init__(self) -> None:
        self._lock, self._wanted, self._usual = threading.Lock(), set[Hashable](), sys.getswitchinterval()

    def _want(self, who: Hashable, *, short: bool) -> None:
        with self._lock:
            before = bool(self._wanted)
            (self._wanted.add if short else self._wanted.discard)(who)
            if before != bool(self._wanted):
                self._usual = self._usual if before else sys.getswitchinterval()
                sys.setswitchinterval(_SHORT if self._wanted else self._usual)

    def beside(self, rows: int, who: Hashable) -> None:
        """Choose turns by the number of running sequences of a batcher, ``who``."""
        if (0 < rows <= _FEW) != (who in self._wanted):
            self._want(who, short=0 < rows <= _FEW)

    async def written(self, write: Callable[[], str]) -> str:
        """Call a function that may take seconds to write a text, in a thread of its own, and return the text."""

        def work() -> str:
            mine = object()
            self._want(mine, short=True)
            try:
                return write()
            finally:
                self._want(mine, short=False)

        return await asyncio.to_thread(work)


TURNS_AT_LOCK = TurnsAtLock()
