"""The endpoint /v1/responses, as the real openai client meets it."""

import json

import openai
import pytest
from serving import TEMPLATE, http, running, serving_of, tiny_ensemble

from softmeet.server import answer as answering
from softmeet.server.errors import InternalError
from softmeet.server.responses import ResponsesRequest, _form
from softmeet.server.sequences import Failed

ENDLESS = {"logit_bias": {"0": -100}}


@pytest.fixture(scope="module")
def url():
    chatty = tiny_ensemble("gpt2", "llama", template=TEMPLATE)
    with running(serving_of({"chatty": chatty}, strict=True)) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client, given="hi", extra=(), **options):
    body = {"seed": 3, **dict(extra)}
    asked = {"model": "chatty", "input": given, "max_output_tokens": 9, "extra_body": body}
    return client.responses.create(**asked | options)


def chat(client, *messages, **options):
    options = {"seed": 3, "max_completion_tokens": 9} | options
    return client.chat.completions.create(model="chatty", messages=list(messages), **options).choices[0]


def test_a_response_is_what_a_chat_answers(client):
    user = {"role": "user", "content": "hi"}
    expected = chat(client, user)
    found = ask(client)
    assert found.output_text == expected.message.content
    assert (found.object, found.status, found.error) == ("response", "incomplete", None)
    assert found.incomplete_details.reason == "max_output_tokens"
    assert (found.usage.input_tokens, found.usage.output_tokens, found.usage.total_tokens) == (7, 9, 16)
    (told,) = found.output
    assert (told.role, told.status, told.type) == ("assistant", "incomplete", "message")
    assert found.softmeet["seed"] == 3
    assert (found.store, found.previous_response_id, found.temperature) == (False, None, 0.7)
    assert chat(client, user, temperature=0.7).message.content == expected.message.content
    assert chat(client, user, temperature=1).message.content != expected.message.content
    colder = ask(client, temperature=0.5, top_p=0.8, extra={"top_k": 9}, instructions="abc", metadata={"a": "b"})
    system = {"role": "system", "content": "abc"}
    options = {"temperature": 0.5, "top_p": 0.8, "extra_body": {"top_k": 9}}
    assert colder.output_text == chat(client, system, user, **options).message.content
    assert colder.usage.input_tokens == 13  # "s:abc!u:hi!a:"
    assert (colder.temperature, colder.top_p, colder.instructions, colder.metadata) == (0.5, 0.8, "abc", {"a": "b"})


def test_a_conversation_goes_on_with_what_came_before(client):
    first = ask(client, include=["message.output_text.logprobs"])
    user, so = {"role": "user", "content": "hi"}, [{"type": "input_text", "text": "so"}]
    second = ask(client, [user, *first.output, {"role": "user", "content": so}])
    said = {"role": "assistant", "content": first.output_text}
    assert second.output_text == chat(client, user, said, {"role": "user", "content": "so"}).message.content


def test_a_stream_has_the_events_that_openais_client_needs(client):
    whole = ask(client)
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * len(deltas), "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert len(deltas) > 3
    assert "".join(deltas) == whole.output_text == events[-4].text
    ended = events[-1].response
    assert ended.output == [whole.output[0].model_copy(update={"id": ended.output[0].id})]
    same = {"id", "created_at", "output"}
    assert ended.model_dump(exclude=same) == whole.model_dump(exclude=same)
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1


def test_the_clients_own_stream_ends_with_the_whole_response(client):
    body = {"logit_bias": {"0": 100}, "min_tokens": 4, "seed": 3, "softmeet": {"statuses": True}}
    with client.responses.stream(model="chatty", input="hi", temperature=0, extra_body=body) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == "".join(pieces)
    assert len(final.output_text) == 4
    assert final.output[0].softmeet["statuses"] == {"OPTIMAL": 5}


def test_the_events_are_named_and_no_done_follows(url):
    answer = http.post(f"{url}/v1/responses", json={"input": "hi", "stream": True, "max_output_tokens": 2})
    events = [event.split("\n") for event in answer.text.strip().split("\n\n")]
    assert answer.headers["content-type"].startswith("text/event-stream")
    for name, data in events:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_log_probabilities_and_reports_come_with_the_text(client):
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    entries = chat(client, {"role": "user", "content": "hi"}, logprobs=True, top_logprobs=2).logprobs.content
    expected = [entry.model_dump() for entry in entries]
    found = ask(client, **options)
    assert [entry.model_dump() for entry in found.output[0].content[0].logprobs] == expected
    events = list(ask(client, stream=True, extra={"softmeet": {"report": 1}}, **options))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [entry.to_dict() for event in deltas for entry in event.logprobs] == expected
    assert events[-1].response.output[0].content[0].logprobs == found.output[0].content[0].logprobs
    assert [len(event.softmeet["tokens"]) for event in deltas] == [1] * 9
    assert ask(client).output[0].content[0].logprobs is None


def test_a_prompt_that_is_too_long_is_refused_or_cut(client):
    with pytest.raises(openai.BadRequestError, match="expected a prompt shorter than the shortest member's context"):
        ask(client, "a" * 80)
    assert ask(client, "a" * 80, truncation="auto").usage.input_tokens == 55


def test_an_error_amid_a_stream_is_the_events_last(client, monkeypatch):
    kept = answering.AnswerStream._delta

    def failing(self, index, event):
        return kept(self, index, Failed(InternalError("secret")) if self.completion_tokens == 3 else event)

    monkeypatch.setattr(answering.AnswerStream, "_delta", failing)
    *_, last = ask(client, stream=True, extra=ENDLESS)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    assert "secret" not in last.response.error.message
    assert len(last.response.output_text) == 3


def test_a_response_says_the_form_that_it_was_asked_for():
    form = {"type": "json_schema", "name": "one", "schema": {"type": "object"}}
    for given, said in ((form, form), (None, {"type": "text"})):
        body = ResponsesRequest.model_validate({"input": "a", "text": {"format": given}})
        assert _form(body) == said
