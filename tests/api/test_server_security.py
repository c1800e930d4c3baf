"""What must not come in, and what must not go out: keys, hosts, malformed bodies, full queues, signals."""

import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import tiny
from commands import run
from serving import accepts, http, running, serve, serving_of, tiny_ensemble, wait_until

from softmeet.server.limits import Limits
from softmeet.server.security import Protection

JSON = {"content-type": "application/json"}
GOOD = {"prompt": "hello", "max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module")
def url():
    limits = Protection(max_body=100_000)
    with running(serving_of({"plain": tiny_ensemble("gpt2", "llama", rule="logit-mean")}, protection=limits)) as found:
        yield found


def assert_is_error(response, *statuses):
    assert response.status_code in statuses or (not statuses and 400 <= response.status_code < 500), response.text
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["message"]


def body(**fields):
    return json.dumps(GOOD | fields).encode()


MALFORMED = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "a number": b"1",
    "null": b"null",
    "NaN": b'{"prompt":"a","temperature":NaN}',
    "Infinity": b'{"prompt":"a","temperature":-Infinity}',
    "1e400": b'{"prompt":"a","temperature":1e400}',
    "NaN in a list": b'{"prompt":"a","softmeet":{"weights":[NaN,1]}}',
    "1e400 as trust": b'{"prompt":"a","softmeet":{"trust":1e400}}',
    "a huge integer": b'{"prompt":"a","max_tokens":' + b"9" * 5000 + b"}",
    "a large integer": b'{"prompt":"a","temperature":' + b"9" * 400 + b"}",
    "a large seed": b'{"prompt":"a","seed":' + b"9" * 30 + b"}",
    "a large token": b'{"prompt":[' + b"9" * 30 + b"]}",
    "deep lists": b'{"prompt":' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "deep objects": b'{"a":' * 15_000 + b"1" + b"}" * 15_000,
    "invalid UTF-8": b'{"prompt":"\xff\xfe"}',
    "a lone surrogate": b'{"prompt":"\\ud800"}',
    "a lone surrogate as a field": b'{"prompt":"a","\\udfff":1}',
    "a lone surrogate as a stop": b'{"prompt":"a","stop":"\\ud800"}',
    "a wide encoding": '{"prompt":"a"}'.encode("utf-32"),
    "text for a number": body(max_tokens="5"),
    "a float for an integer": body(max_tokens=4.5),
    "truth for a number": body(temperature=True),
    "a negative number": body(max_tokens=-1),
    "a mixed prompt": body(prompt=["a", 1]),
    "an empty prompt": body(prompt=""),
    "a prompt of nothing": body(prompt=[]),
    "an empty prompt among others": body(prompt=["a", ""]),
    "too many prompts": body(prompt=["a"] * 5000),
    "too many stops": body(stop=["a"] * 17),
    "an empty stop": body(stop=""),
    "a long stop": body(stop="a" * 201),
    "a bias on no token": body(logit_bias={"x": 1}),
    "a bias on a negative token": body(logit_bias={"-1": 1}),
    "a bias too far": body(logit_bias={"1": 101}),
    "too many biases": body(logit_bias={str(k): 1 for k in range(1025)}),
    "an unknown field of ours": body(softmeet={"x" * 9000: 1}),
    "a huge name": body(model="x" * 50_000),
    "a huge user": body(user="x" * 201),
    "no temperature": body(temperature=-1),
    "no mass": body(top_p=0),
    "too much mass": body(top_p=1.01),
    "too many log-probabilities": body(logprobs=21),
    "an unknown rule": body(softmeet={"rule": "\0"}),
    "weights that sum to 0": body(softmeet={"weights": [-1, 1]}),
    "no members": body(softmeet={"members": []}),
    "too long": body(prompt="x" * 200_000),
    "a prompt past the context": body(prompt="x" * 90_000),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_body_gets_an_error_object_that_does_not_echo_it(url, name):
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = http.post(url + path, content=MALFORMED[name], headers=JSON)
        assert_is_error(response)
        assert len(response.content) < 1000
    assert http.post(f"{url}/v1/completions", json=GOOD | {"max_tokens": 1}).status_code == 200


def test_other_wrong_requests(url):
    assert_is_error(http.get(f"{url}/docs"), 404)
    assert_is_error(http.post(f"{url}/v1/completions", content=b"x" * 100_001, headers=JSON), 413)
    chunks = (b"x" * 10_000 for _ in range(20))
    assert_is_error(http.post(f"{url}/v1/completions", content=chunks, headers=JSON), 413)


def test_a_slow_body_is_not_waited_for():
    serving = serving_of({"plain": tiny_ensemble("gpt2")}, protection=Protection(body_seconds=0.3))
    with running(serving) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            connection.settimeout(300)
            answer = b""
            while piece := connection.recv(4096):
                answer += piece
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b" 408 " in head.splitlines()[0]
    assert json.loads(content)["error"]["code"] == "body_too_slow"


def test_headers_say_what_browsers_must_not_do(url):
    headers = http.get(f"{url}/v1/models").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "access-control-allow-origin" not in http.get(f"{url}/v1/models", headers={"origin": "http://a.b"}).headers
    assert "server" not in headers or "uvicorn" in headers["server"]


def test_keys_hosts_and_origins(caplog):
    caplog.set_level("DEBUG")
    protection = Protection(keys=("first-key", "second-kéy"), hosts=("127.0.0.1",))
    serving = serving_of({"plain": tiny_ensemble("gpt2")}, protection=protection, cors=("http://page.test",))
    with running(serving) as url:
        for headers in (
            {}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"}, {"authorization": "first-key"},
            {"authorization": "Basic !"}, {"authorization": "Basic /w=="},
        ):  # fmt: skip
            assert_is_error(http.get(f"{url}/v1/models", headers=headers), 401)
            assert_is_error(http.get(f"{url}/metrics", headers=headers), 401)
        assert http.get(f"{url}/health").status_code == 200
        assert http.get(f"{url}/v1/models", auth=("any", "second-kéy")).status_code == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="first-key", max_retries=0)
        assert client.completions.create(model="plain", prompt="secret words", max_tokens=2).choices
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="x").models.list()
        named = {"host": "evil.test", "authorization": "Bearer first-key"}
        for host in ("evil.test", "[2001:db8::1]:80"):
            answer = http.get(f"{url}/v1/models", headers=named | {"host": host})
            assert_is_error(answer, 421)
            assert "start it with --allow-host" in answer.json()["error"]["message"]
        for host in ("evil]example", "127.0.0.1]", "evil]", "a@127.0.0.1", "127.0.0.1:8x"):
            assert_is_error(http.get(f"{url}/v1/models", headers=named | {"host": host}), 400)
        allowed = http.get(f"{url}/health", headers={"origin": "http://page.test"}).headers
        assert allowed["access-control-allow-origin"] == "http://page.test"
        assert "access-control-allow-origin" not in http.get(f"{url}/health", headers={"origin": "http://b"}).headers
    assert "first-key" not in caplog.text
    assert "secret words" not in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_key_may_hold_any_letters_however_a_client_writes_them(encoding):
    protection = Protection(keys=("clé", "ключ"), hosts=("localhost", "Box.test"))
    with running(serving_of({"plain": tiny_ensemble("gpt2")}, protection=protection)) as url:

        def status(key, host="localhost"):
            headers = [(b"authorization", b"Bearer " + key), (b"host", host.encode())]
            return http.get(f"{url}/v1/models", headers=headers).status_code

        assert status("clé".encode(encoding)) == 200
        assert status("ключ".encode()) == 200
        assert [status(wrong) for wrong in (b"cl", b"cl?", b"????", b"cl\xff")] == [401] * 4
        for host in ("LOCALHOST", "LocalHost:80", "BOX.test"):
            assert status("clé".encode(encoding), host) == 200


def test_head_is_answered_wherever_get_is(url):
    for path, status in (("/health", 200), ("/ready", 200), ("/metrics", 200), ("/v1/models", 200), ("/nowhere", 404)):
        answer = http.head(url + path)
        assert (answer.status_code, answer.content) == (status, b"")
        assert int(answer.headers["content-length"]) > 0
    assert http.head(f"{url}/v1/completions").status_code == 405


def test_the_access_log_has_what_an_operator_needs_and_no_more(url, caplog):
    with caplog.at_level("INFO", "softmeet.access"):
        key = {"authorization": "Bearer a-secret-key"}
        asked = GOOD | {"prompt": "a secret prompt"}
        used = http.post(f"{url}/v1/completions?q=a-secret-query", json=asked, headers=key).json()["usage"]
        http.get(f"{url}/a%0Ab")
        every = lambda: [r.getMessage() for r in caplog.records if r.name == "softmeet.access"]  # noqa: E731
        # A request of another test may be noted late.
        lines = lambda: [line for line in every() if line.startswith(("POST", "GET /a"))]  # noqa: E731
        wait_until(lambda: len(lines()) == 2)
    written = r"POST /v1/completions 200 \d+\.\d{3} plain (\d+)\+(\d+) tokens, first \d+\.\d{3}"
    assert tuple(map(int, re.fullmatch(written, lines()[0]).groups())) == (
        used["prompt_tokens"],
        used["completion_tokens"],
    )
    assert re.fullmatch(r"GET /a%0Ab 404 \d+\.\d{3} -", lines()[1])
    assert "secret" not in "".join(every())


def test_a_server_may_forbid_changes():
    serving = serving_of({"plain": tiny_ensemble("gpt2", "llama")}, allowed=("rule",))
    with running(serving) as url:
        asked = GOOD | {"softmeet": {"rule": "prob-mean"}}
        assert http.post(f"{url}/v1/completions", json=asked).status_code == 200
        refused = http.post(f"{url}/v1/completions", json=asked | {"softmeet": {"trust": 1, "weights": [1, 0]}})
        assert_is_error(refused, 400)
        assert "does not let requests change trust, weights" in refused.text


def test_a_full_queue_and_an_answer_that_takes_too_long():
    """The member is held after the first token, until the answer's time is up."""
    ensemble, go, calls = tiny_ensemble("gpt2", rule="logit-mean"), threading.Event(), []

    def hold(*_):
        calls.append(1)
        if len(calls) > 1:
            go.wait(300)

    ensemble.model.members[0].base_model.register_forward_hook(hold)
    serving = serving_of({"plain": ensemble}, limits=Limits(rows=1, waiting=1), seconds=0.8)
    long = GOOD | {"max_tokens": 60, "logit_bias": {"0": -100}}
    with running(serving) as url, ThreadPoolExecutor(2) as pool:
        assert http.get(f"{url}/ready").status_code == 200
        waiting = [pool.submit(http.post, f"{url}/v1/completions", json=long, timeout=300) for _ in range(2)]
        wait_until(lambda: not serving.batcher.has_room)
        busy = http.post(f"{url}/v1/completions", json=GOOD)
        assert_is_error(busy, 429)
        assert busy.headers["retry-after"] == "1"
        assert http.get(f"{url}/ready").status_code == 503
        time.sleep(0.9)
        go.set()
        for response in [w.result() for w in waiting]:
            assert_is_error(response, 504)
        go.clear()
        calls.clear()
        with http.stream("POST", f"{url}/v1/completions", json=long | {"stream": True}, timeout=300) as stream:
            lines = stream.iter_lines()
            events = [next(lines)]
            time.sleep(0.9)
            go.set()
            events += [line for line in lines if line]
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert events[-1] == "data: [DONE]"


def streamed(url, fields):
    """The events of a stream, until the connection closes."""
    with http.stream("POST", f"{url}/v1/completions", json=fields, timeout=600) as stream:
        return [line.removeprefix("data: ") for line in stream.iter_lines() if line]


def outstanding(url):
    """How many sequences the server holds."""
    text = http.get(f"{url}/metrics", timeout=60).text
    return sum(float(text.split(f"\nsoftmeet_{name} ")[1].split()[0]) for name in ("rows", "waiting"))


@pytest.fixture
def terminable():
    """SIGTERM, which ends a process where nobody handles it, is handled; what came is listed."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    yield came
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_sigterm_under_load_ends_every_stream_properly(folders, terminable, caplog):
    """After a first one, answers go on to their end; at a second one, those that are left are ended by name.

    In this process; servers in processes of their own get one from the soak.
    """
    fields = {"prompt": "a", "max_tokens": 60, "logit_bias": {"0": -100}, "stream": True}

    def load(url):
        with ThreadPoolExecutor(16) as pool:
            streams = [pool.submit(streamed, url, fields) for _ in range(16)]
            wait_until(lambda: sum(s.done() for s in streams) + outstanding(url) >= 16)
            os.kill(os.getpid(), signal.SIGTERM)
            before = sum(s.done() for s in streams)
            wait_until(lambda: sum(s.done() for s in streams) > before + 2)
            with pytest.raises(httpx.ConnectError):
                http.get(f"{url}/health")
            os.kill(os.getpid(), signal.SIGTERM)
            return url, [stream.result() for stream in streams]

    named = tiny.each("-m", (f"pair={member}" for member in folders))
    options = "--rule", "logit-mean", "--no-ui", "--grace", "3000", "--batch", "2"
    done, (url, ends) = serve(*named, *options, meanwhile=load)
    reasons = set()
    for events in ends:
        assert events[-1] == "[DONE]"
        last = json.loads(events[-2])
        reasons.add(last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"])
    assert reasons == {"length", "shutting_down"}
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert set(terminable) == {signal.SIGTERM}  # raised again once all is over, for whoever handles it
    assert "Traceback" not in text
    assert "Application shutdown complete" in text
    assert "answers that are being written have 3000 s more: a second signal ends them now" in caplog.text
    assert f"serving pair, running on {url} (Ctrl-C ends it)" in text


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_ends_every_answer_properly(folders):
    fields = {"prompt": "a", "max_tokens": 60, "logit_bias": {"0": -100}}

    def load(url):
        with ThreadPoolExecutor(20) as pool, socket.create_connection(tuple(url.split("//")[1].split(":"))) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            streams = [pool.submit(streamed, url, fields | {"stream": True}) for _ in range(10)]
            wholes = [pool.submit(http.post, f"{url}/v1/completions", json=fields) for _ in range(10)]
            wait_until(lambda: sum(s.done() for s in streams + wholes) + outstanding(url) >= 20)
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: not accepts(url))
            os.kill(os.getpid(), signal.SIGINT)
            return [stream.result() for stream in streams], [whole.result() for whole in wholes]

    named = tiny.each("-m", (f"pair={member}" for member in folders))
    options = "--rule", "logit-mean", "--no-ui", "--grace", "3000", "--batch", "1"
    done, (ends, answers) = serve(*named, *options, meanwhile=load)
    assert all(events[-1] == "[DONE]" for events in ends)
    assert "shutting_down" in {json.loads(events[-2]).get("error", {}).get("code") for events in ends}
    for answer in answers:
        assert answer.status_code == 200 or answer.json()["error"]["code"] == "shutting_down"
    assert done.returncode == 130
    assert "Traceback" not in done.stdout + done.stderr
    assert "Application shutdown complete" in done.stdout + done.stderr


def test_the_command_refuses_what_is_unsafe_or_unclear(folders, tmp_path):
    (tmp_path / "keys").write_text("\n")
    for arguments, message in (
        (["--host", "0.0.0.0"], "refused to listen on 0.0.0.0 without keys"),
        (["--api-keys", tmp_path / "keys"], "expected API keys in"),
        (["--allow", "tol"], "expected --allow as some of rule, trust"),
        (["a=narrow/opt-a", "a=narrow/opt-a"], "got 'a' twice"),
    ):
        done = run("serve", *arguments, "--port", "0")
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.parametrize(("package", "extra"), [("ray", "ray"), ("uvicorn", "server")])
def test_missing_packages_are_named(package, extra, monkeypatch):
    from softmeet import extras

    monkeypatch.setattr(extras, "find_spec", lambda module: None if module == package else module)
    done = run("serve", "--replicas", "2")
    assert done.returncode == 2
    assert f"needs {package}: " in done.stderr
    assert f"[{extra}]'" in done.stderr


def test_members_that_two_ensembles_name_are_loaded_once(folders):
    from softmeet.server.ensembles import load

    found = load({"both": folders, "one": folders[:1]})
    assert len({m for served in found for m in served.ensemble.model.members}) == 2
    assert found.find("one").ensemble.model.members[0] is found.find("both").ensemble.model.members[0]


def test_schemathesis_finds_only_errors_that_are_objects(url):
    """What the OpenAPI document describes, and what it does not, never makes a 500."""
    from malformed import fuzz

    seen = fuzz(url, examples=5)
    assert seen["answered"] >= 5
    assert seen["refused"] >= 50
    assert not seen["wrong"]
