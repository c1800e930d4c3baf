"""What stands before replicas: it passes requests on, and outlives the replica that was writing an answer.

An application behind the relay runs in another process, and what it sends comes back one ASGI message at a time. Where
they stop coming because that process died, the relay ends the answer with the error object that clients know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from softmeet.server.asgi import unless_left
from softmeet.server.errors import ReplicaLostError, described, error_response
from softmeet.server.replies import LAST_EVENT, event

_SENT_ON = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip
_LOST = "the replica that was to answer has died: what came before is as it was; ask again"


class Relay:
    """An ASGI application that has its answers from elsewhere.

    Args:
        ask: gives for the scope and the body of a request the ASGI messages of its answer, as an asynchronous iterator
            with a method ``cancel``.
        lost: the exceptions which say that whoever was writing an answer has died.
    """

    def __init__(self, ask: Callable[[dict[str, Any], bytes], Any], lost: tuple[type[BaseException], ...]) -> None:
        self._ask, self._lost = ask, lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, and its answer back, until the client leaves."""
        if scope["type"] == "lifespan":
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
        if scope["type"] != "http":
            return
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        answer = self._ask({key: scope[key] for key in _SENT_ON if key in scope}, body)
        try:
            await unless_left(self._send(answer, scope, receive, send), receive)
        finally:
            answer.cancel()

    async def _send(self, answer: Any, scope: Scope, receive: Receive, send: Send) -> None:
        # The beginning waits for what follows, so that an answer without any can still become an error.
        start: Message | None = None
        begun = False
        try:
            async for message in answer:
                if start is None:
                    start = message
                    continue
                if not begun:
                    begun = True
                    await send(start)
                await send(message)
        except self._lost as error:
            lost = ReplicaLostError(_LOST)
            if not begun:
                await error_response(lost)(scope, receive, send)
            elif start and Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream"):
                end = (event(described(lost)[1]) + LAST_EVENT).encode()
                await send({"type": "http.response.body", "body": end, "more_body": False})
            else:
                raise lost from error
