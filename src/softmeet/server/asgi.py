"""What several layers need of ASGI: a body that was read already, and an end to work whose client has left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Message, Receive

T = TypeVar("T")


def replay(body: bytes, then: Receive) -> Receive:
    """The messages of a request whose body is known, and after it those of ``then``."""
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            return await then()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def unless_left(work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """What some work comes to; None if the client leaves before, and the work is given up."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        # Nobody reads what is left: how it ends, which is the engine's way to cancel, is no error.
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
