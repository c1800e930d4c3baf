"""The outermost layer of the server: what stands around every answer, whoever wrote it, and what is noted about it.

It is plain ASGI, so that streamed answers pass through it unbuffered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softmeet.server.metrics import Metrics
from softmeet.server.security import Guard, Protection

ACCESS = logging.getLogger("softmeet.access")
_COUNTED = (
    "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize", "/version",
    "/health", "/ready", "/metrics",
)  # fmt: skip
_COMMON = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# The page's files are all that runs, and it asks nobody but this server.
_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_NO_PAGE = "default-src 'none'; frame-ancestors 'none'"
# What pages of other origins may read of an answer beside what every page may.
_EXPOSED = ("Retry-After", "X-Softmeet-Replica")


def guarded(app: ASGIApp, protection: Protection, metrics: Metrics, origins: Sequence[str] = ()) -> ASGIApp:
    """Return an application behind all that stands before it: the envelope, then CORS, then the guard.

    Browsers ask without a key whether a page of another origin may send a request with one (a preflight), so CORS
    answers before the guard does; and it lets such a page read refusals, too.

    Args:
        app: the ASGI application.
        protection: the keys, hosts and limits of requests.
        metrics: counts answers.
        origins: the origins, such as ``https://example.org``, whose pages may send requests.
    """
    inner: ASGIApp = Guard(app, protection)
    if origins:
        # Which headers an allowed page sends is not ours to say: OpenAI's client for JavaScript sends a dozen.
        inner = CORSMiddleware(
            inner, allow_origins=list(origins), allow_methods=["GET", "HEAD", "POST"], allow_headers=["*"],
            expose_headers=_EXPOSED,
        )  # fmt: skip
    return Envelope(inner, metrics)


class Envelope:
    """The outermost ASGI layer: it puts headers for security on every answer, counts it, and writes the access log.

    The logger ``softmeet.access`` gets, at level INFO, one line for each request once its answer has ended: method,
    path without query, status, seconds, and the model that answered, or ``-``; of a text that was written the tokens of
    its prompts and its own, and the seconds to the first. The status is 499 if the client left before an answer began.

    Args:
        app: the ASGI application behind it.
        metrics: every HTTP request that gets a response is counted in its ``requests``.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, and its answer back. Exceptions of the application are not caught."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, started, status = scope["path"], time.perf_counter(), 499

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.metrics.requests.labels(path if path in _COUNTED else "other", status).inc()
                headers = MutableHeaders(scope=message)
                headers.update(_COMMON)
                headers["Content-Security-Policy"] = _PAGE if path.startswith("/ui") else _NO_PAGE
                if path.startswith("/ui"):
                    headers["Cache-Control"] = "no-cache"  # another version may be served next
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            # As it was sent, percent-encoded: a decoded path may hold the end of a line.
            raw = scope.get("raw_path", path.encode()).decode("ascii", "replace")[:200]
            state, seconds = scope.get("state", {}), time.perf_counter() - started
            told = f"{state['model']} {state['answer'].counts}" if "answer" in state else state.get("model", "-")
            ACCESS.info("%s %s %d %.3f %s", scope["method"], raw, status, seconds, told)
