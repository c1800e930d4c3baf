"""What somebody who serves models elsewhere expects: limits that are told, settings that are used, figures of now."""

import json
import math
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
from commands import run
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from serving import http, running, serving_of, tiny_ensemble

from softmeet.cli import serve
from softmeet.errors import InvalidInputError
from softmeet.server import prompts as prompts_module
from softmeet.server import serving as served_module
from softmeet.server.app import create_app
from softmeet.server.limits import Limits
from softmeet.server.security import Protection

ROOT = Path(__file__).parents[2]
PATH = "/v1/completions"
MANY = json.dumps({f"f{k}": 1 for k in range(60_000)}).encode()


@pytest.fixture(scope="module")
def url():
    ensemble = tiny_ensemble("gpt2", "llama", rule="logit-mean")
    protection = Protection(hosts=("127.0.0.1",))
    limits = Limits(rows=2, waiting=3)
    with running(serving_of({"duo": ensemble}, limits=limits, protection=protection, strict=True)) as found:
        yield found


def ask(url, **fields):
    return http.post(url + PATH, json={"prompt": "a", "max_tokens": 2, "seed": 1} | fields)


def refused(url, **fields):
    answer = ask(url, **fields)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def test_a_request_that_can_never_fit_is_not_told_to_come_again(url):
    said = "expected at most 5 choices in all, this server's room, --batch and --queue together, got"
    error = refused(url, n=100)
    assert error["message"] == f"{said} 100 (1 prompt with n = 100): send fewer in each request"
    assert error["param"] == "n"
    error = refused(url, prompt=["a", "b", "c"], n=2)
    assert error["message"].startswith(f"{said} 6 (3 prompts with n = 2)")
    assert refused(url, prompt=["a"] * 6)["param"] == "prompt"
    assert ask(url, n=5).status_code == 200


def trusting(own, **settings):
    ensemble = tiny_ensemble("gpt2", "llama")
    ensemble.model.config.settings = ensemble.model.config.settings.changed(trust=own)
    return serving_of({"duo": ensemble}, **settings)


@pytest.mark.parametrize(
    "asked",
    [
        {"trust": 1e6}, {"trust": 100.5}, {"trust": "inf"}, {"trust": "1e9"}, {"trust": 1e300}, {"trust": [1, 101]},
        {"trust": ["inf", 1]}, {"rule": "meet:trust=1/1e6"}, {"rule": "meet:trust=inf"}, {"rule": "meet:trust=1e400"},
        {"rule": "max-entropy:trust=1e6"}, {"rule": "max-entropy", "trust": "inf"},
        {"trust": "inf", "members": ["tiny/gpt2"]},
    ],
)  # fmt: skip
def test_a_trust_above_the_limit_is_refused_however_it_is_spelled(trusted, asked):
    error = refused(trusted, softmeet=asked)
    assert (error["type"], error["param"]) == ("invalid_request_error", "softmeet.trust")
    expected = "'inf'" if asked.get("trust") == "1e9" else "expected a trust of at most 100, this server's limit, got"
    assert expected in error["message"]


@pytest.mark.parametrize(
    "asked", [{}, {"trust": 100}, {"trust": [0, 99.5]}, {"rule": "meet:trust=0.5/100"}, {"rule": "max-entropy"}]
)
def test_trusts_within_the_limit_are_used(trusted, asked):
    assert ask(trusted, softmeet=asked).status_code == 200


@pytest.fixture(scope="module")
def trusted():
    with running(trusting(1.0)) as url:
        yield url


def test_the_operators_own_trust_always_works():
    with running(trusting([math.inf, 2.0], max_trust=1.0)) as url:
        for asked in (
            {}, {"members": ["tiny/gpt2"]}, {"trust": ["inf", 2]}, {"trust": [5, 1]}, {"rule": "max-entropy"},
            {"trust": 7, "members": ["tiny/gpt2"]}, {"rule": "meet:trust=inf/0"},
        ):  # fmt: skip
            assert ask(url, softmeet=asked).status_code == 200
        for asked in ({"trust": [1, 3]}, {"trust": "inf"}, {"trust": 3, "members": ["tiny/llama"]}):
            assert refused(url, softmeet=asked)["param"] == "softmeet.trust"


def test_a_server_may_allow_any_trust():
    with running(trusting(1.0, max_trust=math.inf)) as url:
        for trust in (1e6, [1, "inf"]):
            assert ask(url, max_tokens=1, softmeet={"trust": trust}).status_code == 200


def prompts(count, item):
    return b'{"prompt":[' + b",".join([item] * count) + b"]}"


@pytest.mark.parametrize(
    "body",
    [
        prompts(400_000, b"1")[:-2] + b',"a"]}', prompts(200_000, b"[1]"), prompts(150_000, b'["a"]'),
        prompts(200_000, b'"a"'), b'{"prompt":"a","metadata":' + MANY, b'{"prompt":"a","logit_bias":' + MANY, MANY[:-1],
    ],
    ids=["mixed", "many lists", "wrong lists", "many texts", "metadata", "logit_bias", "fields"],
)  # fmt: skip
def test_what_is_wrong_many_times_is_refused_by_one_error(body, monkeypatch):
    """Not by one for each, which takes seconds, in which nobody is served."""
    raw, seen = body if body.endswith(b"]}") else body + b"}", []
    kept = RequestValidationError.errors
    monkeypatch.setattr(RequestValidationError, "errors", lambda self: seen.append(len(kept(self))) or kept(self))
    tokenizing = Mock(side_effect=AssertionError("was cut into tokens"))
    monkeypatch.setattr(prompts_module, "encoded", tokenizing)
    with TestClient(create_app(serving_of({"duo": tiny_ensemble("gpt2", rule="logit-mean")}))) as client:
        answer = client.post(PATH, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert max(seen, default=0) < 10
    if raw.startswith(b'{"f0"'):
        said = "expected one JSON object of a few fields as the body, got an object of 60,000"
        assert answer.json()["error"]["message"] == said


def test_an_answer_lists_no_more_than_memory_holds(monkeypatch):
    with running(serving_of({"duo": tiny_ensemble("gpt2", "llama", rule="logit-mean")})) as url:
        monkeypatch.setattr(served_module, "_MOST_LISTED", 1000)
        assert ask(url, max_tokens=20, logprobs=10, n=5).status_code == 200
        for more in ({"n": 6}, {"logprobs": 11}, {"max_tokens": 21}, {"softmeet": {"report": 1}}):
            said = refused(url, **{"max_tokens": 20, "logprobs": 10, "n": 5} | more)["message"]
            assert said.startswith("expected at most 1,000 log-probabilities in an answer, got 1,")
        echo = {"max_tokens": 0, "echo": True, "prompt": "a" * 50}
        assert ask(url, **echo, logprobs=20).status_code == 200
        assert "50 tokens with 24 each" in refused(url, **echo, softmeet={"report": 6})["message"]


def test_settings_without_effect_are_refused_where_asked_for_and_else_not_told(url):
    for ours in ({"rule": "prob-mean", "trust": 1.0}, {"trust": 0.5}, {"rule": "prob-mean:trust=1"}):
        error = refused(url, softmeet=ours)
        assert re.match(r"the rule (prob|logit)-mean uses no trust: leave it out, or ask for a rule", error["message"])
        assert (error["param"], error["code"]) == ("softmeet.trust", "invalid_value")
    assert refused(url, softmeet={"pool": "prob-mean"})["param"] == "softmeet.pool"
    common = {"members", "rule", "weights"}
    assert {*ask(url).json()["softmeet"]} == common | {"seed"}
    told = ask(url, softmeet={"rule": "meet", "trust": 0.5}).json()["softmeet"]
    assert {*told} == common | {"seed", "trust", "pool"}
    assert told["trust"] == [0.5, 0.5]
    model = http.get(f"{url}/v1/models/duo").json()["softmeet"]
    facts = {"gate", "context", "vocabulary", "max_tokens", "chat", "sources", "may_change", "rules"}
    assert {*model} == common | facts
    assert (model["rules"]["meet"], model["rules"]["prob-mean"]) == ([], ["trust", "pool"])


def test_every_metric_has_its_line_in_the_guide(url):
    ask(url)
    text = http.get(f"{url}/metrics").text
    assert "_created" not in text
    found = set(re.findall(r"^# TYPE (softmeet_\w+)", text, re.MULTILINE))
    page = (ROOT / "docs" / "guides" / "serve.md").read_text()
    assert found == set(re.findall(r"^\| `(softmeet_\w+)", page, re.MULTILINE))


def test_keys_are_never_repeated(monkeypatch, tmp_path):
    done = run("serve", "--api-keys", "sk-secret", "--port", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected --api-keys as the path of a file with one key on each line")
    assert "secret" not in done.stderr
    file = tmp_path / "secret"
    file.write_text("one\n")
    monkeypatch.setenv("SOFTMEET_API_KEYS", str(file))
    done = run("serve", "--port", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected the keys themselves in $SOFTMEET_API_KEYS, between commas, got the")
    assert "secret" not in done.stderr
    keys = f"one,{'x' * 5000}"
    monkeypatch.setenv("SOFTMEET_API_KEYS", keys)
    assert serve._keys(None) == tuple(keys.split(","))
    file.write_bytes(b"\xff")
    with pytest.raises(InvalidInputError, match="no text in UTF-8"):
        serve._keys(file)
    assert "the keys in $SOFTMEET_API_KEYS, between commas" in " ".join(run("serve", "--help").stdout.split())


def test_models_that_are_served_each_alone_are_told_of(monkeypatch, tmp_path):
    monkeypatch.setattr("softmeet.server.process.run", lambda *_, **__: None)
    a, b = (tiny.save(tmp_path / name, name) for name in ("gpt2", "llama"))
    done = run("serve", a, b, "--port", "0", "--no-ui", "--rule", "logit-mean")
    assert f"are single models, each served alone: to combine them into one, say -m {a} -m {b}" in done.stderr
    mixed = run("serve", "-m", f"duo={a}", "-m", b, "--port", "0", "--no-ui", "--rule", "logit-mean").stderr
    assert "duo and default are single models, each served alone" in mixed
    for arguments in ((a,), ("-m", f"duo={a}", "-m", f"duo={b}"), ("-m", a, "-m", b)):
        assert "single" not in run("serve", *arguments, "--port", "0", "--no-ui", "--rule", "logit-mean").stderr
