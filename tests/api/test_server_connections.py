"""What one client can do to a server below HTTP's requests: endless headers, connections, flooding, not reading.

What a slow client can do behind a reverse proxy is in tests/server/test_proxy.py.
"""

import contextlib
import json
import re
import socket

import psutil
import pytest
from serving import running, serving_of, tiny_ensemble, wait_until

from softmeet.server.security import Protection

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b'{"prompt":"a","max_tokens":2,"seed":1}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
POST = HEAD + b"Content-Length: %d\r\n\r\n%s"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def served(**bounds):
    return serving_of({"plain": tiny_ensemble("gpt2", rule="logit-mean")}, protection=Protection(**bounds))


def connected(url, **options):
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), **options)
    connection.settimeout(300)
    return connection


def read(connection):
    """All that comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            found += piece
    return found


def healthy(connection):
    """Whether a request on a connection, which is left open, is answered."""
    connection.sendall(GET)
    found = b""
    while not found.endswith(b'{"status":"ok"}'):
        piece = connection.recv(1 << 16)
        assert piece
        found += piece
    return found.startswith(b"HTTP/1.1 200 ")


def flooded(connection, first, pieces):
    """How many of many pieces could be sent behind a beginning."""
    connection.sendall(first)
    for k, piece in enumerate(pieces):
        try:
            connection.sendall(piece)
        except (ConnectionError, TimeoutError):
            return k
    return len(pieces)


@pytest.mark.parametrize(
    "first",
    [b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"GET /", b"", CHUNKED + b"1;x=", CHUNKED + b"1\r\n{\r\n0\r\nX: "],
    ids=["a header", "a target", "empty lines", "a chunk's extension", "a trailer"],
)
def test_what_has_no_end_is_not_kept(first):
    piece = (b"\r\n" if not first else b"a") * (1 << 16)
    with running(served()) as url:
        before = psutil.Process().memory_info().rss
        with connected(url) as connection:
            sent = flooded(connection, first, [piece] * (300_000_000 // len(piece)))
        assert sent * len(piece) < 50_000_000
        assert psutil.Process().memory_info().rss - before < 30_000_000


def test_what_stands_behind_a_body_is_no_header():
    with running(served(keys=("key",))) as url, connected(url) as connection:
        connection.sendall(CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY) + b"Authorization: Bearer key\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("cut", [10_000, 70, 1])
def test_other_protocols_are_not_spoken_and_what_asks_for_them_is_answered(cut):
    """As Java's client asks for HTTP/2 by default; the next request may follow at once."""
    asked = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    request = CHUNKED[:-2] + asked + b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    sent = request + GET[:-2] + asked + b"\r\n" + GET
    with running(served()) as url, connected(url) as connection:
        for start in range(0, len(sent), cut):
            connection.sendall(sent[start : start + cut])
        found, more = b"", b"..."
        while more and found.count(b"HTTP/1.1 ") < 3:
            found += (more := connection.recv(1 << 16))
        assert found.count(b"HTTP/1.1 200 ") == 3


def test_many_headers_are_refused_and_as_many_as_are_common_are_not():
    with running(served()) as url:
        for header in (b"X-%d: y\r\n", b"X-%d: " + b"y" * 1000 + b"\r\n"):
            with connected(url) as connection:
                connection.sendall(GET[:-2] + b"".join(header % k for k in range(1_000_000 // len(header))) + b"\r\n")
                assert read(connection).startswith(b"HTTP/1.1 400 ")
        with connected(url) as connection:
            connection.sendall(GET[:-2] + b"X: " + b"y" * 40_000 + b"\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_more_connections_than_allowed_are_answered_503():
    with running(served(connections=3)) as url, contextlib.ExitStack() as stack:
        three = [stack.enter_context(connected(url)) for _ in range(3)]
        for connection in three:
            assert healthy(connection)
        with connected(url) as fourth:
            fourth.sendall(GET)
            assert read(fourth).startswith(b"HTTP/1.1 503 ")
        three.pop().close()

        def answered():
            with connected(url) as fourth:
                fourth.sendall(GET)
                return fourth.recv(1 << 16).startswith(b"HTTP/1.1 200 ")

        wait_until(answered)


def test_a_few_requests_may_be_sent_ahead_and_a_flood_is_not_kept():
    with running(served()) as url:
        with connected(url) as connection:
            connection.sendall(GET * 10)
            found = b""
            while found.count(b'{"status":"ok"}') < 10:
                found += connection.recv(1 << 16)
        before = psutil.Process().memory_info().rss
        with connected(url) as connection:
            connection.settimeout(2)
            flooded(connection, POST % (len(BODY), BODY), [GET * 1000] * 1000)
        assert psutil.Process().memory_info().rss - before < 30_000_000


def test_a_client_that_does_not_read_keeps_its_connection_and_no_place_in_the_batch():
    """The stream's tokens have long reports, and the client's window is small."""
    serving = served()
    body = json.dumps(
        {"prompt": "a", "max_tokens": 60, "n": 16, "stream": True, "logit_bias": {"0": -100}, "logprobs": 20,
         "softmeet": {"report": 20}}
    ).encode()  # fmt: skip
    with running(serving, send_buffer=4096) as url, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.sendall(POST % (len(body), body))
        wait_until(lambda: serving.metrics.registry.get_sample_value("softmeet_tokens_total"))
        wait_until(lambda: not serving.batcher._running)
        with connected(url) as other:
            assert healthy(other)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_",
    [
        b"CONNECT example.org:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"nonsense\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)  # fmt: skip
def test_what_is_not_http_is_refused_and_its_connection_ends(url, request_):
    with connected(url) as connection:
        connection.sendall(request_)
        assert re.match(rb"HTTP/1.1 40[045] ", read(connection))


@pytest.fixture(scope="module")
def url():
    with running(served()) as found:
        yield found


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
         b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings, close\r\n"
         b"Upgrade: h2c\r\n\r\n", 200),
        (POST.replace(b"Host", b"Connection: close\r\nHost") % (len(BODY), BODY), 200),
        (POST.replace(b"Host", b"Connection: close\r\nExpect: 100-continue\r\nHost") % (len(BODY), BODY), 100),
    ],
)  # fmt: skip
def test_unusual_requests_are_answered(url, request_, status):
    with connected(url) as connection:
        connection.sendall(request_)
        assert read(connection).startswith(b"HTTP/1.1 %d " % status)
