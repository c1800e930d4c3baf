"""Structured output as clients of the server meet it."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving import http, running, serving_of
from structures import CLOCK, SCHEMA, SUMS, WORDS, is_json

from softmeet import Ensemble, Structure
from softmeet.engine import masking
from softmeet.errors import InvalidInputError
from softmeet.structured import compilers

FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
# Sixteen patterns at once: compiling them has no end.
ENDLESS = {
    "type": "string",
    "allOf": [{"pattern": f"(.*[a-{last}].{{{20 + k}}})"} for k, last in enumerate("bcdefghijklmnopq")],
}


@pytest.fixture(scope="module")
def ensembles():
    wide = Ensemble.from_pretrained("wide", "prob-mean")
    return {"wide": wide, "narrow": Ensemble.from_pretrained("narrow", "meet", trust=1.0)}


@pytest.fixture(scope="module")
def client(ensembles):
    with running(serving_of(ensembles, strict=True)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client, model="wide", **options):
    asked = {"model": model, "prompt": "And the king", "seed": 3, "max_tokens": 90} | options
    found = client.completions.create(**asked)
    return [(choice.text, choice.finish_reason) for choice in found.choices]


def test_the_openai_clients_own_form_on_chat_whole_and_streamed(client):
    options = {"model": "wide", "messages": [{"role": "user", "content": "hi"}], "seed": 3, "max_tokens": 90}
    whole = client.chat.completions.create(**options, response_format=FORM)
    assert whole.choices[0].finish_reason == "stop"
    assert is_json(whole.choices[0].message.content)
    chunks = list(client.chat.completions.create(**options, response_format=FORM, stream=True))
    assert "".join(c.choices[0].delta.content for c in chunks) == whole.choices[0].message.content
    some = client.chat.completions.create(**options, response_format={"type": "json_object"}, stop=["}"])
    assert some.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("model", "asked", "is_one"),
    [
        ("wide", {"json": SCHEMA}, is_json),
        ("wide", {"regex": CLOCK}, lambda text: re.fullmatch(CLOCK, text)),
        ("wide", {"choice": WORDS}, WORDS.__contains__),
        ("wide", {"grammar": SUMS}, Structure.grammar(SUMS).allows),
        ("narrow", {"regex": CLOCK}, lambda text: re.fullmatch(CLOCK, text)),
        ("narrow", {"choice": WORDS}, WORDS.__contains__),
    ],
)
def test_every_form_of_vllm_by_every_rule_for_all_choices(client, model, asked, is_one):
    ways = [{"n": 2, "temperature": 1.2, "top_p": 0.9, "presence_penalty": 1}]
    for more in [*ways, {"temperature": 0}] if model == "wide" else ways:
        for text, reason in ask(client, model, extra_body={"structured_outputs": asked}, **more):
            assert reason == "length" or is_one(text)
            assert reason == "stop" or "grammar" in asked or "json" in asked


def test_a_schema_may_be_given_as_text(client):
    given = (SCHEMA, json.dumps(SCHEMA))
    found = [ask(client, max_tokens=20, extra_body={"structured_outputs": {"json": own}}) for own in given]
    assert found[0] == found[1]


def test_a_text_that_is_cut_says_so(client):
    ((text, reason),) = ask(client, max_tokens=4, extra_body={"response_format": FORM})
    assert reason == "length"
    assert not Structure.json_schema(SCHEMA).allows(text)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema, which is missing: add it"),
        ({"response_format": {"type": "xml"}}, "response_format", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "missing"),
        ({"structured_outputs": {}}, "structured_outputs", "expected one of json, regex, choice, grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "got regex and choice"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs", "look-around"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs", "expected structured_outputs.regex to be a valid"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs", 'Unimplemented keys: ["not"]'),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least 1 item"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag is not supported"),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORM}, "structured_outputs", "got both"),
        ({"guided_regex": "a"}, "guided_regex", "did you mean structured_outputs?"),
    ],
)
def test_what_cannot_be_used_is_a_clear_error(client, fields, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body=fields)
    assert message in caught.value.body["message"]
    assert caught.value.body["param"] == param


def test_endless_schemas_end_and_others_are_served_meanwhile(client, monkeypatch):
    monkeypatch.setattr(compilers, "_SECONDS", 0.5)

    def endless(k):
        schema = {**ENDLESS, "title": str(k)}
        with pytest.raises((openai.BadRequestError, openai.RateLimitError)) as caught:
            ask(client, extra_body={"structured_outputs": {"json": schema}})
        return caught.value

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(endless, k) for k in range(3)]
        assert ask(client, max_tokens=4)[0][1] == "length"
        refused = [one.result().body for one in asked if isinstance(one.result(), openai.BadRequestError)]
    assert refused
    for error in refused:
        assert error["param"] == "structured_outputs"
        assert "seconds to compile" in error["message"]


def test_a_text_whose_structure_becomes_too_complex_ends_alone(client, monkeypatch):
    def too_complex(self, tokens):
        raise InvalidInputError("too complex")

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ask, client, max_tokens=100)
        monkeypatch.setattr(masking.RowMask, "allowed", too_complex)
        with pytest.raises(openai.BadRequestError, match="too complex"):
            ask(client, extra_body={"structured_outputs": {"choice": WORDS}})
        assert other.result()[0][1] in ("length", "stop")


def test_the_documentation_of_the_api_names_the_fields(client):
    fields = http.get(f"{str(client.base_url).removesuffix('v1/')}openapi.json").json()["components"]["schemas"]
    assert set(fields["StructuredOutputs"]["properties"]) == {"json", "regex", "choice", "grammar", "json_object"}
