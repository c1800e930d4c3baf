"""The fields of requests: OpenAI's, strictly typed and bounded, and softmeet's own under the key ``softmeet``."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError, from_json

from softmeet.server.strict import Strict, few

Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Listed = Annotated[int, Field(ge=0, le=20)]
# More than any vocabulary has.
_ALL = 1 << 30
# How large a trust may be is the server's to say.
Rho = Annotated[float, Field(ge=0)] | Literal["inf"]
Word = Annotated[str, Field(max_length=200)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Natural = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(ge=1, lt=1 << 63)]
# The settings that a request may change under ``softmeet``; a server may allow fewer.
CHANGES = ("rule", "trust", "weights", "pool", "members", "gate", "passages")
# The most tokens of a prompt, and the most prompts of a request.
_MOST = 1 << 20
TopK = Annotated[int, Field(ge=-1, le=_MOST)]
MinP = Annotated[float, Field(ge=0, le=1)]
Repetition = Annotated[float, Field(ge=0.1, le=10)]
_MOST_PROMPTS = 1 << 14
# A long list is checked up to its first wrong entry, since one error for each would take seconds.
Ids = Annotated[list[int], Field(fail_fast=True, min_length=1, max_length=_MOST)]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=_MOST_PROMPTS)]
Lists = Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=_MOST_PROMPTS)]


def _optional(description: str) -> Any:
    """Return a field that a request may leave out, which is None then."""
    return Field(default=None, description=description)


Metadata = Annotated[
    dict[Word, Annotated[str, Field(max_length=512)]], Len(0, 16), BeforeValidator(partial(few, most=16))
]
Biases = Annotated[dict[TokenId, Bias], Len(0, 1024), BeforeValidator(partial(few, most=1024))]


class PassageIn(Strict):
    """A passage that was retrieved for the prompt, and how relevant the retriever found it."""

    is_ours = True

    text: Annotated[str, Field(min_length=1, max_length=_MOST)]
    score: float


class Extension(Strict):
    """softmeet's own fields: how the members are combined, what they read, and how much is reported.

    Each of rule, trust, weights, pool, members, gate and passages that is left out is the ensemble's own. trust is one
    number, or one per member asked for; weights has one number for each of these members, below 0 for logit-mean alone.
    With report = k every token of the answer, and of a scored prompt, has a report that lists the k most probable
    tokens of each distribution; without report nothing is reported. max_bytes ends choices over bytes, whose max_tokens
    counts the tokens that the first member's tokenizer makes of them. top_k, min_p and repetition_penalty are older
    places of the fields beside softmeet, which override them.
    """

    is_ours = True

    rule: Word | None = _optional("meet, max-entropy, logit-mean, prob-mean, …")
    trust: Rho | Annotated[list[Rho], Len(1, 64)] | None = _optional("One for all, or one each.")
    weights: Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Len(1, 64)] | None = None
    pool: Word | None = None
    members: Annotated[list[Word], Len(1, 64)] | None = _optional("Some of the members.")
    gate: Word | None = _optional("auto, unsure:T, disagreement:T, safe:T or none.")
    passages: Annotated[list[PassageIn], Field(fail_fast=True, min_length=1, max_length=64)] | None = _optional(
        "Each member reads the prompt behind each; prob-mean by their scores, as REPLUG."
    )
    passage_temperature: Annotated[float, Field(gt=0, le=1e6)] | None = _optional(
        "Of the scores' softmax; 1 by default."
    )
    report: Listed | None = _optional("Report every token, and list so many of each distribution.")
    statuses: bool | None = _optional("Count the tokens of each choice by status.")
    sources: bool | None = _optional("Say where each choice stands in files, and how much these claimed.")
    max_bytes: Positive | None = _optional("Over bytes, the most bytes of a choice.")
    byte_logprobs: bool | None = _optional("Over bytes, list log-probabilities of a chat by byte, not by token.")
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: Repetition | None = None


class StreamOptions(Strict):
    """Options of a stream: include_usage adds a last chunk with token counts; include_obfuscation has no effect."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Strict):
    """A JSON schema and its name; the answer keeps to it, whether or not strict says so."""

    name: Word
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of the answer: plain text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """What the answer has to be, by one of vLLM's fields; a grammar is in llguidance's variant of Lark's syntax."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Generation(Strict):
    """The fields of all endpoints that generate: OpenAI's, and from ``top_k`` on those that vLLM adds to them."""

    # What cannot be left out of a question, and softmeet's own fields, which belong under their key.
    matter = frozenset({
        "suffix", "prompt_embeds", "previous_response_id", "conversation", "background", "tools", "functions",
        "guided_json", "guided_regex", "guided_choice", "guided_grammar", *Extension.model_fields,
    })  # fmt: skip

    model: Word | None = _optional("As /v1/models names them; else the first.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | Annotated[list[Stop], Len(0, 16)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    stream: bool | None = None
    softmeet: Extension | None = None
    top_k: TopK | None = _optional("Draw from so many tokens; 0 or -1 for all.")
    min_p: MinP | None = _optional("The least probability, as a share of the largest.")
    repetition_penalty: Repetition | None = _optional("As in transformers.")
    min_tokens: Natural | None = _optional("No end, and no stop string, within so many tokens (or bytes).")
    ignore_eos: bool | None = _optional("An end-of-text token is one like any other.")
    stop_token_ids: Annotated[list[int], Len(0, 128)] | None = _optional("Further ends.")
    skip_special_tokens: bool | None = _optional("Leave special tokens out of the text.")
    include_stop_str_in_output: bool | None = _optional("Show a stop string or token, too.")
    truncate_prompt_tokens: Literal[-1] | Positive | None = _optional(
        "Keep the prompt's last so many tokens; -1 for those that fit into the context."
    )
    structured_outputs: StructuredOutputs | None = _optional("What the text has to be.")
    # Accepted, but without effect.
    user: Word | None = None
    metadata: Metadata | None = None
    service_tier: Word | None = None

    @property
    def hides_special(self) -> bool:
        """The field ``skip_special_tokens``: whether special tokens have no text."""
        return self.skip_special_tokens is not False

    @property
    def choices(self) -> int:
        """The field ``n``, 1 where there is none: how many continuations of each prompt the answer has."""
        return getattr(self, "n", None) or 1

    @property
    def drawn(self) -> int:
        """The field ``best_of``, else ``n``: how many continuations are drawn, of which the answer has the best."""
        return getattr(self, "best_of", None) or self.choices

    @property
    def listed(self) -> int | None:
        """How many of the most probable tokens to list at each token; None for no log-probabilities."""
        return None

    @property
    def prompt_listed(self) -> int | None:
        """The field ``prompt_logprobs``: how many tokens to list at each of the prompt's own; None for no such list."""
        return getattr(self, "prompt_logprobs", None)

    @property
    def usage_in_stream(self) -> bool:
        """The field ``stream_options.include_usage``: whether a stream ends with a chunk that has the token counts."""
        options: StreamOptions | None = getattr(self, "stream_options", None)
        return options is not None and options.include_usage


class _Choices(Generation):
    """The fields that completions and chats have, but no response."""

    max_tokens: Natural | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    prompt_logprobs: Listed | None = _optional("Score the prompt, and list so many tokens at each of its own.")
    # Accepted, but without effect.
    store: bool | None = None


class CompletionRequest(_Choices):
    """The body of ``POST /v1/completions``: one or several prompts, each a text or a list of token ids.

    All fields but ``softmeet`` are OpenAI's or vLLM's, with their meanings there; ``user``, ``metadata``, ``store`` and
    ``service_tier`` have no effect.
    """

    prompt: str | Texts | Ids | Lists
    logprobs: Annotated[int, Field(ge=-1, le=20)] | None = _optional("-1 lists all tokens.")
    return_tokens_as_token_ids: bool | None = _optional("List a token as token_id:N, not by its text.")
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = _optional(
        "Draw so many; answer with the n of the highest log-probability per token."
    )
    add_special_tokens: bool | None = _optional("Let the tokenizer add some, such as a BOS.")

    @property
    def listed(self) -> int | None:
        """The field ``logprobs``: how many tokens to list at each token of the answer."""
        return _ALL if self.logprobs == -1 else self.logprobs


class TextPart(Strict):
    """A piece of a message's text; the pieces are joined without anything between them."""

    matter = frozenset({"image_url", "input_audio", "file"})

    type: Literal["text"]
    text: str


def _object(value: Any) -> Any:
    """Return the object that a text of JSON stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return from_json(value or "{}", allow_inf_nan=False)
    except ValueError:
        raise PydanticCustomError("json_invalid", "Arguments should be a JSON object") from None


class CalledFunction(Strict):
    """A function that an earlier answer called; its arguments as an object, or as the object's text in JSON."""

    name: Word
    arguments: Annotated[dict[str, Any], BeforeValidator(_object)]


class ToolCall(Strict):
    """A call of a function in an earlier answer."""

    id: Word | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One turn of a conversation: who speaks, and the text, whole or in pieces; or what functions are called.

    What a function gives is a turn of the role ``tool``.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=1024)]
    name: Word | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=128)] | None = None
    tool_call_id: Word | None = None

    @model_validator(mode="before")
    @classmethod
    def _may_only_call(cls, value: Any) -> Any:
        """Return a message that has calls and no text with an empty one."""
        says_nothing = isinstance(value, dict) and value.get("tool_calls") and value.get("content") is None
        return {**value, "content": ""} if says_nothing else value

    def plain(self) -> dict[str, Any]:
        """Return the message as a dict for chat templates, its ``content`` as one string and arguments as objects."""
        parts = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        given = self.model_dump(include={"name", "tool_calls", "tool_call_id"}, exclude_none=True)
        return {"role": self.role, "content": parts, **{name: value for name, value in given.items() if value}}


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]


class Function(Strict):
    """A function that an answer may call, and the JSON schema of its arguments."""

    name: Word
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(default=None, exclude=True)


class Tool(Strict):
    """A tool that an answer may use: a function."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """The name of a function."""

    name: Word


class ToolName(Strict):
    """The tool that an answer has to use."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(_Choices):
    """The body of ``POST /v1/chat/completions``: the messages of a conversation, which the answer continues.

    All fields but ``softmeet`` are OpenAI's or vLLM's, with their meanings there; ``user``, ``metadata``, ``store`` and
    ``service_tier`` have no effect. If both are given, ``max_completion_tokens`` overrides ``max_tokens``.
    """

    messages: Messages
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Listed | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = _optional(
        "What the answer may call, if the members' chat templates tell of tools."
    )
    tool_choice: Literal["none", "auto", "required"] | ToolName | None = _optional(
        "Whether it may, may not or has to call one; or which."
    )
    parallel_tool_calls: bool | None = _optional("false leaves out all calls but the first.")
    continue_final_message: bool | None = _optional("Go on with the last message, the assistant's.")

    @property
    def functions(self) -> list[Function]:
        """The functions that the answer may call: those of ``tools``, unless ``tool_choice`` is none."""
        return [] if self.tool_choice == "none" else [tool.function for tool in self.tools or ()]

    @property
    def hides_special(self) -> bool:
        """Whether special tokens have no text: the tags of calls are special in some tokenizers, but needed."""
        return super().hides_special and not self.functions

    @property
    def listed(self) -> int | None:
        """The field ``top_logprobs`` if ``logprobs`` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Strict):
    """The body of ``POST /tokenize``: a prompt, or the messages of a chat; with ``return_token_strs`` texts come, too.

    Special tokens, such as a BOS, are added to a prompt unless ``add_special_tokens`` is false.
    """

    model: Word | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """The body of ``POST /detokenize``: token ids, whose text is asked for."""

    model: Word | None = None
    tokens: Ids
