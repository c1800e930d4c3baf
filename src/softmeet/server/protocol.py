"""HTTP on one connection, with bounds: on headers, on waiting for them, on connections, and on answers nobody reads.

uvicorn's fast protocol (httptools) has none of these bounds; here they are added to it. A connection that breaks one is
answered with an error object where an answer can still be sent, and is closed.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any, ClassVar, cast

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from softmeet.server.app import create_app
from softmeet.server.errors import RequestError, TooManyConnectionsError, error_response
from softmeet.server.metrics import Metrics
from softmeet.server.security import Protection
from softmeet.server.serving import Serving

# The most bytes of a request line and its headers, as servers commonly have it; a read of the socket may come on top.
_MOST_HEAD = 1 << 16
# The most requests that a client may send before the first of them is answered.
_MOST_AHEAD = 16
# The fewest bytes that a client has to take of an answer within ``send_seconds``, if so many are left.
_LEAST_TAKEN = 1 << 14
# A client that goes on sending after it was refused may do so for so many bytes: many read the refusal only then.
_DISCARDED = 1 << 20
# Seconds after which a connection that was refused is closed, if the client has not closed it.
_LINGER = 1.0


def configuration(serving: Serving, **options: Any) -> uvicorn.Config:
    """Return the configuration of a uvicorn server for a server's application, with the bounds of its protection.

    Args:
        serving: the ensembles, their batcher, and the settings.
        options: further arguments of ``uvicorn.Config``, such as ``port``.
    """
    bounds = {"protection": serving.settings.protection, "metrics": serving.metrics}
    http = cast(type[asyncio.Protocol], type("Protocol", (BoundedProtocol,), bounds))
    # uvicorn's own access log would hold queries; nothing here speaks WebSocket.
    return uvicorn.Config(create_app(serving), http=http, ws="none", access_log=False, server_header=False, **options)


class BoundedProtocol(HttpToolsProtocol):
    """One client's connection, as asyncio's protocols are; uvicorn makes one for each.

    Attributes:
        protection: the bounds.
        metrics: its ``connections`` counts this one while it is open.
    """

    protection: ClassVar[Protection]
    metrics: ClassVar[Metrics]

    # What the connection was closed for.
    _error: Exception | None = None
    # Whether a request has begun whose headers are not complete.
    _in_head = False
    # Bytes of the newest request's line and headers so far; bytes since the parser last had something to say: it keeps
    # a header, or the like, until that is complete.
    _head = _kept = 0
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    # Bytes of the answer that the client had left when this was last looked at.
    _unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection; answer 503 and close it if there are ``protection.connections`` already."""
        self.metrics.connections.inc()
        self._cycles: list[RequestResponseCycle] = []
        if len(self.connections) < self.protection.connections:
            super().connection_made(transport)
            self._await_head()
            return
        # It is no connection to uvicorn, so that a shutdown does not wait for it.
        self.transport = transport
        self._refuse(TooManyConnectionsError("the server has no room for more connections: ask again later"))

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection, whoever closed it, and tell every request on it."""
        self.metrics.connections.dec()
        self._stop_timers()
        for cycle in self._cycles:  # uvicorn tells the newest alone
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what the client has sent, and see that the parser keeps no more of it than it may."""
        self._kept += len(data)
        if self._error is not None:  # nothing more is of interest
            if self._kept > _DISCARDED:
                self.transport.abort()
            return
        self._parse(data)
        if self._kept > _MOST_HEAD and self._error is None:
            self._refuse(_too_long())
        if self._head_timer is None and self._idle:
            self._await_head()

    def _parse(self, data: bytes) -> None:
        """Parse bytes; a request that asks for another protocol is read anew, as one that does not (RFC 9110, 7.8)."""
        self._unset_keepalive_if_required()
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserError as error:
                self.send_400_response(str(error))
            except httptools.HttpParserUpgrade as found:
                # The parser takes a body for the other protocol's.
                first = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
                others = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
                data = b"\r\n".join([first, *others, b"", data[found.args[0] :]])
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                continue
            return

    @property
    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    # The parser's callbacks: an exception in one ends the connection by send_400_response.

    def on_message_begin(self) -> None:
        """Begin to count a request's head, or refuse it if too many are ahead of their answers."""
        super().on_message_begin()
        self._in_head, self._head, self._kept = True, 0, 0
        if len(self.pipeline) >= _MOST_AHEAD:
            self._error = RequestError(
                f"expected at most {_MOST_AHEAD} requests ahead of their answers: read the answers first", status=429
            )
            raise self._error

    def on_url(self, url: bytes) -> None:
        """Add a piece of the request's target."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a complete header; one that stands behind a body is only counted, as nobody has checked it."""
        if self._in_head:
            super().on_header(name, value)
        self._count(len(name) + len(value))

    def _count(self, size: int) -> None:
        self._head += size
        self._kept = 0
        if self._head > _MOST_HEAD:
            self._error = _too_long()
            raise self._error

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        if self.parser.get_method() == b"CONNECT":
            self._error = RequestError("expected another method than CONNECT: this is no proxy", code="invalid_http")
            raise self._error
        if self.parser.should_upgrade():
            return
        self._in_head = False
        self._stop_timers()
        super().on_headers_complete()
        self._cycles = [*(cycle for cycle in self._cycles if not cycle.response_complete), self.cycle]

    def on_body(self, body: bytes) -> None:
        """Add a piece of the request's body."""
        self._kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Tell the request that its body is complete, unless it is read anew."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what could not be parsed, or broke a bound, with an error object, and close the connection."""
        self._refuse(self._error or RequestError(msg, code="invalid_http"))

    def _refuse(self, error: Exception) -> None:
        """Answer an error, unless another answer is due before it, and close the connection."""
        self._error = error
        self._stop_timers()
        due = [cycle for cycle in self._cycles if not cycle.response_complete]
        if len(due) > 1 or any(cycle.response_started or not cycle.more_body for cycle in due):
            self.transport.close()
            return
        for cycle in due:  # the request whose body is at fault
            cycle.disconnected = True
            cycle.message_event.set()
        answer = error_response(error, {"Connection": "close"})
        status = HTTPStatus(answer.status_code)
        first = b"HTTP/1.1 %d %s" % (status, status.phrase.encode())
        headers = map(b": ".join, answer.raw_headers)
        self.transport.write(b"\r\n".join([first, *headers, b"", bytes(answer.body)]))
        # If bytes that the client has sent were unread, closing at once could take the answer from it.
        self._head_timer = self.loop.call_later(_LINGER, self.transport.abort)
        self.transport.write_eof()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.protection.header_seconds, self._no_head)

    def _no_head(self) -> None:
        """Close the connection, as its client has not sent a request's headers in time."""
        self._head_timer = None
        if self._in_head:
            seconds = self.protection.header_seconds
            error = RequestError(f"expected the headers within {seconds:g} s", status=408, code="headers_too_slow")
            self._refuse(error)
        else:
            self.transport.close()  # a browser that connects in advance did not ask, and expects no answer

    def pause_writing(self) -> None:
        """Have no more of an answer written until the client has taken what was."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """Have more of an answer written."""
        self._stop_timers()
        super().resume_writing()

    def on_response_complete(self) -> None:
        """Go on to the next request; if there is none yet, see that the end of the answer is taken, too."""
        super().on_response_complete()
        if self._idle:
            self._watch()

    def _watch(self) -> None:
        """Look after ``send_seconds`` how much the client has taken of its answer; nothing is written meanwhile."""
        self._unsent = self.transport.get_write_buffer_size()
        if self._unsent and self._send_timer is None:
            self._send_timer = self.loop.call_later(self.protection.send_seconds, self._look)

    def _look(self) -> None:
        """Cut the client off if it has taken next to nothing, which ends what is generated for it."""
        self._send_timer = None
        if self.transport.get_write_buffer_size() > max(self._unsent - _LEAST_TAKEN, 0):
            self.transport.abort()
        else:
            self._watch()

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._send_timer = None


def _too_long() -> RequestError:
    return RequestError(
        f"expected a request line and headers of at most {_MOST_HEAD:,} bytes in all",
        status=431,
        code="headers_too_long",
    )
