"""One text, streamed or whole, on every endpoint and by generate, where tests/matrix does not ask for it."""

from __future__ import annotations

import json

import pytest
from serving import http, running, serving_of

from softmeet import Ensemble, Structure

PROMPT, TALK = "And the king said", [{"role": "user", "content": "Who is it?"}]
CLOCK = r" (noon|[0-9]{1,2} of the clock|é{2,4})"
# What a request asks for, in the fields of the server and of generate.
ASKED = {
    "a structure": ({"structured_outputs": {"regex": CLOCK}}, {"structure": Structure.regex(CLOCK)}),
    "a stop string": ({"stop": ["e"]}, None),
}


@pytest.fixture(scope="module", params=["narrow", "mixed"])
def served(request):
    ensemble = Ensemble.from_pretrained(request.param, "logit-mean")
    with running(serving_of({"default": ensemble})) as url:
        yield ensemble, url


def streamed(url, path, body):
    with http.stream("POST", f"{url}/v1/{path}", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


def whole(url, path, body):
    answer = http.post(f"{url}/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("what", ASKED)
def test_a_completion_is_one_text(served, what):
    ensemble, url = served
    fields, options = ASKED[what]
    body = {"prompt": PROMPT, "seed": 5, "max_tokens": 24} | fields
    text = whole(url, "completions", body)["choices"][0]["text"]
    assert text
    assert "".join(c["text"] for chunk in streamed(url, "completions", body) for c in chunk["choices"]) == text
    if options is not None:
        how = {"seed": 5, "max_new_tokens": 24, "do_sample": True, "top_k": 0} | options
        assert ensemble.generate(PROMPT, **how) == text
        assert "".join(ensemble.stream(PROMPT, **how)) == text


@pytest.mark.parametrize("what", ASKED)
def test_a_conversation_is_one_text(served, what):
    ensemble, url = served
    fields, options = ASKED[what]
    body = {"messages": TALK, "seed": 6, "max_tokens": 24} | fields
    text = whole(url, "chat/completions", body)["choices"][0]["message"]["content"]
    assert text
    chunks = streamed(url, "chat/completions", body)
    assert "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]) == text
    if what != "a stop string":  # which responses do not have
        asked = {"input": "Who is it?", "seed": 6, "max_output_tokens": 24} | fields
        (item,) = whole(url, "responses", asked)["output"]
        assert "".join(part["text"] for part in item["content"]) == text
        events = streamed(url, "responses", asked)
        assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == text
    if options is not None:
        how = {"seed": 6, "max_new_tokens": 24, "do_sample": True, "top_k": 0} | options
        assert ensemble.generate(TALK, **how) == text
        assert "".join(ensemble.stream(TALK, **how)) == text
