"""ollama's own API for answers, ``/api/chat`` and ``/api/generate``: its requests as ours, and answers as its lines.

What a request holds is checked as the fields of ``/v1/chat/completions`` and ``/v1/completions`` that it stands for.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from softmeet.errors import SoftmeetError
from softmeet.hf.chat import chat_of
from softmeet.server.answer import ChoiceDelta
from softmeet.server.ensembles import Served
from softmeet.server.errors import RequestError, described
from softmeet.server.events import dumps
from softmeet.server.refusals import refusal
from softmeet.server.replies import ChatReply
from softmeet.server.schemas import CalledFunction, ChatRequest, CompletionRequest, Generation, Word
from softmeet.server.sequences import GenerationRequest
from softmeet.server.strict import PASSED_OVER, Strict

Asked = TypeVar("Asked", bound=Generation)
# Options that are fields of ours.
_OPTIONS = {
    "num_predict": "max_tokens", "repeat_penalty": "repetition_penalty",
    **{name: name for name in (
        "temperature", "seed", "stop", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty",
    )},
}  # fmt: skip
# Options for how a model is loaded, which it has been.
_LOADING = {
    "num_ctx", "num_batch", "num_gpu", "num_thread", "num_keep", "main_gpu", "low_vram", "f16_kv", "vocab_only",
    "use_mmap", "use_mlock", "numa", "logits_all", "embedding_only",
}  # fmt: skip
_NAMES = {ours: name for name, ours in _OPTIONS.items()} | {"response_format": "format"}
_UNKNOWN = {"parent_model": "", "format": "", "parameter_size": "", "quantization_level": ""}


class ErrorLine(BaseModel):
    """The body of every response of ollama's API whose status is 400 or more."""

    error: str


class _Asking(Strict):
    """The fields that both endpoints have."""

    matter = frozenset({"suffix", "template", "context", "images"})
    model: Word
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Accepted, but without effect.
    keep_alive: float | int | str | None = None

    def fields(self) -> dict[str, Any]:
        """Return the fields as ours.

        Raises:
            RequestError: if the model is to think, or unknown options are refused and there is one.
        """
        if self.think:
            raise RequestError(f'"{self.model}" does not support thinking', param="think")
        given: dict[str, Any] = {"model": self.model.removesuffix(":latest"), "stream": self.stream is not False}
        for name, value in (self.options or {}).items():
            if name in _OPTIONS:
                given[_OPTIONS[name]] = value
            elif name not in _LOADING:
                _pass_over(name)
        # Of a number below 1 ollama makes none.
        most = given.get("max_tokens")
        given["max_tokens"] = None if isinstance(most, int) and most < 1 else most
        if self.format == "json":
            given["response_format"] = {"type": "json_object"}
        elif self.format:
            given["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": self.format}}
        return given


class CalledTool(Strict):
    """A call of a function in an earlier answer."""

    function: CalledFunction
    id: Word | None = None


class Turn(Strict):
    """One turn of a conversation; what a function gives is one of the role ``tool``, with the function's name."""

    matter = frozenset({"images"})
    role: Word
    content: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_name: Word | None = None
    # Accepted, but without effect.
    thinking: str | None = None

    def message(self) -> dict[str, Any]:
        """Return the turn as a message of ours."""
        calls = [{"function": call.function.model_dump()} for call in self.tool_calls or ()]
        return {"role": self.role, "content": self.content or "", "name": self.tool_name, "tool_calls": calls}


class OllamaChat(_Asking):
    """The body of ``POST /api/chat``: the messages of a conversation, which the answer continues."""

    messages: list[Turn] | None = None
    tools: list[dict[str, Any]] | None = None

    def asked(self) -> ChatRequest | None:
        """Return the request as ours; None if there is no message, as where a client has a model loaded."""
        if not self.messages:
            return None
        listed = {"logprobs": self.logprobs, "top_logprobs": self.top_logprobs}
        told = {"messages": [turn.message() for turn in self.messages], "tools": self.tools}
        return _checked(ChatRequest, self.fields() | listed | told)


class OllamaGenerate(_Asking):
    """The body of ``POST /api/generate``: a prompt that is answered as a user's message; if it is raw, a text."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None

    def asked(self) -> Generation | None:
        """Return the request as ours; None if there is no prompt, as where a client has a model loaded."""
        if not self.prompt:
            return None
        if self.raw:
            listed = {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}
            return _checked(CompletionRequest, self.fields() | listed | {"prompt": self.prompt})
        first = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*first, {"role": "user", "content": self.prompt}]
        listed = {"logprobs": self.logprobs, "top_logprobs": self.top_logprobs}
        return _checked(ChatRequest, self.fields() | listed | {"messages": messages})


class ShowRequest(Strict):
    """The body of ``POST /api/show``: the name of an ensemble."""

    model: Word | None = None
    # Its name in older versions.
    name: Word | None = None
    verbose: bool | None = None


def _pass_over(name: str) -> None:
    """Pass over an option that is not supported, or raise RequestError if unknown fields are refused."""
    if (tell := PASSED_OVER.get()) is None:
        raise RequestError(f"options.{name[:100]} is not supported: leave it out", param="options")
    tell(f"options.{name}")


def _checked(kind: type[Asked], fields: dict[str, Any]) -> Asked:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise refusal(error.errors()) from None


def in_its_words(error: RequestError) -> RequestError:
    """Return an error that names fields as ollama's API does."""
    said = str(error)
    for ours, name in _NAMES.items():
        said = said.replace(ours, name)
    return RequestError(said, status=error.status, param=error.param, code=error.code)


class OllamaReply(ChatReply):
    """The writer of an answer of ``/api/chat`` or ``/api/generate``: one line of JSON, or in a stream several.

    Args:
        asked: the checked request that is answered.
        body: the request, as ours.
        generates: whether it is of ``/api/generate``, where the text is no message.
    """

    media_type = "application/x-ndjson"

    def __init__(self, asked: GenerationRequest, body: Generation, *, generates: bool) -> None:
        super().__init__(asked, body)
        self._generates, self._started, self._whole = generates, time.perf_counter(), ChoiceDelta(0)

    def document(self, choices: list[ChoiceDelta], tokens: int) -> dict[str, Any]:
        """Return the whole answer of a request without streaming, as a dict for JSON; to be called once."""
        (self._whole,) = choices
        self.note(self._whole)
        return self._line(self._whole) | self._end(tokens)

    def written(self, delta: ChoiceDelta) -> str:
        """Return the line that sends new text, calls of functions or log-probabilities, or none."""
        self.note(delta)
        self._whole.join(delta)
        return dumps(self._line(delta)) + "\n" if delta.text or delta.calls or self.body.listed is not None else ""

    def ended(self, tokens: int) -> str:
        """Return the line that ends a stream, with counts and times."""
        return dumps(self._line(ChoiceDelta(0)) | self._end(tokens)) + "\n"

    def failed(self, error: SoftmeetError) -> str:
        """Return the line that ends a stream by an error."""
        return dumps({"error": described(error)[1]["error"]["message"]}) + "\n"

    def _line(self, delta: ChoiceDelta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.text}
        if delta.calls:
            called = [{"function": {"name": call.name, "arguments": call.arguments}} for call in delta.calls]
            message["tool_calls"] = called
        said = {"response": delta.text} if self._generates else {"message": message}
        listed = {} if self.body.listed is None else {"logprobs": self.entries(delta)}
        return {"model": self.asked.model, "created_at": _at(time.time()), **said, "done": False, **listed}

    def _end(self, tokens: int) -> dict[str, Any]:
        """Return the fields of the last line: why the answer ended, numbers of tokens, and times in nanoseconds."""
        usage, now = self._usage(tokens), time.perf_counter()
        began = now if self._whole.began is None else self._whole.began
        return {
            "done": True,
            "done_reason": "length" if self._whole.finish == "length" else "stop",
            "total_duration": _nanoseconds(now - self._started),
            "load_duration": 0,
            "prompt_eval_count": usage["prompt_tokens"],
            "prompt_eval_duration": _nanoseconds(began - self._started),
            "eval_count": usage["completion_tokens"],
            "eval_duration": _nanoseconds(now - began),
        }


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def loaded(name: str, *, generates: bool) -> dict[str, Any]:
    """Return the answer to a request that asks for nothing but that a model is loaded, which it is."""
    said = {"response": ""} if generates else {"message": {"role": "assistant", "content": ""}}
    return {"model": name, "created_at": _at(time.time()), **said, "done": True, "done_reason": "load"}


def listed(served: Served) -> dict[str, Any]:
    """Return an ensemble as ``/api/tags`` lists it; what it has not, as a size, is empty."""
    about = {"modified_at": _at(served.created), "size": 0, "digest": "", "details": _details()}
    return {"name": served.name, "model": served.name, **about}


def shown(served: Served) -> dict[str, Any]:
    """Return an ensemble as ``/api/show`` shows it: its context, members, and whether it can call functions."""
    chat = chat_of(served.ensemble.model)
    context = getattr(served.ensemble.model.config, "max_position_embeddings", None)
    facts = {"general.architecture": "softmeet", "softmeet.context_length": context, "softmeet.members": served.names}
    can_call = not (chat.missing or chat.without_tools)
    return {
        "modified_at": _at(served.created),
        "details": _details(),
        "model_info": facts,
        "capabilities": ["completion", *["tools"] * can_call],
    }


def _details() -> dict[str, Any]:
    return {**_UNKNOWN, "family": "softmeet", "families": ["softmeet"]}
