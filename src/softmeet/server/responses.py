"""OpenAI's newer endpoint for chats, ``/v1/responses``: its requests, and its answers, whole or as events.

A request is answered as a chat is: its input becomes messages, and these a prompt by the tokenizer's chat template.
Nothing is stored, so every request has to send its whole conversation.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import uuid4

from annotated_types import Len
from pydantic import Field

from softmeet.errors import SoftmeetError
from softmeet.server.answer import ChoiceDelta
from softmeet.server.errors import RequestError, described
from softmeet.server.events import event
from softmeet.server.replies import ChatReply
from softmeet.server.schemas import Generation, JsonSchema, Listed, Message, Positive, ResponseFormat, Word
from softmeet.server.sequences import GenerationRequest
from softmeet.server.strict import Strict


class Part(Strict):
    """A piece of an item's text: of input, or of an earlier answer, whose further fields are ignored."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Len(0, 0)] | None = None
    logprobs: list[Any] | None = None


class Item(Strict):
    """One turn of a conversation: a new message, or one of an earlier answer, whose further fields are ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=1024)]
    type: Literal["message"] | None = None
    id: Word | None = None
    status: Word | None = None
    phase: Word | None = None
    softmeet: dict[str, Any] | None = None

    def message(self) -> Message:
        """Return the turn as a message of a chat."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=self.role, content=text)


class TextFormat(Strict):
    """The form of the answer: plain text, a JSON object, or JSON of a schema, which has a name."""

    type: Literal["text", "json_object", "json_schema"]
    name: Word | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict):
    """How the answer is written."""

    format: TextFormat | None = None


class ResponsesRequest(Generation):
    """The body of ``POST /v1/responses``: a text or a conversation, which the answer continues.

    All fields but ``softmeet`` are OpenAI's or vLLM's, with their meanings there; ``user``, ``metadata`` and
    ``service_tier`` have no effect. With ``truncation="auto"`` a prompt that is too long loses its first tokens.
    """

    input: str | Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Len(0, 1)] | None = None
    top_logprobs: Listed | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None

    @property
    def response_format(self) -> ResponseFormat | None:
        """The field ``text.format``, in the form that chats have.

        Raises:
            RequestError: if it asks for JSON of a schema and has none.
        """
        form = self.text and self.text.format
        if not form or form.type != "json_schema":
            return ResponseFormat(type=form.type) if form else None
        if form.schema_ is None:
            raise RequestError(
                'expected text.format.schema, which is missing: add it, as {"type": "json_schema", "name": "…", '
                '"schema": {…}}',
                param="text",
            )
        return ResponseFormat(type=form.type, json_schema=JsonSchema(name=form.name or "answer", schema=form.schema_))

    @property
    def messages(self) -> list[Message]:
        """The instructions, as a system message, and the input."""
        first = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*first, Message(role="user", content=self.input)]
        return [*first, *(item.message() for item in self.input)]

    @property
    def listed(self) -> int | None:
        """The field ``top_logprobs`` if ``include`` asks for log-probabilities."""
        return (self.top_logprobs or 0) if self.include else None


def checked(body: ResponsesRequest) -> ResponsesRequest:
    """Return a request in the fields that all endpoints share; refuse one whose answer is to be stored.

    Raises:
        RequestError: if ``store`` is true.
    """
    if body.store:
        raise RequestError(
            "store is not supported: no answer is kept here: leave it out, and send the whole conversation as input",
            param="store",
        )
    cut = {"truncate_prompt_tokens": -1} if body.truncation == "auto" and body.truncate_prompt_tokens is None else {}
    return body.model_copy(update=cut)


class ResponsesReply(ChatReply):
    """The writer of an answer of ``/v1/responses``: one message, in a stream of numbered events."""

    body: ResponsesRequest
    prefix = "resp_"

    def __init__(self, asked: GenerationRequest, body: ResponsesRequest) -> None:
        super().__init__(asked, body)
        self._item = f"msg_{uuid4().hex}"
        # Where in the response the text stands.
        self._place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        self._sent, self._whole = 0, ChoiceDelta(0)
        self._said: dict[str, Any] = {}
        self._log_probs_said: list[dict[str, Any]] = []

    def document(self, choices: list[ChoiceDelta], tokens: int) -> dict[str, Any]:
        """Return the whole answer of a request without streaming, as a dict for JSON; to be called once.

        Args:
            choices: the one choice, complete.
            tokens: the number of tokens drawn.
        """
        (self._whole,) = choices
        self.note(self._whole)
        self._said, self._log_probs_said = self.ours(self._whole), self._listed(self._whole)
        return self._response(_status(self._whole), [self._message(_status(self._whole))], tokens)

    def begun(self) -> str:
        """Return the events before the first token: the response, its one message and the message's one part."""
        message = self._message("in_progress") | {"content": []}
        return (
            self._event("response.created", response=self._response("in_progress"))
            + self._event("response.in_progress", response=self._response("in_progress"))
            + self._event("response.output_item.added", output_index=0, item=message)
            + self._event("response.content_part.added", **self._place, part=self._part())
        )

    def written(self, delta: ChoiceDelta) -> str:
        """Return the event that sends new text, or tokens whose log-probabilities or reports are asked for, or none."""
        self.note(delta)
        self._whole.text += delta.text
        self._whole.finish = delta.finish
        log_probs = self._listed(delta)
        self._log_probs_said += log_probs
        said = self.ours(delta)
        self._said |= {name: found for name, found in said.items() if name != "tokens"}
        reports = {"softmeet": {"tokens": said["tokens"]}} if "tokens" in said else {}
        if not (delta.text or reports or log_probs):
            return ""
        return self._event("response.output_text.delta", **self._place, delta=delta.text, logprobs=log_probs, **reports)

    def ended(self, tokens: int) -> str:
        """Return the events that end a stream, each with all that was written.

        Args:
            tokens: the number of tokens drawn.
        """
        status, log_probs = _status(self._whole), self._log_probs_said
        message = self._message(status)
        return (
            self._event("response.output_text.done", **self._place, text=self._whole.text, logprobs=log_probs)
            + self._event("response.content_part.done", **self._place, part=self._part())
            + self._event("response.output_item.done", output_index=0, item=message)
            + self._event(f"response.{status}", response=self._response(status, [message], tokens))
        )

    def failed(self, error: SoftmeetError) -> str:
        """Return the event that ends a stream by an error, with what was written before it."""
        found = {"code": "server_error", "message": described(error)[1]["error"]["message"]}
        response = self._response("failed", [self._message("incomplete")]) | {"error": found}
        return self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: Any) -> str:
        """Return the next event of a stream."""
        found = {"type": kind, "sequence_number": self._sent, **fields}
        self._sent += 1
        return f"event: {kind}\n{event(found)}"

    def _part(self) -> dict[str, Any]:
        """Return the message's one part: all text so far."""
        found = {"type": "output_text", "text": self._whole.text, "annotations": []}
        return found if self.body.listed is None else found | {"logprobs": self._log_probs_said}

    def _listed(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Return new tokens with their log-probabilities; none if they are not asked for."""
        return [] if self.body.listed is None else self.entries(delta)

    def _message(self, status: str) -> dict[str, Any]:
        """Return the answer's one message, with all text so far."""
        found = {"id": self._item, "type": "message", "status": status, "role": "assistant", "content": [self._part()]}
        return found | ({"softmeet": self._said} if self._said else {})

    def _response(
        self, status: str, output: list[dict[str, Any]] | None = None, tokens: int | None = None
    ) -> dict[str, Any]:
        """Return the response: what was asked for, and what was written.

        Args:
            status: ``in_progress``, ``completed``, ``incomplete`` if the tokens allowed were not enough, or ``failed``.
            output: the messages written.
            tokens: the number of tokens drawn; None before the end.
        """
        body = self.body
        return {
            "id": self._common["id"],
            "object": "response",
            "created_at": self._common["created"],
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.asked.model,
            "output": output or [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.asked.sampling.temperature,
            "text": {"format": _form(body)},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self.asked.sampling.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None if tokens is None else self._counts(tokens),
            "softmeet": self._settings(),
        }

    def _counts(self, tokens: int) -> dict[str, Any]:
        """Return the numbers of tokens in this endpoint's words; how many came from kept prompts is not told."""
        found = self._usage(tokens)
        return {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": found["total_tokens"],
        }


def _status(choice: ChoiceDelta) -> str:
    """Return the status of a response that has come to its end."""
    return "incomplete" if choice.finish == "length" else "completed"


def _form(body: ResponsesRequest) -> dict[str, Any]:
    """Return the form of the answer as the request gives it; plain text if it gives none."""
    form = body.text and body.text.format
    return form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}
