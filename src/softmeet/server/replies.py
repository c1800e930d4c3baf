"""Parts of an answer as OpenAI's clients expect them, with ours under ``softmeet``."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import asdict
from itertools import accumulate
from typing import Any
from uuid import uuid4

from pydantic_core import to_jsonable_python

from softmeet.server.answer import Part, Plan
from softmeet.server.schemas import ChatRequest, CompletionRequest
from softmeet.server.work import Token

# What OpenAI writes for a probability of zero, which JSON has no number for.
_IMPOSSIBLE = -9999.0


def dumps(document: Any) -> str:
    """JSON without NaN and infinities; they cannot be read back everywhere."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _nats(x: float | None) -> float | None:
    return x if x is None else max(x, _IMPOSSIBLE)


class Reply(ABC):
    """How one endpoint writes its answers."""

    def __init__(self, plan: Plan, request: CompletionRequest | ChatRequest) -> None:
        self.plan, self.request = plan, request
        self._common = {"id": self.prefix + uuid4().hex, "created": int(time.time()), "model": plan.model}
        self._begun: set[int] = set()

    prefix: str
    kind: str
    chunk_kind: str

    @abstractmethod
    def delta(self, part: Part, *, first: bool) -> dict[str, Any]:
        """What is new of a choice."""

    def whole(self, part: Part) -> dict[str, Any]:
        """The same of a choice that is not streamed."""
        return self.delta(part, first=True)

    def document(self, choices: list[Part], tokens: int) -> dict[str, Any]:
        """The answer that is not streamed."""
        found = [self._choice(part, self.whole(part)) for part in choices]
        usage, ours = self._usage(tokens), self._settings()
        return {**self._common, "object": self.kind, "choices": found, "usage": usage, "softmeet": ours}

    def chunk(self, part: Part) -> dict[str, Any] | None:
        """One chunk of a stream; None where there is nothing to say."""
        first = part.index not in self._begun
        wants_tokens = self.plan.work.top is not None or self.plan.work.report is not None
        if not (first or part.text or part.finish or part.scored is not None or wants_tokens):
            return None
        self._begun.add(part.index)
        choices = [self._choice(part, self.delta(part, first=first))]
        found = {**self._common, "object": self.chunk_kind, "choices": choices}
        return found | {"softmeet": self._settings()} if first else found

    def last_chunk(self, tokens: int) -> dict[str, Any] | None:
        """The usage, if it was asked for."""
        if self.request.stream_options is None or not self.request.stream_options.include_usage:
            return None
        return {**self._common, "object": self.chunk_kind, "choices": [], "usage": self._usage(tokens)}

    def _usage(self, tokens: int) -> dict[str, int]:
        asked = sum(map(len, self.plan.prompts))
        return {"prompt_tokens": asked, "completion_tokens": tokens, "total_tokens": asked + tokens}

    def _settings(self) -> dict[str, Any]:
        how = self.plan.work.combination
        shown = how.settings.plain()
        found = {name: shown[name] for name in ("rule", "trust", "weights", "pool")}
        found |= {"gate": shown["gate"]} if how.gate else {}
        return {"members": list(self.plan.members), **found, "seed": self.plan.work.sampling.seed}

    def _choice(self, part: Part, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": part.index, **content, "finish_reason": part.finish} | self._reported(part)

    def _reported(self, part: Part) -> dict[str, Any]:
        tokens = [*(part.scored or []), *part.tokens]
        reports = [t.report.spelled(self.plan.tokenizer) for t in tokens if t.report is not None]
        # Null where there is no number.
        found = {"tokens": to_jsonable_python(reports, inf_nan_mode="null")} if reports else {}
        if part.gate is not None:
            found["gate"] = asdict(part.gate) | {"share": part.gate.gated / max(part.gate.tokens, 1)}
        return {"softmeet": found} if found else {}

    def spell(self, token: int) -> str:
        """One token's text."""
        return str(self.plan.tokenizer.decode([token]))


class CompletionReply(Reply):
    """``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, plan: Plan, request: CompletionRequest) -> None:
        super().__init__(plan, request)
        self._echo, self._offsets = bool(request.echo), defaultdict[int, int](int)

    def delta(self, part: Part, *, first: bool) -> dict[str, Any]:
        """Text, after the prompt's if it is to be echoed, and log-probabilities."""
        prompt = self.plan.prompts[part.index // self.plan.choices]
        echoed = self.plan.tokenizer.decode(list(prompt)) if self._echo and first else ""
        return {"text": echoed + part.text, "logprobs": self._log_probs(part, prompt)}

    def _log_probs(self, part: Part, prompt: tuple[int, ...]) -> dict[str, Any] | None:
        if self.plan.work.top is None:
            return None
        # At the prompt's first token nobody could be asked.
        scored = [] if part.scored is None else [Token(prompt[0]), *part.scored]
        rows = [*scored, *part.tokens]
        texts = [self.spell(t.token) for t in rows]
        offsets = list(accumulate(map(len, texts), initial=self._offsets[part.index]))
        self._offsets[part.index] = offsets.pop()
        return {
            "tokens": texts,
            "token_logprobs": [_nats(t.log_prob) for t in rows],
            "top_logprobs": [None if t.log_prob is None else self._top(t) for t in rows],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float | None]:
        # Two tokens may look alike; the more probable one keeps the name.
        found: dict[str, float | None] = {}
        for j, x in [*token.top, (token.token, token.log_prob)]:
            found.setdefault(self.spell(j), _nats(x))
        return found


class ChatReply(Reply):
    """``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def whole(self, part: Part) -> dict[str, Any]:
        """The message."""
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"message": message, "logprobs": self._log_probs(part)}

    def delta(self, part: Part, *, first: bool) -> dict[str, Any]:
        """The new text, and whose it is at the beginning."""
        role = {"role": "assistant"} if first else {}
        return {"delta": role | {"content": part.text}, "logprobs": self._log_probs(part)}

    def _log_probs(self, part: Part) -> dict[str, Any] | None:
        if self.plan.work.top is None:
            return None
        found = [
            self._entry(t.token, t.log_prob) | {"top_logprobs": [self._entry(j, x) for j, x in t.top]}
            for t in part.tokens
        ]
        return {"content": found, "refusal": None}

    def _entry(self, token: int, log_prob: float | None) -> dict[str, Any]:
        text = self.spell(token)
        # A piece of a character has no bytes of its own in a text.
        return {"token": text, "logprob": _nats(log_prob), "bytes": None if "�" in text else list(text.encode())}
