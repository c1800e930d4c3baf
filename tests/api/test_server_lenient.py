"""What common clients ask for that there is not here: passed over and told once, unless the server is strict."""

import os
import signal

import pytest
from serving import TEMPLATE, http, running, serve, serving_of, tiny_ensemble

from softmeet.server import serving as preparing
from softmeet.server import strict

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "seed": 1}
GOOD = {"prompt": "hello", "max_tokens": 4, "seed": 1}
ENDLESS = {"logit_bias": {"0": -100}}


@pytest.fixture
def url():
    ensembles = {name: tiny_ensemble("gpt2", "llama", rule="logit-mean", template=TEMPLATE) for name in ("one", "two")}
    with running(serving_of(ensembles)) as found:
        yield found


def test_unknown_fields_and_models_are_passed_over_and_told_once(url, caplog):
    turn = {**CHAT["messages"][0], "refusal": None, "thinking": "secret"}
    asked = {**CHAT, "model": "gpt-4o", "messages": [turn], "reasoning_effort": "low", "tools": [], "rule": None}
    odd = {**CHAT, "model": "a secret\n", "a secret": 1}
    plain = http.post(f"{url}/v1/chat/completions", json=CHAT).json()
    for body in (asked, asked, odd):
        answer = http.post(f"{url}/v1/chat/completions", json=body).json()
        assert (answer["model"], answer["choices"]) == ("one", plain["choices"])
    said = [record.message for record in caplog.records if record.name == "softmeet.server"]
    assert sorted(said) == [
        "requests ask for the model gpt-4o, and one answers; --strict refuses them",
        "requests have the field reasoning_effort, which is unknown here and ignored; --strict refuses it",
        "requests have the field thinking, which is unknown here and ignored; --strict refuses it",
    ]
    assert "secret" not in caplog.text


def test_no_client_fills_the_log(url, caplog, monkeypatch):
    monkeypatch.setattr(strict, "_LINES", 3)
    for k in range(5):
        assert http.post(f"{url}/v1/completions", json={**GOOD, f"x{k}": 1}).status_code == 200
    said = [record.message for record in caplog.records if record.name == "softmeet.server"]
    assert [line.split()[4] for line in said] == ["x0,", "x1,", "x2,"]


def test_a_strict_server_refuses_fields_models_and_options():
    chat = {"model": "narrow", "messages": CHAT["messages"]}

    def visit(url):
        asked = [GOOD | {"x": 1}, GOOD | {"model": "x"}, GOOD]
        answers = [http.post(f"{url}/v1/completions", json=body) for body in asked]
        answers.append(http.post(f"{url}/api/chat", json=chat | {"options": {"mirostat": 1, "num_ctx": 9}}))
        os.kill(os.getpid(), signal.SIGINT)
        return [answer.status_code for answer in answers], answers[-1].json()

    _, (statuses, said) = serve("narrow", "--strict", "--no-ui", meanwhile=visit)
    assert statuses == [400, 404, 200, 400]
    assert said == {"error": "options.mirostat is not supported: leave it out"}


def test_an_answer_has_one_usual_length_on_every_road(url, monkeypatch):
    monkeypatch.setattr(preparing, "ANSWER_TOKENS", 7)
    roads = {
        "/v1/completions": ({"prompt": "a"}, "completion_tokens"),
        "/v1/chat/completions": ({"messages": CHAT["messages"]}, "completion_tokens"),
        "/v1/responses": ({"input": "hi"}, "output_tokens"),
    }
    for path, (body, count) in roads.items():
        assert http.post(url + path, json=body | ENDLESS).json()["usage"][count] == 7
    talked = {"model": "one", "messages": CHAT["messages"], "stream": False}
    assert http.post(f"{url}/api/chat", json=talked).json()["eval_count"] <= 7


def test_statuses_are_counted_where_they_are_asked_for(url):
    for path, body in (("/v1/completions", GOOD), ("/v1/chat/completions", CHAT)):
        assert "softmeet" not in http.post(url + path, json=body).json()["choices"][0]
        asked = body | {"softmeet": {"statuses": True}}
        answer = http.post(url + path, json=asked).json()
        assert answer["choices"][0]["softmeet"] == {"statuses": {"OPTIMAL": answer["usage"]["completion_tokens"]}}
