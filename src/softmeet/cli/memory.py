"""How the process of a command keeps its memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Of mallopt(3), glibc: free memory at the end of the heap that is kept, and what comes from the heap at all.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 1 << 30, 32 << 20


def keep_freed_memory() -> None:
    """Have freed memory used again at once instead of handed back to the system.

    Vectors over a large vocabulary come and go by the thousand, and fresh pages for each take longer than the
    arithmetic. Does nothing where the C library has no such settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, _KEPT)


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector, which would look through a million lasting objects time and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
