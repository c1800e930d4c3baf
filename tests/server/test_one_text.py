"""One text with a stop string, streamed or whole, on the endpoints that take one: what tests/matrix leaves out."""

from __future__ import annotations

import json

import pytest
from serving import http, running, serving_of

from softmeet import Ensemble

ASKED = {"seed": 5, "max_tokens": 16, "stop": ["e"]}
TALK = [{"role": "user", "content": "Who is it?"}]


@pytest.fixture(scope="module", params=["narrow", "mixed"])
def url(request):
    with running(serving_of({"default": Ensemble.from_pretrained(request.param, "logit-mean")})) as found:
        yield found


def streamed(url, path, body):
    with http.stream("POST", f"{url}/v1/{path}", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


def whole(url, path, body):
    answer = http.post(f"{url}/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_completion_is_one_text(url):
    body = ASKED | {"prompt": "And the king said"}
    text = whole(url, "completions", body)["choices"][0]["text"]
    assert text
    assert "".join(c["text"] for chunk in streamed(url, "completions", body) for c in chunk["choices"]) == text


def test_a_conversation_is_one_text(url):
    body = ASKED | {"messages": TALK, "seed": 6}
    text = whole(url, "chat/completions", body)["choices"][0]["message"]["content"]
    assert text
    chunks = streamed(url, "chat/completions", body)
    assert "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]) == text
