"""The page's conversation: what a visitor says, and what the ensemble answers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from html import escape
from typing import Any

import gradio as gr
from pydantic import ValidationError

from softmeet.engine import ANSWER_TOKENS
from softmeet.errors import SoftmeetError
from softmeet.hf.chat import TEMPERATURE, chat_of
from softmeet.server.answer import AnswerStream
from softmeet.server.errors import RequestError
from softmeet.server.refusals import refusal
from softmeet.server.schemas import ChatRequest, Extension
from softmeet.server.sequences import GenerationRequest
from softmeet.server.serving import Serving

# Seconds between two updates of an answer, and the most tokens of one.
_FRAME, _LONGEST = 0.1, 2048


def is_for_chats(serving: Serving) -> bool:
    """Return whether all members of the first ensemble have a chat template of their own."""
    chat = chat_of(serving.ensembles.find(None).ensemble.model)
    return not (chat.missing or chat.plainly)


def conversation(serving: Serving) -> None:
    """Add a conversation with a server's ensembles to the Gradio blocks that are being built.

    Args:
        serving: the ensembles and the batcher that answers, in this process.
    """
    names = [s.name for s in serving.ensembles]
    # Half of a context is for what is asked.
    rooms = [served.combination(Extension(), ()).room(0) // 2 for served in serving.ensembles]
    longest = min(_LONGEST, serving.settings.max_tokens, *rooms)
    own = [
        gr.Dropdown(names, value=names[0], label="Ensemble", visible=len(names) > 1, render=False),
        gr.Textbox(label="System message", lines=2, render=False, elem_id="system"),
        gr.Slider(1, longest, min(ANSWER_TOKENS, longest), step=1, label="Most tokens of an answer", render=False),
        gr.Slider(0, 2, TEMPERATURE, step=0.05, label="Temperature", render=False),
    ]

    async def answer(text: str, history: list[Any], *chosen: Any) -> AsyncIterator[str]:
        async for told in _answers(serving, text, history, *chosen):
            yield told

    each = (f"{s.name}: {' and '.join(s.names)}" for s in serving.ensembles)
    gr.HTML(f"<p>{escape('; '.join(each))}</p>")
    shown = gr.Chatbot(elem_id="chatbot", height=480, show_label=False, buttons=["copy"], render=False)
    gr.ChatInterface(
        answer, chatbot=shown, additional_inputs=own, concurrency_limit=None, api_visibility="private",
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False), flagging_mode="never",
        analytics_enabled=False, show_progress="hidden",
    )  # fmt: skip


def turns(history: Sequence[Any], system: str | None, text: str) -> list[dict[str, str]]:
    """Return a conversation as the API has it, from Gradio's history and a new message."""
    before = [{"role": "system", "content": system}] if (system or "").strip() else []
    said = [{"role": one["role"], "content": _words(one["content"])} for one in history]
    return [*before, *(one for one in said if one["content"]), {"role": "user", "content": text}]


def _words(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


async def _prepared(serving: Serving, given: dict[str, Any], told: list[dict[str, str]]) -> GenerationRequest:
    """Return a request for an answer; where a context is full, as few of the first turns as need be are left out."""
    first = sum(one["role"] == "system" for one in told)

    async def without(pairs: int) -> GenerationRequest | RequestError:
        await asyncio.sleep(0)  # others come between
        left = [*told[:first], *told[first + 2 * pairs :]]
        try:
            return await serving.prepare(ChatRequest.model_validate({**given, "messages": left}))
        except RequestError as error:
            if error.code != "context_length_exceeded":
                raise
            return error

    found = await without(0)
    if isinstance(found, RequestError):
        found = await _halved(without, max((len(told) - first - 1) // 2, 0))
    if isinstance(found, RequestError):
        raise found
    return found


async def _halved(
    without: Callable[[int], Awaitable[GenerationRequest | RequestError]], most: int
) -> GenerationRequest | RequestError:
    """Return the request with the fewest pairs of turns left out, more than none; the error of leaving out the most.

    Thousands may have to go, so that their number is found by halving.
    """
    fewest, found = 0, await without(most)
    while most - fewest > 1 and not isinstance(found, RequestError):
        middle = (fewest + most) // 2
        if isinstance(shorter := await without(middle), RequestError):
            fewest = middle
        else:
            most, found = middle, shorter
    return found


async def _answers(
    serving: Serving, text: str, history: list[Any], name: str, system: str | None, longest: float, temperature: float
) -> AsyncIterator[str]:
    """Yield an answer as far as it has come, some times a second."""
    given = {"model": name, "max_tokens": int(longest), "temperature": float(temperature)}
    given["seed"] = secrets.randbits(32)
    stream, said, shown = None, "", 0.0
    try:
        stream = AnswerStream(serving.batcher, await _prepared(serving, given, turns(history, system, text)))
        async for delta in stream.deltas():
            said += delta.text
            if time.monotonic() - shown > _FRAME:
                shown = time.monotonic()
                yield said
        yield said
    except (SoftmeetError, ValidationError) as error:
        found = refusal(error.errors()) if isinstance(error, ValidationError) else error
        raise gr.Error(str(found), print_exception=False) from None
    finally:
        if stream is not None:
            stream.cancel()
