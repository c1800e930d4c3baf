"""The outermost layer of the server: API keys, the Host header, limits on bodies, and headers for security.

It is plain ASGI, so that streamed answers pass through it unbuffered.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softmeet.server.asgi import replay
from softmeet.server.errors import RequestError, error_response
from softmeet.server.metrics import Metrics

_OPEN = ("/health", "/ready")
# Uploads are refused: the page takes no files, and Gradio would write them to the disk.
_UPLOADS = "/ui/gradio_api/upload"
_COUNTED = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/ready", "/metrics")
# A body of at most this many times the limit is read to its end, since many clients read the refusal only then.
_DISCARDED = 16
_COMMON = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
# Gradio's page needs inline scripts and styles; nothing comes from, or goes to, another host.
_PAGE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
_NO_PAGE = "default-src 'none'; frame-ancestors 'none'"


@dataclass(frozen=True)
class Protection:
    """Who may send requests, and how large and slow their bodies may be.

    Args:
        keys: the valid API keys, one of which a request has to have, as ``Authorization: Bearer KEY`` or as the
            password of HTTP's basic scheme, except at /health and /ready; if empty, no key is needed.
        hosts: the names that a request's header ``Host`` may have, without port, case-sensitive; if empty, any name.
        max_body: the most bytes of a request's body.
        body_seconds: the most seconds until a body is complete.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body: int = 1 << 20
    body_seconds: float = 10.0


class Guard:
    """The outermost ASGI layer: it refuses requests without a key, with a wrong Host or a bad body, and counts answers.

    Args:
        app: the ASGI application behind it.
        protection: the keys, hosts and limits.
        metrics: every HTTP request that gets a response, refused or passed on, is counted in its ``requests``.
    """

    def __init__(self, app: ASGIApp, protection: Protection, metrics: Metrics) -> None:
        self.app, self.protection, self.metrics = app, protection, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and read its whole body; refuse it, or pass it on. Every answer gets security headers.

        A refusal is a response with an error object: status 400 for a body that is not JSON (under /v1/), 401 for a
        key, 404 for an upload to the page, 408 and 413 for a slow or large body, 415 for a content type, 421 for a
        Host. Nothing is sent if the client leaves before its body is complete. Exceptions of the application are not
        caught.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path if path in _COUNTED else "other", message["status"]).inc()
                headers = MutableHeaders(scope=message)
                headers.update(_COMMON)
                headers["Content-Security-Policy"] = _PAGE if path.startswith("/ui") else _NO_PAGE
            await send(message)

        try:
            self._check(path, Headers(scope=scope))
            body = await self._body(Request(scope, receive))
            if body and path.startswith("/v1/"):
                _check_json(body, Headers(scope=scope).get("content-type", ""))
        except RequestError as error:
            page = path == "/" or path.startswith("/ui")
            ask = {"WWW-Authenticate": 'Basic realm="softmeet"'} if error.status == 401 and page else {}
            # Close the connection: a part of the body may be unread, and would be taken for the next request.
            await error_response(error, {"Connection": "close"} | ask)(scope, receive, sending)
            return
        except ClientDisconnect:  # the client left before its whole body had come
            return
        await self.app(scope, replay(body, receive), sending)

    def _check(self, path: str, headers: Headers) -> None:
        """Raise RequestError if a request is an upload, or its Host or its key is not valid."""
        if path.startswith(_UPLOADS):
            raise RequestError("nothing can be uploaded here", status=404)
        host = re.sub(r":\d*$", "", headers.get("host", ""))
        if self.protection.hosts and host not in self.protection.hosts:
            raise RequestError(
                "this server does not answer to that Host: ask it by the address at which it listens, or start it with "
                "--allow-host and the name",
                status=421, code="unknown_host",
            )  # fmt: skip
        if self.protection.keys and path not in _OPEN and not _known(_given(headers), self.protection.keys):
            raise RequestError(
                "expected a valid API key as 'Authorization: Bearer KEY'", status=401, code="invalid_api_key"
            )

    async def _body(self, request: Request) -> bytes:
        """Return a request's whole body.

        Raises:
            RequestError: if the body has more than ``max_body`` bytes, or is not complete after ``body_seconds``
                seconds.
        """
        limit = self.protection.max_body
        too_large = RequestError(f"expected a body of at most {limit:,} bytes", status=413, code="body_too_large")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > _DISCARDED * limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.protection.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size <= limit:
                        parts.append(part)
                    elif size > _DISCARDED * limit:
                        break
        except TimeoutError:
            raise RequestError(
                f"expected the body within {self.protection.body_seconds:g} s", status=408, code="body_too_slow"
            ) from None
        if size > limit:
            raise too_large
        return b"".join(parts)


def _check_json(body: bytes, kind: str) -> None:
    """Raise RequestError if a body is not JSON in UTF-8, or if its content type is not JSON's.

    NaN, numbers out of range such as 1e400, lone surrogates and deep nesting, which Python's own parser accepts, are
    refused too.

    Args:
        body: the whole body.
        kind: the header ``Content-Type``. Others than JSON's are refused since browsers let pages of any origin send
            them.
    """
    try:
        from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"expected JSON in UTF-8 as the body: {error}"[:300], code="invalid_json") from None
    if not re.fullmatch(r"application/([\w.-]+\+)?json", kind.partition(";")[0].strip().lower()):
        raise RequestError(
            f"expected the header 'content-type: application/json', got {kind[:100] or 'none'}: add it, with curl by "
            "-H 'content-type: application/json'",
            status=415,
        )


def _given(headers: Headers) -> str:
    """Return the key that a request's headers give, or an empty string.

    It is a bearer token, or the password of HTTP's basic scheme, for which browsers show a dialog.
    """
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
    return ""


def _known(given: str, keys: Sequence[str]) -> bool:
    """Return whether a key is valid, in a time that depends on the contents of no valid key."""
    return sum(hmac.compare_digest(given.encode(), key.encode()) for key in keys) > 0
