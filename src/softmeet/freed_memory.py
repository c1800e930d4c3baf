"""What the C library does with memory that was freed: keep it for later use, or give it back to the operating system.

Combining makes and frees vectors over the vocabulary by the thousand; getting fresh pages for each takes longer than
the arithmetic. Both functions speak to glibc, and do nothing where there is another C library.
"""

from __future__ import annotations

import ctypes
from typing import Any

# Parameters of glibc's mallopt(3), and their values in bytes: how much free memory at the heap's end is kept, and up
# to which size a block comes from the heap.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT, _LARGEST = 1 << 30, 32 << 20


def keep() -> None:
    """Keep what is freed from now on, instead of giving it back at once, up to 1 GiB."""
    if mallopt := _of_glibc("mallopt"):
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _KEPT)
        # Those of other threads than the first return memory in pieces of 64 MiB, whatever the threshold.
        mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Give back all that is free now: a burst of work leaves a process no larger than what is in use requires."""
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _of_glibc(name: str) -> Any:
    """Return a function of the C library that this process runs with; None if it has none of this name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
