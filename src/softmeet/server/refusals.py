"""What a client is told about a body that does not fit its schema: what was expected, what came and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from softmeet.rules.settings import Settings
from softmeet.server import schemas
from softmeet.server.errors import RequestError
from softmeet.server.responses import ResponsesRequest
from softmeet.server.strict import Strict

_BODIES: dict[str, type[Strict]] = {
    "/v1/completions": schemas.CompletionRequest,
    "/v1/chat/completions": schemas.ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": schemas.TokenizeRequest,
    "/detokenize": schemas.DetokenizeRequest,
}
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# What a field is called that other clients, or other endpoints, call otherwise: the first of these that is known.
_CALLED = {
    **dict.fromkeys(_LENGTHS, _LENGTHS),
    "functions": ("tools",),
    "function_call": ("tool_choice",),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ("structured_outputs",)),
}
_NOT_HERE = {
    **dict.fromkeys(("image_url", "input_audio", "file", "images"), "the members read only text"),
    **dict.fromkeys(
        ("previous_response_id", "conversation", "background"), "nothing is stored: send the whole conversation"
    ),
}
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
    if first["type"] == "extra_forbidden":
        message = f"{'.'.join(path)[:200]} is not supported: {_instead(path, endpoint)}"
    else:
        message = _invalid([error for error in errors if _path(error)[:1] == path[:1]])
    return RequestError(message, param=".".join(path[: 2 if path[0] == "softmeet" else 1])[:100])


def _path(error: Mapping[str, Any]) -> list[str]:
    """Return the names and positions that lead to an invalid field, without words of FastAPI's and pydantic's."""
    # These words are "body" at the beginning, and those for a union's cases.
    found = list(error["loc"])
    last = [found.pop()] if found and error["type"] == "extra_forbidden" else []
    return [str(part) for part in [*(part for part in found if isinstance(part, int) or part in _NAMES), *last]]


def _instead(path: list[str], endpoint: str) -> str:
    """Return what to do about a field that there is not: where it belongs, or the nearest name."""
    word, inside, at_top = path[-1][:100], path[0] == "softmeet", len(path) == 1
    if at_top and word in schemas.Extension.model_fields:
        shown = f'{{"softmeet": {{"{word}": …}}}}'
        return f"put it into softmeet, as {shown}, with openai's client by extra_body={shown}"
    if inside and word in schemas.CompletionRequest.model_fields:
        return f"put {word} beside softmeet, not into it"
    if word in Settings.model_fields:
        return "it is the same for all requests, and given to softmeet serve"
    known = _names(schemas.Extension if inside else _BODIES.get(endpoint, Strict))
    called = [name for name in _CALLED.get(word, ()) if name in known]
    if at_top and not called and (others := [one for one, kind in _BODIES.items() if word in _names(kind)]):
        return f"send it to {others[0]}"
    if near := called or ((at_top or inside) and get_close_matches(word, sorted(known - {word}), n=1)):
        return f"did you mean {near[0]}?"
    return _NOT_HERE.get(word, "leave it out; /openapi.json has all fields")


def _invalid(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return the message on a field's value, given all errors below the field: those of every case of a union."""
    # A list's wrong entry says more than that the list is no string.
    deepest = max(errors, key=lambda error: len(_path(error)))
    name, value = ".".join(_path(deepest))[:200], deepest["input"]
    if deepest["type"] == "missing":
        return f"expected {name}, which is missing: add it"
    there = [_wanted(error["msg"]) for error in errors if _path(error) == _path(deepest) and error["input"] is value]
    wanted = " or ".join(dict.fromkeys(there)).replace(" or to be ", " or ")
    return f"expected {name} {wanted}, got {_came(deepest)}"


def _wanted(message: str) -> str:
    """Return what pydantic expected, as words that follow the field's name: ``to be a valid number``."""
    found = re.fullmatch(r"\w+ should (.*?)( after validation, not .*)?", message)
    return f"to {re.sub('a valid dictionary.*', 'an object', found[1])}" if found else f"to be valid ({message[:200]})"


def _came(error: Mapping[str, Any]) -> str:
    """Return what was found in place of what an error expected; long texts, lists and objects are only described."""
    value = error["input"]
    if error["type"] == "missing" or value is None:
        return "none"
    if isinstance(value, dict | list):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    # The text of a whole number may be too long to be made.
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a larger number"
    text = repr(value)
    return text if len(text) <= _SHOWN + 2 else f"a text of {len(value):,} characters"
