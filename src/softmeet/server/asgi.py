"""What several layers need of ASGI: bodies that were read already, and an end to work whose client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive

T = TypeVar("T")


def replay(body: bytes, then: Receive) -> Receive:
    """Return what receives the messages of a request whose body is known, and after it those of ``then``."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        return next(messages, None) or await then()

    return receive


async def run(app: ASGIApp, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
    """Yield the messages that an application sends for one request; leaving the iteration is leaving as a client."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()

    async def leave() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    task = asyncio.ensure_future(app(scope, replay(body, leave), messages.put))
    task.add_done_callback(lambda done: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            yield message
        await task
    finally:
        gone.set()


async def unless_left(work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """Return the result of some work; None if the client leaves before it is done, and the work is cancelled.

    Args:
        work: what is to be done for the client.
        receive: gives the client's messages, of which the last says that it has left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        # Nobody reads what is left: how it ends, which may be by being cancelled, is no error.
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
