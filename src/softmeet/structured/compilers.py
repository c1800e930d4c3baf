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


class BusyCompilingError(SoftmeetError):
    """Raised if others' structures took all of the time in which one may be compiled."""


class _Compilers:
    """As many processes as grammars are compiled at once; they are started when they are needed, and kept."""

    def __init__(self) -> None:
        self._free, self._idle = threading.BoundedSemaphore(_AT_ONCE), list[subprocess.Popen[str]]()
        atexit.register(self._end)

    def objection(self, grammar: str) -> str:
        """Return why a grammar cannot be used, empty if it can."""
        if not self._free.acquire(timeout=_SECONDS):
            raise BusyCompilingError("other structures are being compiled: ask again later")
        try:
            return self._ask(self._idle.pop() if self._idle else _started(), grammar)
        finally:
            self._free.release()

    def _ask(self, process: subprocess.Popen[str], grammar: str) -> str:
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
            self._idle.append(process)
            return str(json.loads(answer))
        _end(process)
        took_long = time.monotonic() - started >= _SECONDS
        return f"it takes longer than {_SECONDS:g} seconds to compile" if took_long else "it takes too much memory"

    def _end(self) -> None:
        while self._idle:
            _end(self._idle.pop())


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


_compilers = _Compilers()


@lru_cache(maxsize=256)
def objection(grammar: str) -> str:
    """Return why a grammar cannot be used, empty if it can; the last answers are kept.

    Args:
        grammar: a grammar in llguidance's variant of Lark's syntax.

    Raises:
        BusyCompilingError: if others' grammars are being compiled for 1.6 seconds.
    """
    return _compilers.objection(grammar)
