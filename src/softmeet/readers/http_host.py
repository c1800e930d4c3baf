"""A host that is asked by JSON over HTTP, patiently but not for ever, and never elsewhere than where it was named."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import threading
from concurrent.futures import CancelledError, Future
from functools import cache
from typing import Any
from weakref import finalize

import httpx

from softmeet.errors import InvalidInputError

# The environment variable that holds the key for hosts that ask for one.
KEY = "SOFTMEET_MEMBER_KEY"
# How often a question is asked that got no answer, and the seconds before it is asked for the second time.
_TRIES, _PAUSE = 3, 0.5
# The most bytes of an answer for which no more are expected.
_MOST = 1 << 20
# Answers by which a host says that it cannot now.
_LATER = (429, 500, 502, 503, 504)
# The most characters that are shown of what a host says.
_SHOWN = 300
_Answer = tuple[int, str, bytes]


class HostError(Exception):
    """What a host did in place of answering, as the end of a sentence that begins with its name, never with the key.

    Args:
        how: the end of the sentence, with ``{}`` for each of ``said``.
        said: what the host says, of which the beginning is shown.
    """

    def __init__(self, how: str, *said: object) -> None:
        super().__init__(_without_key(how.format(*map(_shown, said)) if said else how))


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Return the loop in which this process asks all hosts, in a thread of its own."""
    found = asyncio.new_event_loop()
    threading.Thread(target=found.run_forever, daemon=True, name="softmeet-hosts").start()
    return found


class Host:
    """A host, asked from any number of threads, by connections that are kept for the next question.

    A question whose connection fails, or that the host cannot answer now, is asked three times. Redirects are not
    followed. The key in ``$SOFTMEET_MEMBER_KEY``, if there is one, is sent as a bearer token, and is never shown.

    Args:
        url: of http or https, such as ``http://127.0.0.1:8000/v1``, below which paths are asked.
        seconds: how long an answer may take, from the connection to the last byte, with what is asked again.

    Raises:
        InvalidInputError: if the address has no host, or more than a host, a port and a path.
    """

    def __init__(self, url: str, seconds: float = 120.0) -> None:
        try:
            parts = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InvalidInputError(f"expected the address of a server, got {_safe(url)}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.host or parts.query:
            raise InvalidInputError(f"expected an address such as http://127.0.0.1:8000/v1, got {_safe(url)}")
        if parts.userinfo:
            raise InvalidInputError(
                f"expected an address without a name and a key, which would be shown, got {_safe(url)}: put the key "
                f"into the environment variable {KEY}"
            )
        self.base, self._seconds = url.rstrip("/"), seconds
        # Nothing of the environment's, such as a proxy, comes between; certificates are those that the system trusts.
        self._client = httpx.AsyncClient(
            timeout=None, trust_env=False, limits=httpx.Limits(keepalive_expiry=None),  # noqa: S113 - questions have one
            verify=ssl.create_default_context() if parts.scheme == "https" else False,
        )  # fmt: skip
        self._open, self._aborted = set[Future[_Answer]](), False
        finalize(self, _close, self._client).atexit = False

    def abort(self) -> None:
        """End all questions at once by a HostError, from any thread, and ask none any more."""
        self._aborted = True
        for question in list(self._open):
            question.cancel()

    def get(self, path: str) -> Any:
        """Return the JSON behind a path.

        Raises:
            HostError: if there is none.
        """
        return self._asked(_MOST, "GET", path, None)

    def post(self, path: str, body: dict[str, Any], more: int = 0) -> Any:
        """Return the JSON that is answered to a body of JSON, of at most 1 MiB and ``more`` bytes.

        Raises:
            HostError: if there is none, or it is longer: nobody else goes on while it is read.
        """
        return self._asked(_MOST + more, "POST", path, json.dumps(body).encode())

    def _asked(self, most: int, method: str, path: str, body: bytes | None) -> Any:
        if self._aborted:
            raise _aborted()
        question = asyncio.run_coroutine_threadsafe(self._tried(most, method, path, body), _loop(os.getpid()))
        self._open.add(question)
        try:
            if self._aborted:  # by another thread, which may have found no question
                raise _aborted()
            status, kind, answer = question.result(self._seconds)
        except TimeoutError:
            raise HostError(f"has not answered within {self._seconds:g} s") from None
        except CancelledError:
            raise _aborted() from None
        finally:
            self._open.discard(question)
            question.cancel()
        try:
            return _read(status, kind, answer)
        except RecursionError:
            raise HostError("answers with JSON that is nested too deep") from None

    async def _tried(self, *asked: Any) -> _Answer:
        for left in reversed(range(_TRIES)):
            try:
                found = await self._answer(*asked)
                if found[0] not in _LATER or not left:
                    return found
            except httpx.TransportError as error:
                if not left:
                    # Not from the error, which may hold the key.
                    why = str(error) or type(error).__name__
                    raise HostError("does not answer ({}): start the server, or check the address", why) from None
            await asyncio.sleep(_PAUSE * 2 ** (_TRIES - 1 - left))
        raise AssertionError

    async def _answer(self, most: int, method: str, path: str, body: bytes | None) -> _Answer:
        """Ask once; returns (status, kind of content, content)."""
        key = _key()
        if not (key.isascii() and key.isprintable()):
            raise HostError(f"is not asked: the key in the environment variable {KEY} has other letters than ASCII")
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        headers |= {"authorization": f"Bearer {key}"} if key else {}
        content = bytearray()
        async with self._client.stream(method, self.base + path, content=body, headers=headers) as answer:
            async for piece in answer.aiter_raw():
                content += piece
                if len(content) > most:
                    raise HostError(f"answers with more than {most:,} bytes, where fewer were expected")
        return answer.status_code, answer.headers.get("content-type", ""), bytes(content)


def _aborted() -> HostError:
    return HostError("is not asked any more: it was given up")


def _key() -> str:
    return os.environ.get(KEY, "").strip()


def _without_key(text: str) -> str:
    return text.replace(key, "***") if (key := _key()) else text


def _shown(said: object) -> str:
    # The key goes first: of one that is cut in two, a half would be left.
    text = " ".join(_without_key(str(said)).split())[:_SHOWN]
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _close(client: httpx.AsyncClient) -> None:
    asyncio.run_coroutine_threadsafe(client.aclose(), _loop(os.getpid()))


def _read(status: int, kind: str, answer: bytes) -> Any:
    """Return an answer's JSON.

    Raises:
        HostError: if it has none, or the status is no success.
    """
    if 300 <= status < 400:
        raise HostError("sends on to another address, which is not asked: name that address")
    try:
        found = json.loads(answer)
    except ValueError:
        if status < 300:
            raise HostError(
                "answers with {} in place of JSON: check the address", kind or "no kind of content"
            ) from None
        found = None
    if status < 300:
        return found
    if status in (401, 403):
        raise HostError(f"refuses the key: put the right one into the environment variable {KEY}")
    said = found.get("error", found) if isinstance(found, dict) else found
    said = said.get("message", said) if isinstance(said, dict) else said
    raise HostError(f"answers with status {status}: {{}}" if said else f"answers with status {status}", said)


def _safe(url: str) -> str:
    """Return an address without what stands before an @, which may be a key."""
    start, slashes, rest = url.partition("//")
    return f"{start}{slashes}{rest.rpartition('@')[2]}"[:200]
