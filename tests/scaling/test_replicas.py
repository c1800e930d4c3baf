"""Replicas on the real Ray Serve: answers stream, keys come before bodies, and one that dies ends its own answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import warnings

import httpx
import pytest
from serving import wait_until
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app as commands
from softmeet.errors import InvalidInputError
from softmeet.server.limits import Limits
from softmeet.server.security import Protection
from softmeet.server.serving import ServerSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    from ray import serve

    from softmeet.server.ray import HEADER, NAME, application

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray and what it imports
BODY = {"prompt": "And the king said", "stream": True, "max_tokens": 100, "logit_bias": {"0": -100}}


@pytest.fixture(scope="module")
def url():
    """Two replicas of the bundled narrow family, and of the pair over bytes."""
    from softmeet.scaling.cluster import connect

    connect(cores=4)
    # Not a fixed port: Ray shares one that is taken, and another process's tests may have it.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = ServerSettings(limits=Limits(rows=16), protection=Protection(keys=("secret",)))
    serve.run(application({"default": ["narrow"], "bytes": ["mixed"]}, {}, settings, (2, 2)), name=NAME)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def client(url):
    return httpx.Client(base_url=url, timeout=300, headers={"Authorization": "Bearer secret"})


class Stream(threading.Thread):
    """A client that reads one stream to its end."""

    def __init__(self, url, seed, tokens=100):
        super().__init__(daemon=True)
        self.url, self.body = url, BODY | {"seed": seed, "max_tokens": tokens}
        self.events, self.replica = [], None
        self.start()

    def run(self):
        try:
            with client(self.url) as http, http.stream("POST", "/v1/completions", json=self.body) as answer:
                self.replica = answer.headers[HEADER]
                self.events.extend(line[6:] for line in answer.iter_lines() if line.startswith("data: "))
        except httpx.RemoteProtocolError:
            pass  # of a replica that died

    @property
    def text(self):
        return "".join(json.loads(event)["choices"][0]["text"] for event in self.events if event != "[DONE]")


def process_of(replica):
    actor = ray.get_actor(f"SERVE_REPLICA::{NAME}#replicas#{replica}", namespace="serve")
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


@pytest.mark.slow
def test_replicas_serve_the_page_to_whoever_asks_and_nothing_else(url):
    assert "main.js" in httpx.get(f"{url}/ui/").text
    assert "javascript" in httpx.get(f"{url}/ui/main.js").headers["content-type"]
    assert httpx.get(f"{url}/v1/models").status_code == 401


def short(http):
    return http.post("/v1/completions", json=BODY | {"stream": False, "max_tokens": 2})


@pytest.mark.slow
def test_what_streams_is_cut_where_its_replica_dies_and_others_go_on(url):
    """That events were there before the replica was killed, and no last one, shows that they came as they were made."""
    with client(url) as http:
        pids = {answer.headers[HEADER] for answer in (short(http) for _ in range(20))}
        assert len(pids) == 2
        pids = {replica: process_of(replica) for replica in pids}
        streams = [Stream(url, seed, 240) for seed in range(6)]
        wait_until(lambda: all(len(s.events) > 3 for s in streams))
        assert {s.replica for s in streams} == set(pids)
        victim = streams[0].replica
        os.kill(pids[victim], signal.SIGKILL)
        for stream in streams:
            stream.join(300)
            assert (stream.events[-1] == "[DONE]") == (stream.replica != victim)
        # The other answers while it is not yet replaced.
        for _ in range(4):
            assert short(http).status_code == 200
        wait_until(lambda: len({short(http).headers[HEADER] for _ in range(8)} - {victim}) == 2)


@pytest.mark.slow
def test_replicas_write_what_generate_does(url):
    """As the replicas, which have no fixture of ours."""
    stream = Stream(url, 3)
    stream.join(300)
    expected = Ensemble.from_pretrained("narrow", gate="auto").generate(
        BODY["prompt"], seed=3, do_sample=True, top_k=0, max_new_tokens=20, suppress_tokens=[0]
    )
    assert stream.text.startswith(expected)
    how = {"seed": 4, "max_tokens": 30}
    with client(url) as http:
        told = http.post("/v1/completions", json={"model": "bytes", "prompt": "And the king", **how}).json()
    assert told["choices"][0]["text"] == Ensemble.from_pretrained("mixed").generate(
        "And the king", seed=4, max_new_tokens=30, do_sample=True, top_k=0
    )


@pytest.mark.slow
def test_a_wrong_key_is_refused_before_the_body_is_there(url):
    with client(url) as http:
        assert http.get("/health").json() == {"status": "ok"}
        refused = http.post("/v1/completions", json=BODY | {"temperature": 9})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    assert httpx.get(f"{url}/v1/models", timeout=300).status_code == 401
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=300) as raw:
        raw.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer wrong\r\n"
            "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{".encode()
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 401")


def counts(http):
    """(sequences in the batch, tokens so far) of each of both replicas."""
    found = {}

    def ask():
        answer = http.get("/metrics")
        values = (answer.text.split(f"\n{name} ")[1].split()[0] for name in ("softmeet_rows", "softmeet_tokens_total"))
        found[answer.headers[HEADER]] = tuple(map(float, values))
        return len(found) == 2

    wait_until(ask)
    return found


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_place(url):
    with client(url) as http:
        before = sum(tokens for _, tokens in counts(http).values())
        for seed in range(8):
            body = BODY | {"seed": seed, "max_tokens": 200}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        wait_until(lambda: not any(rows for rows, _ in counts(http).values()))
        # Nobody wrote to the end what nobody read.
        assert sum(tokens for _, tokens in counts(http).values()) - before < 8 * 200 / 2


def test_ray_hands_out_more_than_a_replica_accepts():
    """Its own default of 5 would leave most places of a batch empty."""
    limits = Limits(rows=8, waiting=2)
    made = application({"a": ["narrow"]}, {}, ServerSettings(limits=limits, max_choices=3), (1, 4), gpus=0.5)
    found = made._bound_deployment
    assert found.max_ongoing_requests == 8 + 2 + 3
    config = found._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (1, 4, 8)
    assert found.ray_actor_options["num_gpus"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "2"], "options of --replicas"),
        (["--replicas", "many"], "FEWEST:MOST as in 1:4, got 'many'"),
        (["--replicas", "3:2"], "in order as in 1:4, got 3:2"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(InvalidInputError, match=message):
        CliRunner().invoke(commands, ["serve", *options], catch_exceptions=False)
