"""Replicas: one that dies takes its own answers with it, and says so to those who were reading them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import signal
import socket
import sys
import threading
import warnings

import httpx
import pytest
from serving import serving_of, tiny_ensemble, wait_until
from typer.testing import CliRunner

from softmeet import Ensemble, Structure
from softmeet.cli.main import app as commands
from softmeet.errors import InvalidInputError
from softmeet.server.app import create_app
from softmeet.server.asgi import run
from softmeet.server.errors import ReplicaLostError
from softmeet.server.limits import Limits
from softmeet.server.relay import Relay
from softmeet.server.security import Protection
from softmeet.server.serving import ServerSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    from ray import serve

    from softmeet.server.replicas import HEADER, NAME, Arguments, Scale, app, application

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
    named = {"default": ["narrow"], "bytes": ["mixed"]}
    serve.run(application(named, {}, settings, Scale(replicas=2)), name=NAME, route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def client(url):
    return httpx.Client(base_url=url, timeout=300, headers={"Authorization": "Bearer secret"})


class Stream(threading.Thread):
    """A client that reads one stream to its end."""

    def __init__(self, url, seed):
        super().__init__(daemon=True)
        self.url, self.seed, self.events, self.replica, self.ended = url, seed, [], None, None
        self.start()

    def run(self):
        with (
            client(self.url) as http,
            http.stream("POST", "/v1/completions", json=BODY | {"seed": self.seed}) as answer,
        ):
            self.replica = answer.headers[HEADER]
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line[6:])
        self.ended = True

    @property
    def text(self):
        chunks = [json.loads(event) for event in self.events if event != "[DONE]"]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks if "choices" in chunk)


def process_of(replica):
    actor = ray.get_actor(f"SERVE_REPLICA::{NAME}#replicas#{replica}", namespace="serve")
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


@pytest.mark.slow
def test_a_replica_killed_under_load(url):
    streams = [Stream(url, seed) for seed in range(6)]
    wait_until(lambda: all(len(s.events) > 3 for s in streams))
    replicas = {s.replica for s in streams}
    assert len(replicas) == 2
    victim = streams[0].replica
    os.kill(process_of(victim), signal.SIGKILL)
    killed_at = {s.seed: len(s.events) for s in streams if s.replica == victim}
    # At once, while it is not yet replaced.
    with client(url) as http:
        for _ in range(4):
            answer = http.post("/v1/completions", json=BODY | {"stream": False, "max_tokens": 2})
            assert answer.status_code == 200
            assert answer.headers[HEADER] != victim
    for stream in streams:
        stream.join(300)
        assert stream.ended
        assert stream.events[-1] == "[DONE]"
        last = json.loads(stream.events[-2])
        if stream.replica == victim:
            assert last["error"]["code"] == "replica_lost"
            assert last["error"]["type"] == "service_unavailable_error"
            assert killed_at[stream.seed] <= len(stream.events) < 100
        else:
            assert not any("error" in json.loads(event) for event in stream.events[:-1])
            assert last["choices"][0]["finish_reason"] == "length"
            assert len(stream.events) > 100
    ensemble = Ensemble.from_pretrained("narrow", gate="auto")  # as the replicas, which have no fixture of ours
    whole = next(s for s in streams if s.replica != victim)
    expected = ensemble.generate(
        BODY["prompt"], seed=whole.seed, do_sample=True, top_k=0, max_new_tokens=20, suppress_tokens=[0]
    )
    assert whole.text.startswith(expected)

    def replaced():
        with client(url) as http:
            found = {http.post("/v1/completions", json=BODY | {"stream": False, "max_tokens": 1}) for _ in range(4)}
        assert all(answer.status_code == 200 for answer in found)
        return len({answer.headers[HEADER] for answer in found} - {victim}) == 2

    wait_until(replaced)


@pytest.mark.slow
def test_the_front_has_neither_models_nor_what_runs_them(url):
    (name,) = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "#front#" in one["name"]]
    modules = ray.get(ray.get_actor(name, namespace="serve").__ray_call__.remote(lambda self: set(sys.modules)))
    assert "softmeet.server.relay" in modules
    assert not {"torch", "transformers"} & modules


@pytest.mark.slow
def test_what_a_single_server_says_replicas_say(url):
    with client(url) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/v1/models").json()["data"][0]["id"] == "default"
        refused = http.post("/v1/completions", json=BODY | {"temperature": 9})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
        unknown = http.post("/v1/completions", content=b'{"prompt": NaN}')
        assert unknown.status_code == 400
        assert http.get("/nothing").status_code == 404
        assert "/v1/models" in http.get("/").json()
    assert httpx.get(f"{url}/", timeout=300).status_code == 401
    assert httpx.get(f"{url}/v1/models", timeout=300).status_code == 401


@pytest.mark.slow
def test_over_bytes_replicas_write_what_generate_does(url):
    ensemble, talk = Ensemble.from_pretrained("mixed"), [{"role": "user", "content": "Who is it?"}]
    how = {"seed": 4, "max_new_tokens": 30, "do_sample": True, "top_k": 0}
    body = {"model": "bytes", "seed": 4, "max_tokens": 30}
    clock = "(noon|[0-9]{1,2} of the clock)"
    with client(url) as http:
        plain = http.post("/v1/completions", json=body | {"prompt": "And the king"}).json()
        assert plain["choices"][0]["text"] == ensemble.generate("And the king", **how)
        assert plain["usage"]["softmeet"]["unit"] == "token"
        answered = http.post("/v1/chat/completions", json=body | {"messages": talk, "temperature": 1}).json()
        assert answered["choices"][0]["message"]["content"] == ensemble.generate(talk, **how)
        told = http.post(
            "/v1/completions", json=body | {"prompt": "At", "structured_outputs": {"regex": clock}}
        ).json()["choices"][0]
        assert (told["text"], told["finish_reason"]) == (
            ensemble.generate("At", structure=Structure.regex(clock), **how), "stop",
        )  # fmt: skip


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


class GoneError(Exception):
    """Of a process that died."""


class Messages:
    def __init__(self, messages):
        self.messages, self.cancelled = list(messages), False

    async def __aiter__(self):
        for message in self.messages:
            if isinstance(message, Exception):
                raise message
            yield message

    def cancel(self):
        self.cancelled = True


def start(kind):
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}


def relayed(*messages):
    """(what a client gets, the answer) of messages, the last of which may be how they end."""
    sent, answer = [], Messages(messages)
    asked = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.request", "body": b"}"}]

    async def receive():
        if asked:
            return asked.pop(0)
        return await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    def ask(scope, body):
        assert (scope["path"], body) == ("/v1/completions", b"{}")
        return answer

    scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": [], "app": object()}
    asyncio.run(Relay(ask, (GoneError,))(scope, receive, send))
    return sent, answer


def test_an_answer_cut_off_becomes_an_error():
    body = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
    sent, answer = relayed(start(b"text/event-stream"), body, GoneError())
    assert sent[:2] == [start(b"text/event-stream"), body]
    event, done, rest = sent[2]["body"].split(b"\n\n")
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "replica_lost"
    assert (done, rest, sent[2]["more_body"]) == (b"data: [DONE]", b"", False)
    assert answer.cancelled
    for messages in (
        [GoneError()],
        [start(b"application/json"), GoneError()],
        [start(b"text/event-stream"), GoneError()],
    ):
        sent, _ = relayed(*messages)
        assert sent[0]["status"] == 503
        assert json.loads(sent[1]["body"])["error"]["code"] == "replica_lost"
    with pytest.raises(ReplicaLostError):
        relayed(start(b"application/json"), body, GoneError())
    with pytest.raises(ZeroDivisionError):
        relayed(start(b"text/event-stream"), body, ZeroDivisionError())


def test_what_a_cancelled_answer_raises_is_no_error_once_its_client_has_left():
    class Cancelled(Messages):
        async def __aiter__(self):
            yield start(b"text/event-stream")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise GoneError from None

    answer = Cancelled([])
    asked = [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]

    async def receive():
        return asked.pop(0)

    async def send(message):
        raise AssertionError(message)

    scope = {"type": "http", "path": "/", "method": "GET", "headers": []}
    asyncio.run(Relay(lambda scope, body: answer, (ZeroDivisionError,))(scope, receive, send))
    assert answer.cancelled


def test_an_application_run_by_messages_and_left():
    """The same application as behind a socket; whoever leaves the iteration gives the sequence up."""
    serving = serving_of({"tiny": tiny_ensemble("llama", "gpt2")})
    scope = {"type": "http", "path": "/v1/completions", "method": "POST", "query_string": b"", "root_path": ""}
    scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http"}

    async def both():
        body = json.dumps({"prompt": "abc", "max_tokens": 3, "seed": 1}).encode()
        whole = [message async for message in run(create_app(serving), scope, body)]
        body = json.dumps({"prompt": "abc", "max_tokens": 50, "stream": True}).encode()
        async with contextlib.aclosing(run(create_app(serving), scope, body)) as messages:
            async for message in messages:
                if message["type"] == "http.response.body":
                    break
        return whole

    serving.batcher.start()
    whole = asyncio.run(both())
    assert whole[0]["status"] == 200
    assert json.loads(b"".join(m["body"] for m in whole[1:]))["choices"][0]["finish_reason"] in ("length", "stop")
    wait_until(lambda: not serving.batcher._running)
    serving.batcher.close(0)
    serving.batcher.join()


def test_autoscaling_is_set():
    assert Scale(replicas=2).options() == {"num_replicas": 2}
    found = Scale(max_replicas=4, streams=8).options()["autoscaling_config"]
    assert found == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8}
    with pytest.raises(InvalidInputError, match="at most 3 replicas or more, got 2"):
        Scale(replicas=3, max_replicas=2).options()
    assert isinstance(app(Arguments(ensembles="wide narrow", max_replicas=3)), serve.Application)
    # As `serve run` finds out what to make of name=value.
    assert inspect.signature(app).parameters["arguments"].annotation is Arguments
    assert Arguments.model_validate({"ensembles": "wide", "replicas": "2"}).replicas == 2


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
