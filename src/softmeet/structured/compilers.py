"""Processes that compile grammars, so that one which takes for ever can be ended, and harms nobody by its memory."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from softmeet.errors import InvalidInputError, SoftmeetError

# The seconds that a grammar may take, and how many are compiled at once; each takes a core.
_SECONDS, _AT_ONCE = 1.6, 2
# Those are the processes that wait for one; they are started when they are needed, and kept.
_free, _idle = threading.BoundedSemaphore(_AT_ONCE), list[subprocess.Popen[str]]()


class BusyCompilingError(SoftmeetError):
    """Raised if others' structures took all of the time in which one may be compiled."""


def _ask(process: subprocess.Popen[str], grammar: str) -> str:
    """Have a process compile a grammar; return why it cannot be used, empty if it can."""
    assert process.stdin is not None
    assert process.stdout is not None
    started, late = time.monotonic(), threading.Timer(_SECONDS, process.kill)
    late.start()
    with suppress(OSError):
        process.stdin.write(json.dumps(grammar) + "\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    late.cancel()
    if answer:
        _idle.append(process)
        return str(json.loads(answer))
    _end(process)
    took_long = time.monotonic() - started >= _SECONDS
    return f"it takes longer than {_SECONDS:g} seconds to compile" if took_long else "it takes too much memory"


def _started() -> subprocess.Popen[str]:
    """Start a process that compiles grammars, and wait until it is ready."""
    program = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
    process = subprocess.Popen(  # noqa: S603
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        encoding="utf-8", start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    if not process.stdout.readline():
        _end(process)
        raise InvalidInputError("the process that compiles structures did not start: is llguidance installed well?")
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@atexit.register
def _end_all() -> None:
    while _idle:
        _end(_idle.pop())


@lru_cache(maxsize=256)
def objection(grammar: str) -> str:
    """Return why a grammar cannot be used, empty if it can; the last answers are kept.

    Args:
        grammar: a grammar in llguidance's variant of Lark's syntax.

    Raises:
        BusyCompilingError: if others' grammars are being compiled for 1.6 seconds.
    """
    if not _free.acquire(timeout=_SECONDS):
        raise BusyCompilingError("other structures are being compiled: ask again later")
    try:
        return _ask(_idle.pop() if _idle else _started(), grammar)
    finally:
        _free.release()
