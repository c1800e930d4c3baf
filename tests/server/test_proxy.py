"""The reverse proxies of the guide on serving, as configured there: the real nginx and the real Caddy, attacked.

They run with the guide's own configurations, but for addresses, certificates, and timeouts, which are made shorter.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from serving import http, running, serving_of, tiny_ensemble, wait_until

from softmeet.server.security import Protection

pytestmark = pytest.mark.slow

GUIDE = (Path(__file__).parents[2] / "docs/guides/serve.md").read_text(encoding="utf-8")
BODY = {"prompt": "a", "max_tokens": 60, "stream": True, "logit_bias": {"0": -100}}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: models.example.org\r\nContent-Type: application/json\r\n"
NGINX = """
pid {folder}/pid; error_log {folder}/log; daemon off; worker_processes 1; events {{}}
http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
{block}
}}
"""


def block(language):
    """The guide's configuration."""
    return re.search(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)[1]


def nginx(folder, port, behind):
    # A small buffer of the system's, so that who does not read is noticed on any machine.
    listen = f"listen 127.0.0.1:{port} sndbuf=4096"
    text = re.sub(r" *ssl_certificate.*\n", "", block("nginx")).replace("listen 443 ssl", listen)
    text = re.sub(r"_timeout \d+s", "_timeout 1s", text).replace("127.0.0.1:8000", behind)
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, block=text))
    return ["nginx", "-e", str(folder / "log"), "-c", str(folder / "nginx.conf")]


def caddy(folder, port, behind):
    text = re.sub(r"(read_\w+) \d+s", r"\1 1s", block("caddyfile")).replace("127.0.0.1:8000", behind)
    text = text.replace("{\n", "{\nadmin off\nauto_https off\n", 1).replace("models.example.org", f":{port}")
    (folder / "Caddyfile").write_text(text)
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


@pytest.fixture(scope="module")
def serving():
    ensemble = tiny_ensemble("gpt2", rule="logit-mean")
    return serving_of({"plain": ensemble}, protection=Protection(hosts=("models.example.org", "127.0.0.1")))


@pytest.fixture(scope="module")
def behind(serving):
    with running(serving, send_buffer=4096) as url:
        yield url.removeprefix("http://")


@pytest.fixture(scope="module", params=[nginx, caddy])
def proxy(request, tmp_path_factory, behind):
    """(the proxy's address, its maker) while it runs."""
    name = request.param.__name__
    if shutil.which(name) is None and "REQUIRE_PROXIES" not in os.environ:
        pytest.skip(f"there is no {name}: apt-get install {name}")
    folder = tmp_path_factory.mktemp(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    process = subprocess.Popen(request.param(folder, port, behind), env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or listens(("127.0.0.1", port)), 30)
        assert process.poll() is None
        yield ("127.0.0.1", port), request.param
    finally:
        process.terminate()
        process.wait(30)


def listens(address):
    with contextlib.suppress(OSError), socket.create_connection(address):
        return True
    return False


@contextlib.contextmanager
def connected(address, **options):
    with socket.socket() as connection:
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        connection.settimeout(60)
        connection.connect(address)
        yield connection


def rest(connection):
    """All that comes until the connection is closed."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            found += piece
    return found


def asked(body, *headers):
    content = json.dumps(body).encode()
    return HEAD + b"".join(headers) + b"Content-Length: %d\r\n\r\n%s" % (len(content), content)


@contextlib.contextmanager
def slow(serving, seconds):
    """Let each step of the member take so long while this lasts."""
    member = serving.ensembles.find("plain").ensemble.model.members[0]
    hook = member.base_model.register_forward_hook(lambda *_: time.sleep(seconds))
    yield
    hook.remove()


def requests(serving):
    return sum(s.value for m in serving.metrics.requests.collect() for s in m.samples if s.name.endswith("_total"))


def test_tokens_pass_as_they_are_written(proxy, serving):
    with slow(serving, 0.03), connected(proxy[0]) as connection:
        connection.sendall(asked(BODY, b"Connection: close\r\n"))
        times = [time.monotonic()]
        while connection.recv(1 << 16):
            times.append(time.monotonic())
    assert times[-1] - times[1] > 1  # the last piece comes long behind the first
    assert len(times) > 20


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: models.exam", HEAD + b"Content-Length: 99\r\n\r\n{"])
def test_who_sends_slowly_is_cut_off_and_nothing_of_it_reaches_the_server(proxy, serving, sent):
    before, started = requests(serving), time.monotonic()
    with connected(proxy[0]) as connection:
        connection.sendall(sent)
        assert re.match(rb"$|HTTP/1.1 (400|408|504) ", rest(connection))
    assert 0.5 < time.monotonic() - started < 30
    # Caddy asks the server once a body has begun, and takes its request back.
    assert proxy[1] is caddy or requests(serving) == before
    assert not serving.batcher._running


def test_large_bodies_and_headers_are_refused_before_the_server(proxy, serving):
    before = requests(serving)
    with connected(proxy[0]) as connection:
        connection.sendall(asked({"prompt": "a" * 2_000_000}, b"Connection: close\r\n"))
        assert re.match(rb"$|HTTP/1.1 (413|502) ", rest(connection))
    with connected(proxy[0]) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: models.example.org\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")
        assert re.match(rb"$|HTTP/1.1 4(00|14|31) ", rest(connection))
    assert requests(serving) == before


def test_who_does_not_read_is_cut_off_and_its_sequences_end(proxy, serving):
    address, maker = proxy
    if maker is caddy:
        pytest.skip("Caddy has no bound on reading but on a whole answer")
    many = {**BODY, "n": 16, "logprobs": 20, "softmeet": {"report": 20}}
    tokens = lambda: serving.metrics.registry.get_sample_value("softmeet_tokens_total")  # noqa: E731
    before = tokens()
    with slow(serving, 0.2), connected(address, SO_RCVBUF=4096) as connection:
        connection.sendall(asked(many))
        wait_until(lambda: serving.batcher._running)
        wait_until(lambda: not serving.batcher._running)
    assert tokens() - before < 16 * 60


def test_one_client_has_a_few_connections_and_no_more(proxy, serving):
    address, maker = proxy
    if maker is caddy:
        pytest.skip("Caddy has no bound on the connections of a client")
    with slow(serving, 0.1), contextlib.ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(connected(address)).sendall(asked(BODY))
        wait_until(lambda: len(serving.batcher._running) == 16)
        with connected(address) as one_more:
            one_more.sendall(asked(BODY, b"Connection: close\r\n"))
            assert rest(one_more).startswith(b"HTTP/1.1 503 ")
    wait_until(lambda: not serving.batcher._running)


def test_a_server_behind_a_proxy_answers_to_its_name_alone(proxy, behind):
    host, port = proxy[0]
    assert http.get(f"http://{host}:{port}/health", headers={"host": "models.example.org"}).status_code == 200
    assert http.get(f"http://{behind}/health", headers={"host": "evil.example"}).status_code == 421
