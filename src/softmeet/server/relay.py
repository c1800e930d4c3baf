"""The relay in front of replicas: it passes requests on to them, and ends an answer properly if its replica dies.

The application behind the relay runs in another process and sends back its answer one ASGI message at a time. If the
messages stop because that process died, the relay ends the answer with an error object: as the whole response if
nothing was sent yet, as a last event in a stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from softmeet.server.asgi import unless_left
from softmeet.server.errors import ReplicaLostError, described, error_response
from softmeet.server.events import LAST_EVENT, event

_SENT_ON = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip
_LOST = "the replica that was to answer has died: what came before is as it was; ask again"


class Relay:
    """An ASGI application without models, which passes each request to another process and its answer back.

    Args:
        ask: called once for each HTTP request, with the serialisable part of its ASGI scope and its whole body; it
            returns at once, with the ASGI messages of the answer as an asynchronous iterator that also has a method
            ``cancel()``, not a coroutine, which is called in the end, even if all messages have come.
        lost: the exception types of that iterator which mean that the process writing the answer has died, or that
            there is none.
    """

    def __init__(self, ask: Callable[[dict[str, Any], bytes], Any], lost: tuple[type[BaseException], ...]) -> None:
        self._ask, self._lost = ask, lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, and its answer back, until the answer ends or the client leaves.

        Raises:
            ReplicaLostError: if the other process dies amid an answer that is no stream of events, so that the
                connection has to break.
        """
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
        """Send an answer's messages to the client, and an error response or a last event if the other process dies."""
        # The start message is held back until the first message after it, so that until then an error can be sent.
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
