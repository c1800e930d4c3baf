"""Texts as token ids and back, and the version, as vLLM's clients ask for them."""

import json
import socket
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.parse import urlsplit

import pytest
from serving import TEMPLATE, http, running, serving_of, tiny_ensemble

from softmeet import __version__
from softmeet.server import prompts as prompts_module
from softmeet.server.limits import Limits
from softmeet.server.security import Protection


@pytest.fixture(scope="module")
def url():
    plain = tiny_ensemble("gpt2", rule="logit-mean")
    chatty = tiny_ensemble("llama", rule="logit-mean", template=TEMPLATE)
    with running(serving_of({"plain": plain, "chatty": chatty}, strict=True)) as found:
        yield found


def ask(url, path, status=200, **fields):
    answer = http.post(f"{url}/{path}", json=fields)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def test_a_prompt_becomes_ids_and_a_text_again(url):
    found = ask(url, "tokenize", prompt="hello", model="plain")
    assert found == {"count": 5, "max_model_len": 64, "tokens": [8, 5, 12, 12, 15], "token_strs": None}
    assert ask(url, "detokenize", tokens=found["tokens"]) == {"prompt": "hello"}
    assert ask(url, "detokenize", tokens=[8, 0]) == {"prompt": "h<|end|>"}
    assert ask(url, "tokenize", prompt="he", return_token_strs=True)["token_strs"] == ["h", "e"]
    assert ask(url, "tokenize", prompt="", add_special_tokens=False)["count"] == 0
    # These are the ids that a completion takes.
    text = http.post(f"{url}/v1/completions", json={"prompt": found["tokens"], "seed": 1}).json()["choices"][0]["text"]
    assert text == http.post(f"{url}/v1/completions", json={"prompt": "hello", "seed": 1}).json()["choices"][0]["text"]


def test_messages_are_written_as_the_chat_template_says(url):
    messages = [{"role": "user", "content": "hi"}]
    found = ask(url, "tokenize", model="chatty", messages=messages)
    assert ask(url, "detokenize", model="chatty", tokens=found["tokens"]) == {"prompt": "u:hi!a:"}
    chat = http.post(f"{url}/v1/chat/completions", json={"model": "chatty", "messages": messages, "max_tokens": 1})
    assert chat.json()["usage"]["prompt_tokens"] == found["count"]


@pytest.mark.parametrize("path", ["tokenize", "v1/completions"])
def test_a_text_that_fits_into_no_context_is_not_cut_into_tokens(url, monkeypatch, path):
    monkeypatch.setattr(prompts_module, "token_texts", lambda _: Mock(longest=8))
    monkeypatch.setattr(prompts_module, "encoded", Mock(side_effect=AssertionError("was cut into tokens")))
    error = ask(url, path, status=400, prompt="a" * (4 * 8 * 64 + 1))
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert error["message"].endswith("got a text of 2,049 characters: shorten it")


@pytest.mark.parametrize("longest", [8, 10_000])
@pytest.mark.parametrize(
    ("path", "field"), [("v1/chat/completions", "messages"), ("v1/responses", "input"), ("tokenize", "messages")]
)
def test_a_chat_that_fits_into_no_context_is_not_cut_into_tokens(url, monkeypatch, path, field, longest):
    """Its characters tell or, where there are long tokens, the first of its pieces."""
    cut, count = Mock(), Mock(side_effect=prompts_module._tokens)
    monkeypatch.setattr(prompts_module, "templated", cut)
    monkeypatch.setattr(prompts_module, "_tokens", count)
    monkeypatch.setattr(prompts_module, "token_texts", lambda tokenizer: SimpleNamespace(longest=longest))
    chat = {"messages": [{"role": "user", "content": "a" * 500_000}, {"role": "user", "content": "a" * 400_000}]}
    body = {"input": "a" * 900_000} if field == "input" else chat
    error = ask(url, path, 400, model="chatty", **body)
    assert (error["param"], error["code"]) == (field, "context_length_exceeded")
    assert error["message"].startswith("expected a prompt of at most 64 tokens, the shortest member's context")
    assert error["message"].endswith("got a text of 900,000 characters: shorten it")
    assert cut.call_count == 0
    assert count.call_count == (longest > 8)


@pytest.fixture
def held(monkeypatch):
    """A function that holds up what reads texts; it returns (is one held, to let them go, the names of who read)."""

    def hold(*names, when=lambda *_: True):
        begun, done, read = threading.Event(), threading.Event(), []

        def slow(name, original, *told, **options):
            if when(*told):
                read.append(name)
                begun.set()
                assert done.wait(300)
            return original(*told, **options)

        for name in names:
            monkeypatch.setattr(prompts_module, name, partial(slow, name, getattr(prompts_module, name)))
        return begun, done, read

    return hold


@pytest.mark.parametrize("messages", [None, [{"role": "user", "content": "a"}] * 400])
def test_short_texts_do_not_wait_for_long_ones(url, held, messages):
    name = "templated" if messages else "tokens_of"
    begun, done, _ = held(name, when=lambda _, text, *__: messages or len(text) > prompts_module.LONG)
    body = {"prompt": "a" * 20_000} if messages is None else {"model": "chatty", "messages": messages}
    path = "completions" if messages is None else "chat/completions"
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(http.post, f"{url}/v1/{path}", json=body | {"truncate_prompt_tokens": 5, "max_tokens": 1})
        assert begun.wait(300)
        assert http.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        assert not long.done()
        done.set()
        assert long.result().json()["usage"]["prompt_tokens"] == 5


def test_a_model_that_there_is_not_is_told_and_so_is_a_body_that_is_no_json(url):
    for path, fields in (("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [1]})):
        assert ask(url, path, status=404, model="plan", **fields)["code"] == "model_not_found"
        broken = http.post(f"{url}/{path}", content="{", headers={"content-type": "application/json"})
        assert broken.status_code == 400
        assert broken.json()["error"]["type"] == "invalid_request_error"
        assert http.post(f"{url}/{path}", content="{}").status_code == 415


def test_the_version_is_told_to_who_has_a_key(url):
    assert http.get(f"{url}/version").json() == {"version": __version__}
    with running(serving_of({"a": tiny_ensemble("gpt2")}, protection=Protection(keys=("key",)))) as closed:
        for path in ("version", "tokenize", "detokenize"):
            assert http.get(f"{closed}/{path}").status_code == 401


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_texts_of_clients_that_have_left_are_not_read(url, held, path):
    begun, done, read = held("templated", "tokens_of", "encoded")
    told = {"messages": [{"role": "user", "content": "a"}], "model": "chatty", "max_tokens": 1}
    texts = {"/v1/completions": {"prompt": "a"}, "/tokenize": {"prompt": "a"},
             "/v1/responses": {"input": "a", "model": "chatty"}}  # fmt: skip
    body = json.dumps(texts.get(path, told)).encode()
    asked = urlsplit(url)
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(http.post, f"{url}/v1/completions", json={"prompt": "b", "max_tokens": 1})
        assert begun.wait(300)
        leaving = [socket.create_connection((asked.hostname, asked.port)) for _ in range(20)]
        for one in leaving:
            one.sendall(head.encode() + body)
        time.sleep(0.5)  # until all wait for the thread that reads texts
        for one in leaving:
            one.close()
        time.sleep(0.5)
        last = pool.submit(http.post, f"{url}/v1/completions", json={"prompt": "c", "max_tokens": 1})
        done.set()
        assert (first.result(300).status_code, last.result(300).status_code) == (200, 200)
    assert len(read) < 10


def test_no_more_texts_wait_than_there_are_places(held):
    _, done, _ = held("encoded")
    serving = serving_of({"plain": tiny_ensemble("gpt2", rule="logit-mean")}, limits=Limits(rows=2, waiting=2))
    with running(serving) as url, ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(http.post, f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1})
                 for _ in range(12)]  # fmt: skip
        refused = [one.result(300) for one in wait(asked[:12], 300, FIRST_COMPLETED).done]
        assert {one.status_code for one in refused} == {429}
        assert "expected at most 4 requests whose texts wait to be read" in refused[0].text
        done.set()
        assert {one.result(300).status_code for one in asked} == {200, 429}
