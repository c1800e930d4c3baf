"""Helpers for ASGI: replay a body that was read, cancel work for a client that left.

In ASGI an application is called as ``app(scope, receive, send)``: it awaits ``receive()`` for the client's messages and
``send(message)`` for each message of its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Message, Receive

T = TypeVar("T")
# Turns of the event loop in which a client that has left becomes known.
_TURNS = 3


def replay(body: bytes, then: Receive) -> Receive:
    """Return an ASGI ``receive`` for a request whose body has been read already.

    Args:
        body: the request's whole body, which the first call gives in one ``http.request`` message.
        then: the original ``receive``, to which every later call is passed on; it reports that the client has left.
    """
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        return next(messages, None) or await then()

    return receive


async def unless_left(work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """Run a coroutine for a client and return its result; if the client leaves before, cancel it and return None.

    Args:
        work: the coroutine; an exception that it raises is raised here.
        receive: the request's ASGI ``receive``. Messages before ``http.disconnect`` are read and dropped, so the body
            has to have been read before.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        # Wait for both to end; how the one that was not waited for ends (cancelled, or by an error) does not matter.
        await asyncio.gather(task, gone, return_exceptions=True)


async def has_left(receive: Receive) -> bool:
    """Return whether a client is known to have disconnected, whose body has been read before."""
    gone = asyncio.ensure_future(_left(receive))
    # The end of a connection is read in the turn of the loop behind that of its last bytes, and told in the next.
    for _ in range(_TURNS):
        await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait({gone})
    return not gone.cancelled()


async def _left(receive: Receive) -> None:
    """Return as soon as the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
