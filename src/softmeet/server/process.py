"""A server in this process, from its start until a signal ends it; its answers end before their connections do."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from softmeet import freed_memory
from softmeet.server.app import create_app
from softmeet.server.envelope import ACCESS
from softmeet.server.serving import Serving

_log = logging.getLogger("softmeet.server")
# The most bytes of a request line and its headers, as servers commonly have it.
_MOST_HEAD = 1 << 16
# Seconds that connections have to close once their answers have ended.
_LAST = 3.0
# Open files beside connections: those of models, libraries and logs.
_FILES = 512
# Seconds after which freed memory is given back to the system, again and again.
_GIVE_BACK = 60.0


def configuration(serving: Serving, **options: Any) -> uvicorn.Config:
    """Return the configuration of a uvicorn server for a server's application, with its bounds.

    Args:
        serving: the ensembles, their batcher, and the settings.
        options: further arguments of ``uvicorn.Config``, such as ``port``.
    """
    return uvicorn.Config(
        create_app(serving),
        http="h11",  # httptools would take headers of any length
        h11_max_incomplete_event_size=_MOST_HEAD,
        # uvicorn counts the connection that asks, too.
        limit_concurrency=serving.settings.protection.connections + 1,
        ws="none",  # nothing here speaks WebSocket
        access_log=False,  # it would hold queries
        server_header=False,
        **options,
    )


def run(
    serving: Serving, sockets: list[socket.socket], grace: float, announce: Callable[[], None], *, access_log: bool
) -> None:
    """Serve until SIGINT or SIGTERM; then raise the signal again, whose ordinary effect may be KeyboardInterrupt.

    Args:
        serving: the ensembles and settings.
        sockets: those that listen.
        grace: seconds that running answers have to end after a first signal; a second one ends them at once.
        announce: called once requests are answered.
        access_log: whether a line for each request is written to stderr.
    """
    if access_log:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        ACCESS.addHandler(handler)
        ACCESS.setLevel(logging.INFO)
        ACCESS.propagate = False
    # What is loaded stays: the garbage collector need not look through it whenever a request makes many objects.
    gc.collect()
    gc.freeze()
    _allow_files(serving.settings.protection.connections + _FILES)
    # uvicorn would end what is left with tracebacks; by then nothing is.
    config = configuration(serving, log_level="info", timeout_graceful_shutdown=int(grace + 2 * _LAST) + 1)
    ended = threading.Event()
    threading.Thread(target=_give_back, args=(ended,), name="freed memory", daemon=True).start()
    try:
        _Server(config, serving, grace, announce).run(sockets)
    finally:
        ended.set()


def _give_back(ended: threading.Event) -> None:
    """Give freed memory back to the system once a minute, so that a burst of requests does not count for ever."""
    while not ended.wait(_GIVE_BACK):
        freed_memory.give_back()


def _allow_files(number: int) -> None:
    """Let this process have so many files open, if the system lets it: each connection is one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Server(uvicorn.Server):
    """A server whose answers end at a signal, after some grace, and whose connections do soon afterwards."""

    def __init__(self, config: uvicorn.Config, serving: Serving, grace: float, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._serving, self._grace, self._announce = serving, grace, announce
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, and then say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End answers with grace at the first signal, at once at a second, and whatever is left at a third."""
        signals = len(self._captured_signals)
        if signals < 2:
            grace = 0 if signals else self._grace
            self._serving.batcher.close(grace)
            if grace and self.server_state.tasks:
                _log.warning("answers that are being written have %g s more: a second signal ends them now", grace)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.call_later, grace + _LAST, self._cut)
        if signals == 1:
            # All that uvicorn would do, but for cancelling answers before their last words.
            self._captured_signals.append(sig)
        else:
            super().handle_exit(sig, frame)

    def _cut(self) -> None:
        """Cut what is left: clients that do not read, or have not sent all of a request, and servers of members."""
        for reader in self._serving.batcher.readers.values():
            reader.abort()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
