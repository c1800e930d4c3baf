"""Answers as the documents that OpenAI's clients expect, with what is our own under ``softmeet``."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from itertools import accumulate
from typing import Any
from uuid import uuid4

from pydantic_core import to_jsonable_python

from softmeet.server.answer import ChoiceDelta
from softmeet.server.schemas import ChatRequest, CompletionRequest
from softmeet.server.sequences import GenerationRequest, Token

# What OpenAI writes for a probability of zero, which JSON has no number for.
_IMPOSSIBLE = -9999.0
LAST_EVENT = "data: [DONE]\n\n"


def dumps(document: Any) -> str:
    """Return a document as compact JSON.

    Raises:
        ValueError: it holds NaN or an infinity, which not everybody can read back.

    >>> dumps({"text": "é", "logprob": -0.5})
    '{"text":"é","logprob":-0.5}'
    """
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def event(document: Any) -> str:
    """Return a document as a server-sent event."""
    return f"data: {dumps(document)}\n\n"


def _finite_nats(x: float | None) -> float | None:
    return x if x is None else max(x, _IMPOSSIBLE)


class Reply(ABC):
    """How one endpoint writes its answers.

    Args:
        asked: what is answered.
        body: the request as it was sent.
    """

    prefix = kind = chunk_kind = ""

    def __init__(self, asked: GenerationRequest, body: CompletionRequest | ChatRequest) -> None:
        self.asked, self.body = asked, body
        self._common = {"id": self.prefix + uuid4().hex, "created": int(time.time()), "model": asked.model}
        self._begun: set[int] = set()
        self._offsets = defaultdict[int, int](int)
        self._gates = defaultdict[int, Any](lambda: {"tokens": 0, "gated": 0, "seconds_saved": 0.0})

    @abstractmethod
    def content(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any]:
        """Return what is new of a choice, or the whole choice; ``first`` if nothing of it was sent before."""

    def document(self, choices: list[ChoiceDelta], tokens: int) -> dict[str, Any]:
        """Return the answer that is not streamed, given how many ``tokens`` were drawn for it."""
        found = [self._choice(choice, first=True) for choice in choices]
        usage, ours = self._usage(tokens), self._settings()
        return {**self._common, "object": self.kind, "choices": found, "usage": usage, "softmeet": ours}

    def chunk(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """Return one chunk of a stream; None where there is nothing to say."""
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        choice = self._choice(delta, first=first)
        wants_tokens = self.asked.top is not None or self.asked.report is not None
        if not (first or delta.text or delta.finish or delta.scored is not None or wants_tokens):
            return None
        found = {**self._common, "object": self.chunk_kind, "choices": [choice]}
        return found | {"softmeet": self._settings()} if first else found

    def last_chunk(self, tokens: int) -> dict[str, Any] | None:
        """Return the chunk that tells how many ``tokens`` were drawn; None if nobody asked for it."""
        if self.body.stream_options is None or not self.body.stream_options.include_usage:
            return None
        return {**self._common, "object": self.chunk_kind, "choices": [], "usage": self._usage(tokens)}

    def _usage(self, tokens: int) -> dict[str, int]:
        prompts = sum(map(len, self.asked.prompts))
        return {"prompt_tokens": prompts, "completion_tokens": tokens, "total_tokens": prompts + tokens}

    def _settings(self) -> dict[str, Any]:
        how = self.asked.combination
        settings = how.settings.plain()
        shown = {name: settings[name] for name in ("rule", "trust", "weights", "pool", *(["gate"] if how.gate else []))}
        return {"members": list(how.names), **shown, "seed": self.asked.sampling.seed}

    def _choice(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        tokens = [*(delta.scored or []), *delta.tokens]
        if reports := [t.report.spelled(self.asked.tokenizer) for t in tokens if t.report is not None]:
            # Null where there is no number.
            found["tokens"] = to_jsonable_python(reports, inf_nan_mode="null")
        if self.asked.combination.gate:
            gate = self._gates[delta.index]
            for token in delta.tokens:
                gate["tokens"] += 1
                gate["gated"] += token.gated
                gate["seconds_saved"] += token.saved
            if delta.finish is not None:
                found["gate"] = gate | {"share": gate["gated"] / max(gate["tokens"], 1)}
        ours = {"softmeet": found} if found else {}
        return {"index": delta.index, **self.content(delta, first=first), "finish_reason": delta.finish, **ours}

    def spell(self, token: int) -> str:
        """Return one token's text."""
        return str(self.asked.tokenizer.decode([token]))


class CompletionReply(Reply):
    """How ``/v1/completions`` writes its answers."""

    body: CompletionRequest
    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def content(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any]:
        """Return text, after the prompt's if it is to be echoed, and log-probabilities."""
        prompt = self.asked.prompts[delta.index // self.asked.choices]
        echoed = self.asked.tokenizer.decode(list(prompt)) if self.body.echo and first else ""
        return {"text": echoed + delta.text, "logprobs": self._log_probs(delta, prompt)}

    def _log_probs(self, delta: ChoiceDelta, prompt: tuple[int, ...]) -> dict[str, Any] | None:
        if self.asked.top is None:
            return None
        # At the prompt's first token nobody could be asked.
        scored = [] if delta.scored is None else [Token(prompt[0]), *delta.scored]
        rows = [*scored, *delta.tokens]
        texts = [self.spell(t.token) for t in rows]
        offsets = list(accumulate(map(len, texts), initial=self._offsets[delta.index]))
        self._offsets[delta.index] = offsets.pop()
        return {
            "tokens": texts,
            "token_logprobs": [_finite_nats(t.log_prob) for t in rows],
            "top_logprobs": [None if t.log_prob is None else self._top(t) for t in rows],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float | None]:
        # Two tokens may look alike; the more probable one keeps the name.
        found: dict[str, float | None] = {}
        for j, x in [*token.top, (token.token, token.log_prob)]:
            found.setdefault(self.spell(j), _finite_nats(x))
        return found


class ChatReply(Reply):
    """How ``/v1/chat/completions`` writes its answers."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def content(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any]:
        """Return the message, or of a stream the new text and at the beginning whose it is."""
        message = ({"role": "assistant"} if first else {}) | {"content": delta.text}
        found = {"delta": message} if self.body.stream else {"message": message | {"refusal": None}}
        return found | {"logprobs": self._log_probs(delta)}

    def _log_probs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        if self.asked.top is None:
            return None
        found = [
            self._entry(t.token, t.log_prob) | {"top_logprobs": [self._entry(j, x) for j, x in t.top]}
            for t in delta.tokens
        ]
        return {"content": found, "refusal": None}

    def _entry(self, token: int, log_prob: float | None) -> dict[str, Any]:
        text = self.spell(token)
        # A piece of a character has no bytes of its own in a text.
        return {"token": text, "logprob": _finite_nats(log_prob), "bytes": None if "�" in text else list(text.encode())}
