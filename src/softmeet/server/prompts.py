"""A request's prompts: texts and conversations as token ids, and the checks that they fit the members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, zip_longest
from typing import Any

from softmeet.engine.continuation import Own
from softmeet.errors import InvalidInputError
from softmeet.hf.chat import chat_of
from softmeet.hf.prompts import read_prompt
from softmeet.members.member import short
from softmeet.members.spelling import Spelling
from softmeet.server.ensembles import Served
from softmeet.server.errors import RequestError
from softmeet.server.schemas import CompletionRequest, Generation
from softmeet.server.sequences import Combination
from softmeet.server.texts import token_texts

# The fields that say how many tokens an answer may have; the first that is given counts.
LENGTHS = ("max_output_tokens", "max_completion_tokens", "max_tokens")
# Texts of more characters take so long to be cut into tokens that short ones do not wait for them.
LONG = 1 << 14
# What a turn of a chat counts beside its characters: a template has work with each, however short.
_TURN = 64
# The characters of a long text that are cut into tokens at once to count these.
_PIECE = 1 << 13
# The most functions that an answer calls.
_MOST_CALLS = 1024


def parts(body: CompletionRequest) -> list[Any]:
    """Return a request's prompts, each a text or a list of token ids."""
    prompt: Any = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def texts_of(body: Any) -> tuple[str, list[str]]:
    """Return the field of a request that has its prompts, and their texts; those of a chat's messages in one."""
    if getattr(body, "prompt", None) is not None:
        return "prompt", [part for part in parts(body) if isinstance(part, str)]
    field = "input" if hasattr(body, "input") else "messages"
    said = [message.plain() for message in body.messages]
    called = [call["function"]["arguments"] for one in said for call in one.get("tool_calls", ())]
    return field, ["".join([*(one["content"] for one in said), *map(str, called), *map(str, tools_of(body))])]


def tools_of(body: Any) -> list[dict[str, Any]]:
    """Return the functions that the answer to a request may call, as chat templates have them."""
    functions = getattr(body, "functions", ())
    return [{"type": "function", "function": one.model_dump(exclude_none=True)} for one in functions]


def most_calls(body: Any) -> int:
    """Return how many functions an answer to a request may call at most."""
    if not getattr(body, "functions", ()):
        return 0
    return 1 if body.parallel_tool_calls is False else _MOST_CALLS


def work_of(body: Any, texts: Sequence[str]) -> int:
    """Return how long tokens of a request's prompts, or of its chat's ``texts``, take to make, in characters."""
    if getattr(body, "prompt", None) is not None:
        return sum(map(len, parts(body)))
    return sum(map(len, texts)) + _TURN * len(body.messages)


def tokens_of(served: Served, part: Any, special: bool | None) -> tuple[int, ...]:
    """Return a prompt's token ids, given as a text or as token ids; unless ``special`` is false, a text gets a BOS."""
    if not isinstance(part, str):
        return tuple(part)
    model = served.ensemble.model
    if model.cuts_alone:
        return tuple(model.alphabet.encode(part))
    found = served.ensemble.tokenizer(part, verbose=False, add_special_tokens=special is not False)
    return tuple(found["input_ids"])


def encoded(
    served: Served, combination: Combination, parts: list[Any], body: CompletionRequest, *, scored: bool
) -> tuple[list[tuple[int, ...]], tuple[Own, ...]]:
    """Return the token ids of each prompt, given as a text or as token ids, and what members read of their own.

    Args:
        served: the ensemble asked for, for its tokenizer.
        combination: the members asked for.
        parts: the prompts.
        body: the request; unless its ``add_special_tokens`` is false, texts begin with a BOS.
        scored: whether the prompts' tokens are to be predicted, so that every member reads them as they are.

    Raises:
        RequestError: if a member's own prompt fills its context, or is a template, which cannot be scored.
    """
    model, found, own = combination.model, list[tuple[int, ...]](), list[Own]()
    members, tokenizer = model.contexts.members, served.ensemble.tokenizer
    try:
        if scored:
            model.require_likelihood("scoring a prompt")
            model.contexts.require_no_template()
        for part in parts:
            whole = tokens_of(served, part, body.add_special_tokens)
            shared = truncated(whole, body, combination)
            text = part if isinstance(part, str) and shared == whole else None
            if text is None and any(member.is_template for member in members):
                text = tokenizer.decode(shared, skip_special_tokens=True)
            read: tuple[list[int], Any] = list(shared), None
            is_own = model.cuts_alone or any(member.prompt is not None for member in members)
            if not scored and text is not None and is_own:
                read = read_prompt(model, tokenizer, text, special=body.add_special_tokens is not False)
            # Members' own tokens come in place of the text, or before what begins it.
            found.append(shared if read[1] is None or model.begin is None else tuple(read[0]))
            own.append(_frozen(read[1]))
    except InvalidInputError as error:
        raise RequestError(str(error), param="prompt") from error
    return found, tuple(own) if any(own) else ()


def _frozen(own: Sequence[Sequence[int] | None] | None) -> Own:
    return () if own is None else tuple(None if ids is None else tuple(ids) for ids in own)


def templated(served: Served, combination: Combination, body: Any) -> tuple[list[tuple[int, ...]], tuple[Own, ...]]:
    """Return a list of one prompt, which the members' chat templates make of the messages, and what is members' own.

    Where templates differ, and over bytes, each member reads what its own template makes.

    Raises:
        RequestError: if there is no chat template for a member, or the templates refuse the messages.
    """
    chat, (param, _) = chat_of(combination.model), texts_of(body)
    missing = [short(name) for name in chat.missing]
    shares = combination.symbols_are_tokens
    if missing and (not shares or len(missing) == len(chat.names)):
        who = f"the tokenizer of {served.name}" if shares else f"{', '.join(missing)} of {served.name}"
        raise RequestError(
            f"{who} has no chat template, so there is no saying how its members would have been trained to chat: use "
            "/v1/completions, or start the server with --plain-chat",
            param=param, code="no_chat_template",
        )  # fmt: skip
    tools = tools_of(body)
    if tools and (without := [short(name) for name in chat.without_tools]):
        raise RequestError(
            f"no tools are told of in the chat template of {', '.join(without)}: leave tools out, or ask for members "
            "that are made for them",
            param="tools", code="no_tools",
        )  # fmt: skip
    messages = [message.plain() for message in body.messages]
    if getattr(body, "continue_final_message", False):
        if messages[-1]["role"] != "assistant":
            raise RequestError(
                f"expected a last message of the assistant to go on with, got one of {messages[-1]['role']}: leave "
                "continue_final_message out",
                param="continue_final_message",
            )
        messages[-1]["prefix"] = True
    try:
        row, own = read_prompt(combination.model, served.ensemble.tokenizer, messages, tools=tools)
    except InvalidInputError as error:
        raise RequestError(str(error), param=param) from error
    cut = _frozen(None if own is None else [ids and truncated(tuple(ids), body, combination) for ids in own])
    return [truncated(tuple(row), body, combination)], (cut,) if cut else ()


def truncated(prompt: tuple[int, ...], body: Generation, combination: Combination) -> tuple[int, ...]:
    """Return a prompt's last tokens, as many as ``truncate_prompt_tokens`` says; all of them if it is not given.

    With -1 as many as leave room in the context for the tokens asked for, or for one if their number is not given.
    """
    asked = next((count for name in LENGTHS if (count := getattr(body, name, None)) is not None), 1)
    kept = getattr(body, "truncate_prompt_tokens", None)
    return prompt if kept is None else prompt[-(max(combination.room(asked), 1) if kept == -1 else kept) :]


def check_texts(texts: Sequence[str], combination: Combination, tokenizer: Any, param: str = "prompt") -> None:
    """Raise RequestError if a text is so long that, in tokens as long as the longest, it fits into no context.

    Args:
        texts: the texts.
        combination: the ensemble asked for.
        tokenizer: its tokenizer.
        param: the request's field that has the texts.
    """
    if combination.symbols_are_tokens:
        # Normalisation may shorten a text, hardly ever to a quarter.
        most = 4 * token_texts(tokenizer).longest * combination.room(0)
    else:
        most = min(member.limit * member.spelling.longest for member in combination.spellers)
    for text in texts:
        if most and len(text) > most:
            raise _too_long(text, combination, param)


def check_pieces(texts: Sequence[str], combination: Combination, tokenizer: Any, param: str = "prompt") -> None:
    """Raise RequestError if the first pieces of a long text have so many tokens that it fits into no context.

    They are counted up to twice as many as a context has, which is more than cuts between pieces explain. That takes a
    share of the time in which the whole text would be cut into tokens. Arguments are those of :func:`check_texts`.
    """
    counts = [(partial(_own_tokens, member.spelling), member.limit) for member in combination.spellers]
    counts = counts or [(partial(_tokens, tokenizer), combination.room(0))]
    for text in texts:
        if len(text) > LONG and any(_fills(text, 2 * context, count) for count, context in counts):
            raise _too_long(text, combination, param)


def _too_long(text: str, combination: Combination, param: str) -> RequestError:
    context = min((member.limit for member in combination.spellers), default=combination.room(0))
    return RequestError(
        f"expected a prompt of at most {context} tokens, the shortest member's context, got a text of {len(text):,} "
        "characters: shorten it",
        param=param, code="context_length_exceeded",
    )  # fmt: skip


def _fills(text: str, room: int, count: Callable[[str], int]) -> bool:
    """Return whether a text's pieces have more than ``room`` tokens, as ``count`` counts those of each."""
    pieces = (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
    return any(total > room for total in accumulate(map(count, pieces)))


def _tokens(tokenizer: Any, text: str) -> int:
    """Return the number of a text's tokens, without Python's lock."""
    return len(tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _own_tokens(spelling: Spelling, text: str) -> int:
    """Return the number of a text's tokens over bytes."""
    return len(spelling.encode(text.encode()))


def check_prompt(prompt: tuple[int, ...], combination: Combination, limit: int, own: Own) -> None:
    """Raise RequestError if a prompt is empty, has an invalid id, or leaves no room in the shortest context.

    Args:
        prompt: the prompt's token ids.
        combination: the ensemble whose vocabulary and context count.
        limit: the number of tokens asked for; if it is 0, the prompt may fill the context.
        own: what members read in the prompt's place, or empty.
    """
    vocabulary, room = combination.model.config.vocab_size, combination.room(len(prompt), own)
    if not prompt:
        raise RequestError("expected a prompt of at least one token, got an empty one", param="prompt")
    if not all(0 <= token < vocabulary for token in prompt):
        raise RequestError(f"expected token ids from 0 to {vocabulary - 1:,}", param="prompt")
    if combination.room(0) < len(prompt) + (limit > 0 and not room):
        raise RequestError(
            f"expected a prompt shorter than the shortest member's context of {combination.room(0)} tokens, got "
            f"{len(prompt)}: shorten it",
            param="prompt", code="context_length_exceeded",
        )  # fmt: skip


def check_spelled(prompt: tuple[int, ...], combination: Combination, own: Own) -> None:
    """Raise RequestError if a prompt that members spell has an end within, or exceeds a context in own tokens."""
    if within := combination.alphabet.ends.intersection(prompt[1:]):
        raise RequestError(f"expected {min(within)}, the end of a text, only as a prompt's first id", param="prompt")
    text, members = combination.alphabet.decode(prompt), combination.spellers
    before = [member.prefix if ids is None else ids for member, ids in zip_longest(members, own)]
    for name, member, prefix in zip(combination.names, members, before, strict=True):
        count = len(prefix) + len(member.spelling.encode(text))
        # A token more is needed to read several tokenizations, and one to go on.
        if count + 2 > member.limit:
            raise RequestError(
                f"expected a prompt shorter than the context of {name}, {member.limit} tokens, got {count}: shorten it",
                param="prompt", code="context_length_exceeded",
            )  # fmt: skip
