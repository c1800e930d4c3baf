"""Replicas on Ray Serve: they answer as a single server does, and one that dies takes its own answers alone with it."""

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

    from softmeet.server.replicas import NAME, application

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray and what it imports
BODY = {"prompt": "And the king said", "stream": True, "max_tokens": 200, "logit_bias": {"0": -100}}


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
    named = {"default": ["narrow"], "bytes": ["mixed"]}
    serve.run(application(named, {}, settings, replicas=2), name=NAME, route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def client(url):
    return httpx.Client(base_url=url, timeout=300, headers={"Authorization": "Bearer secret"})


class Stream(threading.Thread):
    """A client that reads one stream to its end, or until it breaks."""

    def __init__(self, url, seed):
        super().__init__(daemon=True)
        self.url, self.seed, self.events, self.broke = url, seed, [], False
        self.start()

    def run(self):
        body = BODY | {"seed": self.seed}
        with client(self.url) as http, http.stream("POST", "/v1/completions", json=body) as answer:
            try:
                self.events.extend(line[6:] for line in answer.iter_lines() if line.startswith("data: "))
            except httpx.HTTPError:
                self.broke = True

    @property
    def text(self):
        chunks = [json.loads(event) for event in self.events if event != "[DONE]"]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks if "choices" in chunk)


def processes():
    """The process of each replica that lives."""
    found = []
    for one in ray.util.list_named_actors(all_namespaces=True):
        if one["name"].startswith(f"SERVE_REPLICA::{NAME}#"):
            actor = ray.get_actor(one["name"], namespace=one["namespace"])
            found.append(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())))
    return found


@pytest.mark.slow
def test_a_replica_killed_under_load(url):
    victim, other = processes()
    streams = [Stream(url, seed) for seed in range(8)]
    wait_until(lambda: all(len(s.events) > 3 for s in streams))  # none has ended: they are written as they come
    assert not any("[DONE]" in s.events for s in streams)
    os.kill(victim, signal.SIGKILL)
    for stream in streams:
        stream.join(300)
        assert not stream.is_alive()
    whole = [s for s in streams if s.events[-1] == "[DONE]"]
    assert 0 < len(whole) < len(streams)
    ensemble = Ensemble.from_pretrained("narrow", gate="auto")  # as the replicas, which have no fixture of ours
    expected = ensemble.generate(
        BODY["prompt"], seed=whole[0].seed, do_sample=True, top_k=0, max_new_tokens=20, suppress_tokens=[0]
    )
    assert whole[0].text.startswith(expected)
    wait_until(lambda: len({*processes()} - {victim}) == 2)  # it is replaced
    with client(url) as http:
        wait_until(lambda: http.post("/v1/completions", json=BODY | {"stream": False}).status_code == 200)
    assert other in processes()


@pytest.mark.slow
def test_what_a_single_server_says_replicas_say(url):
    with client(url) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/v1/models").json()["data"][0]["id"] == "default"
        refused = http.post("/v1/completions", json=BODY | {"temperature": 9})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
        told = http.post(
            "/v1/completions", json={"model": "bytes", "prompt": "And the king", "seed": 4, "max_tokens": 30}
        )
        text = Ensemble.from_pretrained("mixed").generate(
            "And the king", seed=4, do_sample=True, top_k=0, max_new_tokens=30
        )
        assert told.json()["choices"][0]["text"] == text
    for wrong in ({}, {"Authorization": "Bearer other"}):
        assert httpx.post(f"{url}/v1/completions", content=b"{", headers=wrong, timeout=300).status_code == 401


def test_autoscaling_is_bounded():
    settings = ServerSettings(limits=Limits(rows=16, waiting=4), max_choices=2)
    options = application({"a": ["wide"]}, {}, settings, max_replicas=4)._bound_deployment._deployment_config
    found = options.autoscaling_config
    assert (found.min_replicas, found.max_replicas, found.target_ongoing_requests) == (1, 4, 8)
    assert options.max_ongoing_requests == 22
    with pytest.raises(InvalidInputError, match="at most 3 replicas or more, got 2"):
        application({"a": ["wide"]}, {}, settings, replicas=3, max_replicas=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "2"], "or --engine ray, which --replicas"),
        (["--engine", "dask"], "expected --engine local"),
        (["--engine", "ray", "--ui"], "the page needs a process of its own"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(InvalidInputError, match=message):
        CliRunner().invoke(commands, ["serve", *options], catch_exceptions=False)
