"""The guard before the application: API keys, the Host header, and limits on bodies.

It is plain ASGI, so that streamed answers pass through it unbuffered.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import re
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from softmeet.server.asgi import has_left, replay, unless_left
from softmeet.server.errors import BusyError, RequestError, error_response

# What needs no key: the page is the same for all, and asks for a key itself.
_OPEN = re.compile(r"/(health|ready|ui(/.*)?)?")
# Paths whose bodies have to be JSON.
_JSON = ("/v1/", "/api/", "/tokenize", "/detokenize")
# A body of at most this many times the limit is read to its end, since many clients read the refusal only then.
_DISCARDED = 16
# A name or an address, with or without a port; RFC 9110 has Host so.
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s\[\]:/@?#]+)(?::\d*)?", re.IGNORECASE)
# Bodies of more bytes take turns, each for as long as it takes at so many bytes a second.
LARGE, _RATE = 1 << 15, 2e6
# How many wait at most.
_MOST = 64


@dataclass(frozen=True)
class Protection:
    """Who may send requests, and how large and slow these may be; how many connections there are.

    Args:
        keys: the valid API keys, one of which a request has to have, as ``Authorization: Bearer KEY`` or as the
            password of HTTP's basic scheme, except at /, /ui, /health and /ready; if empty, no key is needed.
        hosts: the names that a request's header ``Host`` may have, without port, in any case; if empty, any name.
        max_body: the most bytes of a request's body.
        body_seconds: the most seconds until a body is complete.
        connections: the most connections that are open at once.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body: int = 1 << 20
    body_seconds: float = 10.0
    connections: int = 1024


class Guard:
    """An ASGI layer that refuses requests without a key, with a wrong Host or with a bad body.

    Args:
        app: the ASGI application behind it.
        protection: the keys, hosts and limits.
    """

    def __init__(self, app: ASGIApp, protection: Protection) -> None:
        self.app, self.protection = app, protection
        self._keys = [form for key in protection.keys for form in _forms(key)]
        self._hosts = {host.lower() for host in protection.hosts}
        self._large = LargeBodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and read its whole body; refuse it, or pass it on. HEAD is answered wherever GET is.

        A refusal is a response with an error object: status 400 for a body that has to be JSON and is not, or no proper
        Host, 401 for a key, 408 and 413 for a slow or large body, 415 for a content type, 421 for a Host. Nothing is
        sent if the client leaves before its body is complete. Exceptions of the application are not caught.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        try:
            self._check(path, Headers(scope=scope))
            body = await self._body(Request(scope, receive))
            if body and await has_left(receive):
                return
            if body and path.startswith(_JSON):
                _check_json(body, Headers(scope=scope).get("content-type", ""))
        except (RequestError, BusyError) as error:
            # Close the connection: a part of the body may be unread, and would be taken for the next request.
            await error_response(error, {"Connection": "close"}, path)(scope, receive, send)
            return
        except ClientDisconnect:  # the client left before its whole body had come
            return
        # The server in front sends the header alone in answer to HEAD.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        await self.app(inner, replay(body, receive), send)

    def _check(self, path: str, headers: Headers) -> None:
        """Raise RequestError if the Host or the key is not valid."""
        self._check_host(headers.getlist("host"))
        if self._keys and not _OPEN.fullmatch(path) and not _known(_given(headers), self._keys):
            raise RequestError(
                "expected a valid API key as 'Authorization: Bearer KEY'", status=401, code="invalid_api_key"
            )

    def _check_host(self, given: list[str]) -> None:
        """Raise RequestError if a request has several headers ``Host``, or one that is malformed or not allowed."""
        found = [_HOST.fullmatch(host) for host in given]
        if len(given) > 1 or not all(found):
            raise RequestError("expected one header Host, with a name or an address", code="invalid_host")
        host = found[0][1].lower() if found and found[0] else ""
        if self._hosts and host not in self._hosts:
            raise RequestError(
                "this server does not answer to that Host: ask it by the address at which it listens, or start it with "
                "--allow-host and the name",
                status=421, code="unknown_host",
            )  # fmt: skip

    async def _body(self, request: Request) -> bytes:
        """Return a request's whole body.

        Raises:
            RequestError: if the body has more than ``max_body`` bytes, or is not complete after ``body_seconds``
                seconds.
            BusyError: if too many large bodies wait.
            ClientDisconnect: if the client leaves before.
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
        if size > LARGE and not await unless_left(self._large.turn(size), request.receive):
            raise ClientDisconnect
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


def _given(headers: Headers) -> bytes:
    """Return the key that a request's headers give, as it was sent, or nothing.

    It is a bearer token, or the password of HTTP's basic scheme, for which browsers show a dialog.
    """
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")  # as which headers are decoded
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(value, validate=True).partition(b":")[2]
    return b""


def _forms(key: str) -> list[bytes]:
    """Return a key as clients send it: in UTF-8, or, as some libraries do where they can, in Latin-1."""
    found = [key.encode()]
    with contextlib.suppress(UnicodeEncodeError):
        found.append(key.encode("latin-1"))
    return found


def _known(given: bytes, keys: Sequence[bytes]) -> bool:
    """Return whether a key is valid, in a time that depends on the contents of no valid key."""
    return sum(hmac.compare_digest(given, key) for key in keys) > 0


class LargeBodies:
    """The large bodies that wait for their turn, the shortest first."""

    def __init__(self) -> None:
        self._waiting, self._taken = list[tuple[int, int, asyncio.Future[bool]]](), False
        self._numbers = count()

    async def turn(self, size: int) -> bool:
        """Wait until a body of so many bytes may be parsed, then return True; cancelled, it gives its place up.

        Raises:
            BusyError: if too many wait, and it is the longest of them.
        """
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        one = size, next(self._numbers), turn
        insort(self._waiting, one)
        if len(self._waiting) > _MOST:
            *_, last = self._waiting.pop()
            last.set_exception(BusyError(f"expected at most {_MOST} large bodies at once: ask again later, or less"))
        self._begin()
        try:
            return await turn
        finally:
            if one in self._waiting:
                self._waiting.remove(one)

    def _begin(self) -> None:
        while self._waiting and not self._taken:
            size, _, first = self._waiting.pop(0)
            if not first.done():  # else its client has just left
                self._taken = True
                first.set_result(True)
                asyncio.get_running_loop().call_later(size / _RATE, self._end)

    def _end(self) -> None:
        self._taken = False
        self._begin()
