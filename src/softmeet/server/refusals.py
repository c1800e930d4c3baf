"""What a client is told about a body that does not fit its schema: what was expected, what came and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from softmeet.rules.frozen import unknown
from softmeet.rules.settings import Settings
from softmeet.server import schemas
from softmeet.server.errors import RequestError
from softmeet.server.responses import ResponsesRequest
from softmeet.server.strict import Strict

_TOOLS = (
    "tools", "tool_choice", "parallel_tool_calls", "tool_calls", "tool_call_id", "max_tool_calls", "call_id",
)  # fmt: skip
_REFUSED = {
    **dict.fromkeys(_TOOLS, "give tools to /v1/chat/completions"),
    **dict.fromkeys(("functions", "function_call"), "they are called tools and tool_choice now"),
    **dict.fromkeys(("image_url", "input_audio", "file", "images"), "the members read only text"),
    **dict.fromkeys(("audio", "modalities"), "only text is generated"),
    **{
        f"guided_{name}": f'write {{"structured_outputs": {{"{name}": …}}}}, as in vLLM since its version 0.12'
        for name in ("json", "regex", "choice", "grammar")
    },
    "suffix": "text is only continued",
    **dict.fromkeys(("context", "template"), "send the whole conversation to /api/chat, or a raw prompt"),
    "prediction": "there is nothing to speed up by it",
    **dict.fromkeys(("reasoning_effort", "reasoning"), "the members do not reason apart from their answer"),
    "web_search_options": "nothing is searched",
    **dict.fromkeys(
        ("bad_words", "allowed_token_ids"), "give token ids a logit_bias of -100 or 100; /tokenize has them"
    ),
    **dict.fromkeys(("use_beam_search", "length_penalty"), "tokens are drawn; n and best_of draw several answers"),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), "/tokenize has the ids of a text"),
    **dict.fromkeys(
        ("chat_template", "chat_template_kwargs", "documents"),
        "a chat is written as the members' own template says; send another prompt to /v1/completions",
    ),
    **dict.fromkeys(
        ("add_generation_prompt", "continue_final_message"),
        "a chat is continued by a new turn of the assistant; send another prompt to /v1/completions",
    ),
    "truncation_side": "the prompt's last tokens are kept",
    "logprob_token_ids": "logprobs lists the most probable tokens",
    "prompt_embeds": "prompts are texts or token ids",
    "spaces_between_special_tokens": "the members' tokenizer says where spaces are",
    "priority": "requests are served in the order that they come in",
    **dict.fromkeys(("prompt_cache_key", "cache_salt"), "prompts that begin alike are reused by themselves"),
    "generation_config": "write its fields, such as temperature and top_k, directly into the body",
    "verbosity": "say in the messages how long the answer is to be",
    "safety_identifier": "call it user, which is accepted and ignored",
    **dict.fromkeys(
        ("previous_response_id", "conversation"), "nothing is stored: send the whole conversation as input"
    ),
    **dict.fromkeys(("background", "background_options"), "nothing is stored, so that an answer has to be waited for"),
    **dict.fromkeys(("context_management", "moderation"), "the server does nothing of that kind"),
    "extra_body": "it is an argument of openai's client; write its fields directly into the body",
}
# Fields that other endpoints have, and what to do at this one.
_CHAT_ONLY = {
    "messages": "give a prompt here, or send it to /v1/chat/completions",
    "input": "give a prompt here, or send it to /v1/responses",
    "instructions": "begin the prompt with them, or send them to /v1/responses",
}
_PROMPT_ONLY = {
    "echo": "send the request to /v1/completions",
    "best_of": "ask for n choices, or send the request to /v1/completions",
    "add_special_tokens": "the chat template adds them, or send the request to /v1/completions",
}
_ELSEWHERE: dict[str, dict[str, str]] = {
    "/v1/completions": _CHAT_ONLY
    | {
        "max_completion_tokens": "it is called max_tokens here",
        "max_output_tokens": "it is called max_tokens here",
        "top_logprobs": "give the number as logprobs here",
    },
    "/v1/chat/completions": _PROMPT_ONLY
    | {
        "prompt": "give messages here, or send it to /v1/completions",
        "input": "give messages here, or send it to /v1/responses",
        "instructions": "give them as a system message here",
        "max_output_tokens": "it is called max_completion_tokens here",
    },
    "/v1/responses": _PROMPT_ONLY
    | {
        "prompt": "nothing is stored, templates neither: give the text as input, or send it to /v1/completions",
        "messages": "give them as input here, or send them to /v1/chat/completions",
        "n": "a response is one choice: ask several times, or at /v1/chat/completions",
        "best_of": "a response is one choice: send the request to /v1/completions",
        "max_tokens": "it is called max_output_tokens here",
        "max_completion_tokens": "it is called max_output_tokens here",
        "logprobs": 'give include as ["message.output_text.logprobs"] here, and top_logprobs',
        "prompt_logprobs": "send the request to /v1/completions or /v1/chat/completions",
        "stream_options": "the last event always has the token counts",
        "response_format": 'write it as text, {"text": {"format": …}}',
    },
}
_EXPECTED = {
    "prompt": "a string, a list of strings, token ids or a list of lists of token ids",
    "messages": 'a list such as [{"role": "user", "content": "hello"}]',
    "input": 'a string, or a list such as [{"role": "user", "content": "hello"}]',
    "logit_bias": 'an object of numbers from -100 to 100 by token ids, such as {"5": -100}',
}
_BODIES = (
    schemas.CompletionRequest, schemas.ChatRequest, ResponsesRequest,
    schemas.TokenizeRequest, schemas.DetokenizeRequest,
)  # fmt: skip
_FIELDS = {name: kind for body in _BODIES for name, kind in body.model_fields.items()}
_OBJECTS = ("model_type", "model_attributes_type", "dict_type")
# The longest text that is repeated to the client.
_SHOWN = 40


def _names(kind: type[Strict]) -> set[str]:
    """Return the names of the fields of a model, and of all models that derive from it, as requests have them."""
    own = {field.alias or name for name, field in kind.model_fields.items()}
    return own.union(*map(_names, kind.__subclasses__()))


_NAMES = _names(Strict)


def refusal(errors: Sequence[Mapping[str, Any]], endpoint: str = "") -> RequestError:
    """Return an error that names one invalid field of a request: what was expected there, what came and what to do.

    Unknown fields come first, since a misspelled field is missing under its own name. Of what came, numbers and texts
    of up to 40 characters are repeated.

    Args:
        errors: the errors that pydantic's ``ValidationError.errors()`` lists for the request; at least one. Each is a
            dict with ``type``, ``loc``, ``msg`` and ``input``.
        endpoint: the path that the request was sent to.
    """
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    path = _path(first)
    if not path:
        size = " of a few fields" if first["type"] == "too_long" else ""
        return RequestError(f"expected one JSON object{size} as the body, got {_came(first)}")
    if path[0] in _REFUSED and first["type"] == "extra_forbidden":
        message = f"{path[0]} is not supported: {_REFUSED[path[0]]}"
    elif first["type"] == "extra_forbidden":
        message = _unknown(path, endpoint)
    elif path[0] in _EXPECTED and len(path) == 1:
        message = f"expected {path[0]} as {_EXPECTED[path[0]]}, got {_came(first)}"
    else:
        message = _invalid([error for error in errors if _path(error)[:1] == path[:1]])
    return RequestError(message, param=".".join(path[: 2 if path[0] == "softmeet" else 1])[:100])


def _path(error: Mapping[str, Any]) -> list[str]:
    """Return the names and positions that lead to an invalid field, without words of FastAPI's and pydantic's."""
    # These words are "body" at the beginning, and those for a union's cases.
    found = list(error["loc"])
    last = [found.pop()] if found and error["type"] == "extra_forbidden" else []
    return [str(part) for part in [*(part for part in found if isinstance(part, int) or part in _NAMES), *last]]


def _unknown(path: list[str], endpoint: str) -> str:
    """Return the message on a field that there is not: where it belongs, or the nearest name."""
    name, word = ".".join(path)[:200], path[-1][:100]
    what = f"{name} is not supported"
    elsewhere = _ELSEWHERE.get(endpoint, {})
    if path == [word] and word in elsewhere:
        return f"{what}: {elsewhere[word]}"
    if word in _REFUSED:
        return f"{what}: {_REFUSED[word]}"
    if path == [word] and word in schemas.Extension.model_fields:
        inside = f'{{"softmeet": {{"{word}": …}}}}'
        return f"{what} here: put it into softmeet, as {inside}, with openai's client by extra_body={inside}"
    if path[0] == "softmeet" and word in _FIELDS:
        return f"{what}: put {word} beside softmeet, not into it"
    if word in Settings.model_fields:
        return f"{what}: it is the same for all requests, and given to softmeet serve"
    if path[0] == "softmeet":
        return str(unknown(f"{what}: there is no such field", word, list(schemas.Extension.model_fields)))
    near = get_close_matches(word, [one for one in _FIELDS if one != word], n=1)
    hint = f"did you mean {near[0]}?" if near else "leave it out; /openapi.json has all fields"
    return f"{what}: there is no such field: {hint}"


def _invalid(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return the message on a field's value, given all errors below the field: those of every case of a union."""
    # A list's wrong entry says more than that the list is no string.
    deepest = max(errors, key=lambda error: len(_path(error)))
    name, value = ".".join(_path(deepest))[:200], deepest["input"]
    if deepest["type"] == "missing":
        return f"expected {name}, which is missing: add it"
    there = [_wanted(error) for error in errors if _path(error) == _path(deepest) and error["input"] is value]
    wanted = " or ".join(dict.fromkeys(there)).replace(" or to be ", " or ")
    return f"expected {name} {wanted}, got {_came(deepest)}"


def _wanted(error: Mapping[str, Any]) -> str:
    """Return what pydantic expected, as words that follow the field's name: ``to be a valid number``."""
    if error["type"] in _OBJECTS:
        return "to be an object"
    found = re.fullmatch(r"\w+ should (.*?)( after validation, not .*)?", error["msg"])
    return f"to {found[1]}" if found else f"to be valid ({error['msg'][:200]})"


def _came(error: Mapping[str, Any]) -> str:
    """Return what was found in place of what an error expected; long texts, lists and objects are only described."""
    value = error["input"]
    if error["type"] == "missing" or value is None:
        return "none"
    if isinstance(value, dict | list):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    if isinstance(value, bool):
        return str(value).lower()
    # The text of a whole number may be too long to be made.
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a larger number"
    text = repr(value)
    return text if len(text) <= _SHOWN + 2 else f"a text of {len(value):,} characters"
