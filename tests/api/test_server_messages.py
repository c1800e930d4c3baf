"""What somebody meets first: the way in, and an answer to each usual mistake that says what to do."""

import re
import socket
from pathlib import Path
from unittest.mock import Mock

import openai
import pytest
from commands import run
from serving import TEMPLATE, http, running, serving_of, tiny_ensemble

from softmeet import __version__
from softmeet.cli import listening, serve
from softmeet.errors import InvalidInputError
from softmeet.server import ensembles as loading
from softmeet.server.security import Protection

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def url():
    ensemble = tiny_ensemble("gpt2", "llama", rule="logit-mean", template=TEMPLATE)
    with running(serving_of({"plain": ensemble, "default": ensemble}, max_tokens=20, strict=True)) as found:
        yield found


def refused(url, path, status=400, **fields):
    answer = http.post(url + path, json=fields)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_the_guides_first_request_works_as_printed(url, capsys):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "serve.md").read_text()
    code = re.search(r"```py\n(.*?)```", page, re.DOTALL)[1]
    assert "http://127.0.0.1:8000" in code
    exec(compile(code.replace("http://127.0.0.1:8000", url), "serve.md", "exec"), {})
    text, *tokens = capsys.readouterr().out.splitlines()
    assert [line[1] for line in tokens][: len(text)] == list(text)


def test_more_tokens_than_the_server_gives_are_refused(url):
    said = "of at most 20, this server's limit, got 100,000: ask for fewer, or start the server with a larger"
    for path, asked in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": CHAT})):
        error = refused(url, path, **asked, max_tokens=100_000)
        assert error["message"].startswith(f"expected max_tokens {said}")
        assert (error["param"], error["type"]) == ("max_tokens", "invalid_request_error")
        assert http.post(url + path, json=asked | {"max_tokens": 20}).status_code == 200
        assert http.post(url + path, json=asked).json()["usage"]["completion_tokens"] <= 20
    # The one that counts, where both are given.
    both = {"messages": CHAT, "max_tokens": 2}
    error = refused(url, "/v1/chat/completions", **both, max_completion_tokens=100_000)
    assert error["message"].startswith(f"expected max_completion_tokens {said}")
    assert error["param"] == "max_completion_tokens"
    assert http.post(f"{url}/v1/chat/completions", json=both | {"max_completion_tokens": 20}).status_code == 200


def test_the_root_says_what_there_is(url):
    answer = http.get(f"{url}/")
    assert answer.status_code == 200
    found = answer.json()
    assert (found["name"], found["version"]) == ("softmeet", __version__)
    assert "--no-ui" in found["page"]
    paths = [path for path in found if path.startswith("/")]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/ready", "/metrics"} <= {*paths}
    for path in (found["openapi"], "/v1/models", "/health", "/metrics"):
        assert http.get(url + path).status_code == 200


def test_the_root_and_the_page_tell_nothing_of_what_is_served_without_a_key():
    protection = Protection(keys=("key",), hosts=("127.0.0.1",))
    with running(serving_of({"plain": tiny_ensemble("gpt2")}, protection=protection, ui=True)) as url:
        for path in ("/", "/ui/", "/ui/main.js"):
            answer = http.get(f"{url}{path}")
            assert (answer.status_code < 400, "plain" in answer.text.replace("plain:", "")) == (True, False)
        for path in ("/v1/models", "/openapi.json", "/uimain.js", "/ui/../v1/models", "//ui"):
            assert http.get(f"{url}{path}").status_code == 401
        assert http.get(f"{url}/", headers={"host": "evil.test"}).status_code == 421
        for path in ("/", "/ui"):  # whatever stands before the server, and below whatever path
            assert http.get(f"{url}{path}").headers["location"] == "ui/"
        assert http.get(f"{url}/ui/look.js").headers["cross-origin-resource-policy"] == "same-origin"


def test_a_wrong_name_path_or_method_gets_the_right_one(url):
    nothing = refused(url, "/nowhere", 404)["message"]
    assert nothing.startswith("there is nothing at /nowhere: expected one of /v1/models, ")
    assert "/ui" not in nothing  # which is not served here
    assert "did you mean plain?" in refused(url, "/v1/completions", 404, prompt="a", model="plane")["message"]
    with pytest.raises(openai.NotFoundError, match="did you mean /v1/chat/completions"):
        openai.OpenAI(base_url=url, api_key="none", max_retries=0).chat.completions.create(model="plain", messages=CHAT)
    answer = http.get(f"{url}/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["message"].startswith("expected POST at /v1/completions, with the request as JSON")
    assert http.post(f"{url}/v1/models").json()["error"]["message"] == "expected GET at /v1/models, got POST"
    form = {"content-type": "application/x-www-form-urlencoded"}
    answer = http.post(f"{url}/v1/completions", content=b'{"prompt": "a"}', headers=form)
    assert answer.status_code == 415
    assert "with curl by -H 'content-type: application/json'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("more", [[], ["--replicas", "2"]])
def test_an_address_that_cannot_be_had_is_said_before_anything_is_loaded(monkeypatch, more):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("went on"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", port, *more)
        assert done.returncode == 2
        assert done.stderr.startswith(
            f"error: http://127.0.0.1:{port} is in use: end the program that listens there, or"
        )
        assert len(done.stderr.splitlines()) == 1
    done = run("serve", "--port", 0, "--host", "192.0.2.1", "--open", *more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot listen on http://192.0.2.1:0 (")


def test_a_port_is_kept_from_the_beginning_for_every_address_of_a_host(monkeypatch):
    with listening.listening("localhost", 0) as sockets:
        port = listening.port_of(sockets)
        with (
            pytest.raises(InvalidInputError, match=f"http://127.0.0.1:{port} is in use"),
            listening.listening("127.0.0.1", port),
        ):
            pass
    # As on a machine without IPv6.
    addresses = ((socket.AF_INET6, ("2001:db8::1", 0, 0, 0)), (socket.AF_INET, ("127.0.0.1", 0)))
    found = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listening.listening("localhost", 0) as sockets:
        assert [s.getsockname()[0] for s in sockets] == ["127.0.0.1"]


def test_a_host_without_an_address_is_no_host(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=socket.gaierror(-2, "Name or service not known")))
    with (
        pytest.raises(InvalidInputError, match=r"listen on http://nowhere:8000 \(Name or"),
        listening.listening("nowhere", 8000),
    ):
        pass


def test_what_is_served_is_announced_in_two_lines(capsys, monkeypatch):
    for host, url in (("127.0.0.1", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000")):
        serve._announce("plain", listening.url_of(host, 8000), page=True)
        first, second = capsys.readouterr().err.splitlines()
        assert first == f"serving plain, running on {url} (Ctrl-C ends it)"
        assert second == f"page: {url}/ui, metrics: {url}/metrics, OpenAI clients: base_url={url}/v1"
    monkeypatch.setattr(socket, "gethostname", lambda: "lectern")
    assert listening.url_to_open("0.0.0.0", 8000) == listening.url_to_open("::", 8000) == "http://lectern:8000"
    assert listening.url_to_open("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    serve._announce("plain", "http://host:1", page=False)
    assert "/ui" not in capsys.readouterr().err
