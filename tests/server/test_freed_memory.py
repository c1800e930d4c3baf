"""Freed memory is kept for later use, and given back when asked; the server asks once a minute."""

import platform
import subprocess
import sys
import threading
from unittest.mock import MagicMock

import pytest

from softmeet import freed_memory
from softmeet.server import process

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc hands memory back so soon")

_FAULTS = """
import resource, numpy
from softmeet import freed_memory

def faults():
    for k in range(40):
        several = [numpy.ones(1 << 20) for _ in range(3)]
        if k == 9:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = faults()
freed_memory.keep()
print(faults(), fresh)
"""
_BURST = """
import numpy
from softmeet import freed_memory

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

freed_memory.keep()
before = megabytes()
burst = [numpy.ones(1 << 18) for _ in range(50)]
pinned = [bytes(300) for _ in range(1000)]  # At the end of the heap, so that what is before it does not shrink.
del burst
kept = megabytes() - before
freed_memory.give_back()
print(kept, megabytes() - before)
"""


def _printed(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return [float(x) for x in done.stdout.split()]


def test_freed_memory_is_kept():
    """Thirty times three vectors of 8 MiB: fresh pages each time, or none."""
    kept, fresh = _printed(_FAULTS)
    assert kept < 0.2 * fresh


def test_freed_memory_is_given_back():
    """Of 105 MB, freed in the middle of the heap."""
    kept, after = _printed(_BURST)
    assert kept > 90
    assert after < 0.2 * kept


def test_a_running_server_gives_freed_memory_back_again_and_again(monkeypatch):
    times, thrice = [], threading.Event()

    def noted():
        times.append(0)
        if len(times) == 3:
            thrice.set()

    class Server:
        def __init__(self, *arguments):
            pass

        def run(self, sockets):
            assert thrice.wait(60)

    monkeypatch.setattr(process, "_GIVE_BACK", 0.01)
    monkeypatch.setattr(freed_memory, "give_back", noted)
    for name in ("configuration", "_allow_files", "gc"):
        monkeypatch.setattr(process, name, MagicMock())
    monkeypatch.setattr(process, "_Server", Server)
    process.run(MagicMock(), [], 1.0, lambda: None, access_log=False)
    for thread in threading.enumerate():
        if thread.name == "freed memory":
            thread.join(60)
            assert not thread.is_alive()
