"""Functions that answers may call: told of by each member's template, called in the text as Hermes and Qwen do."""

import asyncio
import copy
import json
from dataclasses import replace

import openai
import pytest
from serving import running, serving_of

from softmeet import Ensemble
from softmeet.hf.chat import chat_of
from softmeet.server.schemas import ChatRequest
from softmeet.server.tool_calls import Calls, FunctionCall

TOLD = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.zone }}]{% endfor %};{% endfor %}"
)
OTHER = "{% for tool in tools or [] %}({{ tool.function.name }}){% endfor %}" + TOLD.partition("{% endif %}")[2]
UNTOLD = "{% for m in messages %}{{ m.content }};{% endfor %}"
ZONE = {"type": "object", "properties": {"zone": {"enum": ["a", "b"]}}, "required": ["zone"]}
TOOLS = [
    {"type": "function", "function": {"name": "now", "parameters": {**ZONE, "additionalProperties": False}}},
    {"type": "function", "function": {"name": "stop"}},
]
ASKED = {"model": "told", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "seed": 1}
LISTED = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "[1]"}}
FIRST = '<tool_call>\n{"name": "now", "arguments": {"zone": "\u00e9"}}\n</tool_call>'
QUOTED = '```json\n{"name": "stop", "arguments": {}}\n```'
SECOND = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'


def ensemble(*templates):
    """Two bundled members, each with a chat template of its own."""
    found = Ensemble.from_pretrained(["narrow/opt-a", "narrow/opt-b"], "logit-mean")
    chat = chat_of(found.model)
    tokenizers = [copy.deepcopy(found.tokenizer) for _ in templates]
    for tokenizer, template in zip(tokenizers, templates, strict=True):
        tokenizer.chat_template = template
    found.model.chat = replace(chat, tokenizers=tokenizers)
    return found


@pytest.fixture(scope="module")
def serving():
    return serving_of({"told": ensemble(TOLD, OTHER), "untold": ensemble(TOLD, UNTOLD)})


@pytest.fixture(scope="module")
def client(serving):
    with running(serving) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def ask(client, text=None, **options):
    """The answer, whose text is forced where one is given."""
    forced = {"extra_body": {"structured_outputs": {"choice": [text]}}} if text else {}
    return client.chat.completions.create(**{**ASKED, **forced, **options})


def called(choices):
    """The text, calls and end of a stream's chunks, or of one whole choice."""
    said, calls, end = "", [], None
    for choice in choices:
        message = choice.delta if hasattr(choice, "delta") else choice.message
        said, end = said + (message.content or ""), choice.finish_reason or end
        for call in message.tool_calls or ():
            assert call.type == "function"
            assert getattr(call, "index", len(calls)) == len(calls)
            calls.append((call.function.name, json.loads(call.function.arguments), call.id))
    assert len({own for _, _, own in calls}) == len(calls)
    return said, [call[:2] for call in calls], end


def test_each_member_is_told_the_functions_and_calls_by_its_own_template(serving):
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"zone": "a"}'}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    body = ChatRequest.model_validate({**ASKED, "messages": [*ASKED["messages"], *turns]})
    request = asyncio.run(serving.prepare(body))
    decoded = [request.tokenizer.decode(ids) for ids in request.own[0]]
    shown = json.dumps([TOOLS[0], TOOLS[1]], ensure_ascii=False)
    said = "user:hi;assistant:[now a];tool:3;"
    assert decoded == [f"{shown}{said}", f"(now)(stop){said}"]
    silent = asyncio.run(serving.prepare(body.model_copy(update={"tool_choice": "none"})))
    assert {request.tokenizer.decode(ids) for ids in [*silent.prompts, *(silent.own or [[]])[0]]} == {said}


@pytest.mark.parametrize(
    ("text", "said", "calls", "end"),
    [
        ("Wait.", "Wait.", [], "stop"),
        (f"Wait. {FIRST}\n{SECOND} So.", "Wait. ", [("now", {"zone": "\u00e9"}), ("stop", {})], "tool_calls"),
        (SECOND.removesuffix("</tool_call>"), "", [("stop", {})], "tool_calls"),
        ("A <tool_call>no</tool_call>!", "A <tool_call>no</tool_call>!", [], "stop"),
        (QUOTED, QUOTED, [], "stop"),
    ],
)
def test_calls_are_read_from_the_text_whole_and_streamed(client, text, said, calls, end):
    few = {"tools": TOOLS[1:]}  # the members' context is short
    choice = ask(client, text, **few).choices[0]
    assert called([choice]) == (said, calls, end)
    assert (choice.message.content is None) == (not said)
    chunks = [chunk.choices[0] for chunk in ask(client, text, stream=True, **few)]
    assert called(chunks) == (said, calls, end)
    assert not [chunk for chunk in chunks[1:-1] if not (chunk.delta.content or chunk.delta.tool_calls)]


def test_fewer_calls_than_are_written_where_that_is_asked_for(client):
    for parallel, calls in ((True, 2), (False, 1)):
        found = ask(client, SECOND * 2, parallel_tool_calls=parallel, tools=TOOLS[1:]).choices
        assert called(found) == ("", [("stop", {})] * calls, "tool_calls")
    silent = ask(client, FIRST, tool_choice="none").choices
    assert called(silent) == (FIRST, [], "stop")


def test_a_call_that_has_to_be_made_is_made(client):
    named = ask(client, tool_choice={"type": "function", "function": {"name": "now"}}, temperature=2)
    (said, ((name, arguments),), end) = called(named.choices)
    assert (said, name, end) == ("", "now", "tool_calls")
    assert arguments["zone"] in ("a", "b")
    one = ask(client, tool_choice="required", parallel_tool_calls=False, tools=TOOLS[:1])
    assert called(one.choices)[1][0][0] == "now"


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"model": "untold"}, "tools", "no tools are told of in the chat template of narrow/opt-b: leave tools out"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "of which there is none"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "of which there is none"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "cannot be a call"),
        ({"tool_choice": "any"}, "tool_choice", "expected tool_choice to be 'none', 'auto' or 'required'"),
        ({"tools": [{"type": "web_search"}]}, "tools", "expected tools.0.type to be 'function', got 'web_search'"),
        (
            {"messages": [*ASKED["messages"], {"role": "assistant", "tool_calls": [LISTED]}]}, "messages",
            "expected messages.1.tool_calls.0.function.arguments to be an obj",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused_by_name(client, options, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert message in caught.value.body["message"]
    assert caught.value.body["param"] == param


@pytest.mark.parametrize(
    "text", [f"a<{FIRST}b{SECOND}<tool_call>", f"<tool{SECOND}<tool_call>{{</tool_call>x", "<tool_"]
)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_pieces_of_any_size_make_the_same_calls(text, size):
    whole, calls = Calls().push(text, last=True), Calls()
    pieces = [text[k : k + size] for k in range(0, len(text), size)]
    found = [calls.push(piece, last=k == len(pieces)) for k, piece in enumerate(pieces, 1)]
    assert ("".join(said for said, _ in found), [call for _, own in found for call in own]) == whole
    assert calls.count == len(whole[1]) == text.count('"name"')
    assert all(isinstance(call, FunctionCall) for call in whole[1])
