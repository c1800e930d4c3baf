"""What the C library does with memory that was freed: keep it for later use, or give it back to the operating system.

Combining makes and frees vectors over the vocabulary by the thousand; getting fresh pages for each takes longer than
the arithmetic. All functions speak to glibc, and do nothing where there is another C library.
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


class _Mallinfo2(ctypes.Structure):
    """What mallinfo2(3) returns: ten numbers, of which two are asked for."""

    _fields_ = (
        ("others", ctypes.c_size_t * 4), ("hblkhd", ctypes.c_size_t), ("more", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t), ("rest", ctypes.c_size_t * 2),
    )  # fmt: skip


def in_use() -> int | None:
    """Return how many bytes are allocated and not freed; None where the C library does not tell.

    A leak shows here first: resident memory also has what is free, which comes and goes by hundreds of megabytes.
    """
    if (mallinfo := _of_glibc("mallinfo2")) is None:
        return None
    mallinfo.restype = _Mallinfo2
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


def _of_glibc(name: str) -> Any:
    """Return a function of the C library that this process runs with; None if it has none of this name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
