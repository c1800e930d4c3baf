"""A host that is asked by JSON over HTTP, patiently but not for ever, and never elsewhere than where it was named."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from weakref import finalize

from softmeet.errors import InvalidInputError

# The environment variable that holds the key for hosts that ask for one.
KEY = "SOFTMEET_MEMBER_KEY"
# How often a question is asked that got no answer, and the seconds before it is asked for the second time.
_TRIES, _PAUSE = 3, 0.5
# The most bytes of an answer for which no more are expected, and how many are read at once.
_MOST, _PIECE = 1 << 20, 1 << 16
# Answers by which a host says that it cannot now.
_LATER = (429, 500, 502, 503, 504)
_THREAD = "softmeet-host"
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


class _Question(Future[_Answer]):
    """A question that a thread of its own asks, until there is an answer or nobody waits for one any more."""

    line: socket.socket | None = None

    def end(self) -> None:
        """Shut down the line of a question that has no answer, so that its thread ends."""
        self.cancel()
        if (line := self.line) is not None:
            with suppress(OSError):
                # Of one with TLS the socket below, as its thread may be reading.
                socket.socket.shutdown(line, socket.SHUT_RDWR)


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
        parts = urlsplit(url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidInputError(f"expected the address of a server, got {_safe(url)}: {error}") from error
        if parts.scheme not in ("http", "https") or not host or parts.query:
            raise InvalidInputError(f"expected an address such as http://127.0.0.1:8000/v1, got {_safe(url)}")
        if "@" in parts.netloc:
            raise InvalidInputError(
                f"expected an address without a name and a key, which would be shown, got {_safe(url)}: put the key "
                f"into the environment variable {KEY}"
            )
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connect: Callable[[], http.client.HTTPConnection] = partial(kind, host, port, timeout=seconds)
        self.base, self._seconds, self._idle = parts.path.rstrip("/"), seconds, deque[http.client.HTTPConnection]()
        self._open, self._aborted = set[_Question](), False
        finalize(self, _close, self._idle)

    def abort(self) -> None:
        """End all questions at once by a HostError, from any thread, and ask none any more."""
        self._aborted = True
        for question in list(self._open):
            with suppress(InvalidStateError):
                question.set_exception(_aborted())

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
        # Another thread asks: a name that is looked up, or a header that comes letter by letter, has no deadline.
        question = _Question()
        self._open.add(question)
        try:
            if self._aborted:
                raise _aborted()
            threading.Thread(
                target=self._ask, args=(question, most, method, path, body), daemon=True, name=_THREAD
            ).start()
            status, kind, answer = question.result(self._seconds)
        except TimeoutError:
            raise HostError(f"has not answered within {self._seconds:g} s") from None
        finally:
            self._open.discard(question)
            question.end()
        try:
            return _read(status, kind, answer)
        except RecursionError:
            raise HostError("answers with JSON that is nested too deep") from None

    def _ask(self, question: _Question, *asked: Any) -> None:
        """Give a question its answer, unless nobody waits any more."""
        try:
            found = self._tried(question, *asked)
        except BaseException as error:
            with suppress(InvalidStateError):
                question.set_exception(error)
        else:
            with suppress(InvalidStateError):
                question.set_result(found)

    def _tried(self, question: _Question, *asked: Any) -> _Answer:
        for again in reversed(range(_TRIES)):
            try:
                found = self._answer(question, *asked)
                if found[0] not in _LATER or not again:
                    return found
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException) as error:
                # Those that were kept have most likely been cut off, too.
                with suppress(IndexError):  # other threads may empty it, too
                    while True:
                        self._idle.pop().close()
                if not again or question.done():
                    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
                    # Not from the error, which may hold the key.
                    raise HostError("does not answer ({}): start the server, or check the address", why) from None
            time.sleep(_PAUSE * 2 ** (_TRIES - 1 - again))
        raise AssertionError

    def _answer(self, question: _Question, most: int, method: str, path: str, body: bytes | None) -> _Answer:
        """Ask once; returns (status, kind of content, content)."""
        key = _key()
        if not (key.isascii() and key.isprintable()):
            raise HostError(f"is not asked: the key in the environment variable {KEY} has other letters than ASCII")
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            if connection.sock is None:
                connection.connect()
            question.line = connection.sock
            if question.done():  # whoever ended it may have found no line
                raise TimeoutError
            connection.request(method, self.base + path, body, headers)
            content = bytearray()
            # Reading in pieces does not close it, though another question needs that.
            with connection.getresponse() as answer:
                while piece := answer.read1(_PIECE):
                    content += piece
                    if len(content) > most:
                        raise HostError(f"answers with more than {most:,} bytes, where fewer were expected")
        except BaseException:
            connection.close()
            raise
        question.line = None
        self._idle.append(connection)
        return answer.status, answer.getheader("content-type") or "", bytes(content)


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


def _close(connections: deque[http.client.HTTPConnection]) -> None:
    for connection in connections:
        connection.close()


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
