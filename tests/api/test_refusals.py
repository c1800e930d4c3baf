"""What no request can have, on every endpoint: refused by the field's name, with what to do, by lenient servers too."""

import pytest
from serving import TEMPLATE, http, running, serving_of, tiny_ensemble

CHAT = [{"role": "user", "content": "hi"}]
# What a request has at least.
LEAST = {
    "v1/completions": {"prompt": "a", "max_tokens": 12},
    "v1/chat/completions": {"model": "chatty", "messages": CHAT},
    "v1/responses": {"model": "chatty", "input": "hi"},
    "tokenize": {},
    "detokenize": {},
}  # fmt: skip
COMPLETIONS = [
    ({"rule": "meet"}, "rule", 'rule is not supported: put it into softmeet, as {"softmeet": {"rule": …}}, with'),
    ({"trust": 1}, "trust", '{"softmeet": {"trust": …}}'),
    ({"gate": "none"}, "gate", '{"softmeet": {"gate": …}}'),
    ({"tools": [{}]}, "tools", "tools is not supported: send it to /v1/chat/completions"),
    ({"guided_regex": "a"}, "guided_regex", "guided_regex is not supported: did you mean structured_outputs?"),
    ({"suffix": "x"}, "suffix", "suffix is not supported: leave it out"),
    ({"softmeet": {"ruel": "meet"}}, "softmeet.ruel", "softmeet.ruel is not supported: did you mean rule?"),
    ({"softmeet": {"temperature": 1}}, "softmeet.temperature", "put temperature beside softmeet, not into it"),
    ({"softmeet": {"tol": 1}}, "softmeet.tol", "softmeet.tol is not supported"),
    ({"softmeet": {"passages": [{"text": "a", "score": 1, "x": 1}]}}, "softmeet.passages", "is not supported"),
    ({"softmeet": "meet"}, "softmeet", "expected softmeet to be an object, got 'meet'"),
    ({"softmeet": {"trust": "x"}}, "softmeet.trust", "trust to be a valid number or 'inf' or a valid list, got 'x'"),
    ({"softmeet": {"trust": [1, -1]}}, "softmeet.trust", "trust.1 to be greater than or equal to 0 or 'inf', got -1"),
    ({"softmeet": {"trust": -1}}, "softmeet.trust", "softmeet.trust"),
    ({"softmeet": {"members": ["x"]}}, "softmeet.members", "no member 'x': expected some of tiny/gpt2, tiny/llama"),
    ({"max_tokens": "5"}, "max_tokens", "expected max_tokens to be a valid integer, got '5'"),
    ({"max_tokens": 5000}, "max_tokens", "expected max_tokens of at most 64, the context of the ensemble's shortest "
     "member, got 5,000: ask for fewer"),
    ({"stop": [5]}, "stop", "expected stop.0 to be a valid string, got 5"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "expected logit_bias to match pattern"),
    ({"logit_bias": {"99": 1}}, "logit_bias", "expected token ids below 64 in logit_bias, got 99"),
    ({"user": "x" * 201}, "user", "got a text of 201 characters"),
    ({"seed": 10**30}, "seed", "got a larger number"),
    ({"temperature": 3}, "temperature", "expected temperature to be less than or equal to 2, got 3"),
    ({"prompt": 5}, "prompt", "expected prompt to be a valid string or a valid list, got 5"),
    ({"prompt": [1, "a"]}, "prompt", "expected prompt.0 to be a valid string or a valid list, got 1"),
    ({"n": 17}, "n", "at most 16 choices"),
    ({"best_of": 2, "n": 3}, "best_of", "expected best_of of at least n = 3, got 2: raise it"),
    ({"best_of": 2, "stream": True}, "best_of", "best_of cannot be streamed"),
    ({"best_of": 99}, "best_of", "expected at most 16 choices in all, this server's limit, --max-choices, got 99"),
    ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "prompt_logprobs cannot be streamed"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "expected prompt_logprobs to be greater than or equal to 0"),
    ({"min_tokens": 13}, "min_tokens", "at most 12, the most tokens of this answer"),
    ({"stop_token_ids": [64]}, "stop_token_ids", "expected token ids below 64 in stop_token_ids, got 64"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "expected token ids below 64 in stop_token_ids, got -1"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "to be -1 or greater than or equal to 1, got 0"),
    ({"top_k": -2}, "top_k", "expected top_k to be greater than or equal to -1, got -2"),
]  # fmt: skip
CHATS = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "template of tiny/gpt2, tiny/llama: leave"),
    ({"functions": [{}]}, "functions", "functions is not supported: did you mean tools?"),
    ({"response_format": {"type": "json_object"}}, "response_format", "members whose tokens can be read as bytes"),
    ({"guided_json": {"type": "object"}}, "guided_json", "is not supported: did you mean structured_outputs?"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages", "expected messages.0.content, which is missing: add it"),
    ({"messages": []}, "messages", "expected messages to have at least 1 item"),
    ({"messages": [{"role": "user", "content": "bad"}]}, "messages", "refuses these messages: no bad"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages",
     "the members read only text"),
    ({"model": "plain"}, "messages", "has no chat template"),
]  # fmt: skip
RESPONSES = [
    ({"store": True}, "store", "store is not supported: no answer is kept here: leave it out, and send the whole"),
    ({"previous_response_id": "r"}, "previous_response_id", "nothing is stored: send the whole conversation"),
    ({"conversation": "c"}, "conversation", "nothing is stored"),
    ({"tools": [{"type": "web_search"}]}, "tools", "send it to /v1/chat/completions"),
    ({"text": {"format": {"type": "grammar"}}}, "text", "expected text.format.type to be 'text'"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text", "expected text.format.schema, which is"),
    ({"input": []}, "input", "expected input to be a valid string or to have at least 1 item"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input", "input.0"),
    ({"include": ["reasoning.encrypted_content"]}, "include", "to be 'message.output_text.logprobs'"),
    ({"max_output_tokens": 65}, "max_output_tokens", "expected max_output_tokens of at most 64"),
    ({"model": "plain"}, "input", "has no chat template"),
]  # fmt: skip
TOKENIZE = [
    ({}, "prompt", "expected either a prompt or messages, got neither: send one of them"),
    ({"prompt": "a", "messages": CHAT}, "prompt", "got both"),
    ({"messages": CHAT}, "messages", "has no chat template"),
]  # fmt: skip
DETOKENIZE = [
    ({"tokens": [64]}, "tokens", "expected token ids from 0 to 63"),
    ({"tokens": "abc"}, "tokens", "expected tokens to be a valid list, got 'abc'"),
    ({}, "tokens", "expected tokens, which is missing: add it"),
]  # fmt: skip
# Settings that no member or rule can have: of these the error has a code.
SETTINGS = [
    ({"softmeet": {"rule": "meet", "trust": [1, 2, 3]}}, "softmeet.trust", "one trust, or one per member, 2 in all"),
    ({"softmeet": {"rule": "meet", "pool": "mean"}}, "softmeet.pool", "expected pool"),
    ({"softmeet": {"rule": "vote"}}, "softmeet.rule", "unknown rule 'vote'"),
    ({"softmeet": {"rule": "meet:trust=x"}}, "softmeet.rule", "expected NUMBER"),
    ({"softmeet": {"weights": [1, 2, 3]}}, "softmeet.weights", "expected one weight per member, 2 in all"),
    ({"softmeet": {"gate": "sure:1"}}, "softmeet.gate", "expected a gate as"),
]  # fmt: skip
# What a server only does not know.
UNKNOWN = [
    ("v1/completions", {"tol": 1}, "tol", "tol is not supported: it is the same for all requests"),
    ("v1/completions", {"temprature": 1}, "temprature", "did you mean temperature?"),
    ("v1/completions", {"max_new_tokens": 1}, "max_new_tokens", "did you mean max_tokens?"),
    ("v1/completions", {"quite other": 1}, "quite other", "quite other is not supported: leave it out"),
    ("v1/completions", {"messages": CHAT}, "messages", "messages is not supported: send it to /v1/chat/completions"),
    ("v1/completions", {"bad_words": ["no"]}, "bad_words", "bad_words is not supported: leave it out"),
    ("v1/completions", {"use_beam_search": True}, "use_beam_search", "use_beam_search is not supported"),
    ("v1/chat/completions", {"prompt": "a"}, "prompt", "prompt is not supported: send it to /v1/completions"),
    ("v1/responses", {"reasoning": {"effort": "low"}}, "reasoning", "reasoning is not supported: leave it out"),
    ("v1/responses", {"prompt": {"id": "p"}}, "prompt", "send it to /v1/completions"),
    ("v1/responses", {"max_tokens": 5}, "max_tokens", "did you mean max_output_tokens?"),
    ("tokenize", {"prompt": "a", "chat_template": "b"}, "chat_template", "chat_template is not supported"),
    ("tokenize", {"prompt": "a", "promt": "b"}, "promt", "did you mean prompt?"),
]  # fmt: skip
TABLES = (COMPLETIONS + SETTINGS, CHATS, RESPONSES, TOKENIZE, DETOKENIZE)
REFUSED = [(path, *own) for path, table in zip(LEAST, TABLES, strict=True) for own in table]


@pytest.fixture(scope="module")
def urls():
    """A strict server and one that passes over what it does not know."""
    plain, chatty = tiny_ensemble("gpt2", "llama", rule="logit-mean"), tiny_ensemble("gpt2", "llama", template=TEMPLATE)
    every = {"plain": plain, "chatty": chatty}
    with running(serving_of(every, strict=True)) as strict, running(serving_of(every)) as lenient:
        yield strict, lenient


def asked(url, path, fields):
    return http.post(f"{url}/{path}", json=LEAST[path] | fields)


def require_refused(answer, param, said):
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert said in error["message"]
    return error


@pytest.mark.parametrize(("path", "fields", "param", "said"), REFUSED)
def test_what_a_question_cannot_do_without_is_refused_by_its_name_and_with_what_to_do(urls, path, fields, param, said):
    for url in urls:
        error = require_refused(asked(url, path, fields), param, said)
        assert error["code"] == "invalid_value" or (fields, param, said) not in SETTINGS


@pytest.mark.parametrize(("path", "fields", "param", "said"), UNKNOWN)
def test_what_is_only_unknown_is_refused_by_a_strict_server_alone(urls, path, fields, param, said):
    strict, lenient = (asked(url, path, fields) for url in urls)
    require_refused(strict, param, said)
    assert lenient.status_code == 200
