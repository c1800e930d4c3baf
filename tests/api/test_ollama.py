"""ollama's own API, as its real client for Python meets it."""

import json

import ollama
import pytest
from serving import http, running, serving_of

from softmeet import Ensemble, __version__
from softmeet.server import answer as answering
from softmeet.server.errors import InternalError
from softmeet.server.security import Protection
from softmeet.server.sequences import Failed

TURNS = [{"role": "user", "content": "Who is it?"}]
CALL = '<tool_call>\n{"name": "now", "arguments": {"zone": "a"}}\n</tool_call>'
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
OPTIONS = {
    "temperature": 0.6, "seed": 3, "num_predict": 8, "top_k": 30, "top_p": 0.9, "repeat_penalty": 1.1, "stop": ["zz"],
    "num_ctx": 2048, "num_gpu": 1,
}  # fmt: skip
SAME = {"temperature": 0.6, "seed": 3, "max_tokens": 8, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def ensemble():
    found = Ensemble.from_pretrained(["narrow/opt-a", "narrow/opt-b"], "logit-mean")
    for tokenizer in (found.tokenizer, *found.model.chat.tokenizers):
        tokenizer.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def url(ensemble):
    with running(serving_of({"first": ensemble, "one": ensemble})) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    with ollama.Client(url) as found:
        yield found


def ours(url, **body):
    path = "completions" if "prompt" in body else "chat/completions"
    choice = http.post(f"{url}/v1/{path}", json=SAME | body).json()["choices"][0]
    return choice["text"] if "prompt" in body else choice["message"]["content"]


def test_a_chat_is_answered_as_by_the_other_api_whole_and_streamed(client, url):
    asked = {"model": "one:latest", "messages": TURNS, "options": OPTIONS, "keep_alive": "5m", "think": False}
    whole = client.chat(**asked)
    assert whole.message.role == "assistant"
    assert whole.message.content == ours(url, messages=TURNS)
    *parts, last = client.chat(**asked, stream=True)
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert not any(part.done for part in parts)
    for end in (whole, last):
        assert (end.model, end.done, end.done_reason, end.eval_count) == ("one", True, "length", 8)
        assert end.prompt_eval_count == len(client_tokens(url))
        assert end.total_duration == pytest.approx(end.prompt_eval_duration + end.eval_duration, abs=2)
        assert 0 < end.prompt_eval_duration < end.total_duration
    assert len(parts) > 3


def client_tokens(url):
    return http.post(f"{url}/tokenize", json={"messages": TURNS}).json()["tokens"]


def test_a_prompt_is_a_users_message_or_raw(client, url):
    asked = {"model": "one", "prompt": "And the king", "options": OPTIONS}
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And the king"}
    assert client.generate(**asked).response == ours(url, messages=[user])
    assert client.generate(**asked, system="Be brief.").response == ours(url, messages=[system, user])
    parts = list(client.generate(**asked, raw=True, stream=True, logprobs=True, top_logprobs=2))
    assert "".join(part.response for part in parts) == ours(url, prompt="And the king")
    listed = [entry for part in parts for entry in part.logprobs]
    assert "".join(entry.token for entry in listed) == ours(url, prompt="And the king")
    assert {len(entry.top_logprobs) for entry in listed} == {2}
    loaded = client.generate("one")
    assert (loaded.response, loaded.done, loaded.done_reason) == ("", True, "load")


def test_a_form_is_kept_to(client):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    assert json.loads(client.chat("one", TURNS, format=schema).message.content) in ({"a": 1}, {"a": 2})
    assert client.generate("one", "hi", format="json", options={"num_predict": 9}).response.startswith("{")


def test_functions_are_told_and_called(client, monkeypatch, ensemble):
    def now(zone: str) -> str:
        """Tell the time.

        Args:
            zone: where.
        """

    alone = client.chat("one", TURNS, options={"num_predict": 1}).prompt_eval_count
    call = {"function": {"name": "now", "arguments": {"zone": "a"}}}
    turns = [*TURNS, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_name": "now", "content": "3"}]
    assert client.chat("one", turns, tools=[now], options={"num_predict": 1}).prompt_eval_count > alone + 50
    # The members are made to say the call.
    monkeypatch.setattr("softmeet.server.answer.TextStream.push", lambda self, token: "")
    monkeypatch.setattr("softmeet.server.answer.TextStream.end", lambda self: f"Wait. {CALL}")
    whole = client.chat("one", TURNS, tools=[now], options=OPTIONS)
    *_, said, last = client.chat("one", TURNS, tools=[now], options=OPTIONS, stream=True)
    for message in (whole.message, said.message):
        assert message.content == "Wait. "
        assert [(one.function.name, one.function.arguments) for one in message.tool_calls] == [("now", {"zone": "a"})]
    assert (last.done, last.message.tool_calls) == (True, None)


def test_what_there_is(client, url):
    assert [found.model for found in client.list().models] == ["first", "one"]
    assert [found.name for found in client.ps().models] == ["first", "one"]
    shown = client.show("one")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo["softmeet.context_length"] == 256
    assert shown.modelinfo["softmeet.members"] == ["narrow/opt-a", "narrow/opt-b"]
    assert http.get(f"{url}/api/version").json() == {"version": __version__}


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ({"think": True}, 400, '"one" does not support thinking'),
        ({"options": {"num_predict": 10**6}}, 400, "expected num_predict of at most 256"),
        ({"options": {"repeat_penalty": "x"}}, 400, "expected repeat_penalty to be a valid number, got 'x'"),
        ({"messages": [{"role": "x", "content": "a"}]}, 400, "expected messages.0.role to be 'system'"),
        ({"messages": [{**TURNS[0], "images": ["aGk="]}]}, 400, "the members read only text"),
        ({"format": {"type": "nothing"}}, 400, "expected a JSON schema that texts can follow"),
    ],
)
def test_errors_are_in_the_clients_words(client, given, status, said):
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat(**{"model": "one", "messages": TURNS} | given)
    assert caught.value.status_code == status
    assert said in caught.value.error


def test_other_errors_have_the_same_form(client, url, ensemble, monkeypatch):
    with pytest.raises(ollama.ResponseError, match="there is no model 'two'"):
        client.show("two")
    with pytest.raises(ollama.ResponseError, match="there is nothing at /api/embed"):
        client.embed("one", "a")
    with pytest.raises(ollama.ResponseError, match="suffix is not supported"):
        client.generate("one", "a", suffix="b")
    with running(serving_of({"one": ensemble}, protection=Protection(keys=("key",)))) as closed:
        with ollama.Client(closed) as nobody, pytest.raises(ollama.ResponseError, match="a valid API key") as caught:
            nobody.list()
        assert caught.value.status_code == 401
        with ollama.Client(closed, headers={"Authorization": "Bearer key"}) as known:
            assert known.list().models
    foreign = http.post(f"{url}/api/chat", content=b'{"model": "one"}', headers={"content-type": "text/plain"})
    assert (foreign.status_code, "content-type: application/json" in foreign.json()["error"]) == (415, True)
    kept = answering.AnswerStream._delta

    def failing(self, index, event):
        return kept(self, index, Failed(InternalError("secret")) if self.completion_tokens == 3 else event)

    monkeypatch.setattr(answering.AnswerStream, "_delta", failing)
    with pytest.raises(ollama.ResponseError, match="the server failed: its log says why"):
        list(client.chat("one", TURNS, stream=True, options={"num_predict": 8, "temperature": 0}))
