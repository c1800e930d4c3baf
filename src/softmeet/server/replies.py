"""Answers in the JSON form that OpenAI's clients expect, with softmeet's own fields under the key ``softmeet``."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any
from uuid import uuid4

from pydantic_core import to_jsonable_python

from softmeet.errors import SoftmeetError
from softmeet.hf.chat import chat_of
from softmeet.members.member import short
from softmeet.readers.reader import Alphabet
from softmeet.server.answer import ChoiceDelta
from softmeet.server.errors import described
from softmeet.server.events import LAST_EVENT, event
from softmeet.server.schemas import CompletionRequest, Generation
from softmeet.server.sequences import GenerationRequest, Token
from softmeet.server.sources import told
from softmeet.server.texts import Cutting, Places, shown_bytes, token_texts

# The log-probability that OpenAI writes for probability zero, since JSON has no -inf.
_IMPOSSIBLE = -9999.0


def _finite_nats(x: float | None) -> float | None:
    """Return a log-probability in nats, with -9999 for -inf and everything below; None stays None."""
    return x if x is None else max(x, _IMPOSSIBLE)


def _mean(choice: ChoiceDelta) -> float:
    """Return the mean of the log-probabilities of a choice's tokens, in nats; 0 if it has none."""
    log_probs = [token.log_prob or 0.0 for token in choice.tokens]
    return sum(log_probs) / max(len(log_probs), 1)


class Reply(ABC):
    """The writer of one request's answer at one endpoint, as one JSON document or as the chunks of a stream.

    Each endpoint has a subclass, which says how a choice's text is written (:meth:`content`).

    Args:
        asked: the checked request that is answered, as :meth:`Serving.prepare` returns it for ``body``.
        body: the request as it was sent.

    Attributes:
        texts: the texts of single tokens.
        prefix: the beginning of an answer's ``id``.
        kind, chunk_kind: the field ``object`` of a document and of a chunk.
        media_type: that of a stream.
    """

    media_type = "text/event-stream"
    prefix = kind = chunk_kind = ""

    def __init__(self, asked: GenerationRequest, body: Generation) -> None:
        self.asked, self.body = asked, body
        self.texts = token_texts(asked.tokenizer)
        self._common = {"id": self.prefix + uuid4().hex, "created": int(time.time()), "model": asked.model}
        self._begun: set[int] = set()
        self._places: dict[int, Places] = {}
        self._cut: dict[int, tuple[Cutting, list[Token]]] = {}
        self._gates = defaultdict[int, Any](lambda: {"tokens": 0, "gated": 0, "seconds_saved": 0.0})
        self._statuses = defaultdict[int, Counter[str]](Counter)
        # Of each choice, all that was written, if it is to be told where it stands in files.
        self._written = dict[int, ChoiceDelta]()
        # Of each choice, the symbols so far that count.
        self._drawn = defaultdict[int, list[int]](list)
        # Of each choice, how many calls of functions there were.
        self._called = defaultdict[int, int](int)

    @abstractmethod
    def content(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any]:
        """Return the endpoint's own fields of one choice: text or message, and ``logprobs`` (nats; None unless asked).

        Args:
            delta: new text and tokens of the choice, or, without streaming, the whole choice.
            first: whether nothing of this choice was sent before.
        """

    def document(self, choices: list[ChoiceDelta], tokens: int) -> dict[str, Any]:
        """Return the whole answer of a request without streaming, as a dict for JSON; to be called once.

        Args:
            choices: every choice, complete, as :meth:`AnswerStream.whole` returns them.
            tokens: the number of tokens drawn, summed over choices.
        """
        for choice in choices:
            self.note(choice)
        found = [self._choice(choice, first=True) for choice in self._best(choices)]
        usage, ours = self._usage(tokens), self._settings()
        return {**self._common, "object": self.kind, "choices": found, "usage": usage, "softmeet": ours}

    def note(self, delta: ChoiceDelta) -> None:
        """Take note of what is new in a choice, to count its tokens; called once for each delta."""
        # An end that ends a text is none of its tokens.
        ends = () if self.asked.ignore_eos else self.asked.combination.alphabet.ends
        self._drawn[delta.index] += [t.token for t in delta.tokens if t.token not in ends]

    def begun(self) -> str:
        """Return the events of a stream that come before all others, perhaps none."""
        return ""

    def written(self, delta: ChoiceDelta) -> str:
        """Return the event of a stream that sends new text and tokens of a choice, or "" if there is nothing to send.

        A chunk is sent for a choice's first delta (this chunk also has the settings that were used); for a delta that
        has text or scored tokens or ends its choice; and for every delta if log-probabilities or reports of tokens are
        asked for. To be called once for each delta, in order, since text offsets and gate counts are summed up.
        """
        self.note(delta)
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        choice = self._choice(delta, first=first)
        wants_tokens = self.body.listed is not None or self.asked.report is not None
        said = delta.text or delta.calls or delta.finish or delta.scored is not None
        if not (first or said or wants_tokens):
            return ""
        found = {**self._common, "object": self.chunk_kind, "choices": [choice]}
        return event(found | {"softmeet": self._settings()} if first else found)

    def ended(self, tokens: int) -> str:
        """Return the events that end a stream: the token counts, if they are asked for, and ``[DONE]``.

        Args:
            tokens: the number of tokens drawn, summed over choices.
        """
        if not self.body.usage_in_stream:
            return LAST_EVENT
        usage = {**self._common, "object": self.chunk_kind, "choices": [], "usage": self._usage(tokens)}
        return event(usage) + LAST_EVENT

    def failed(self, error: SoftmeetError) -> str:
        """Return the events that end a stream by an error."""
        return event(described(error)[1]) + LAST_EVENT

    def _best(self, choices: list[ChoiceDelta]) -> list[ChoiceDelta]:
        """Return the choices that are answered, of all that were drawn: for each prompt those of the best mean.

        The mean is of the log-probabilities of a choice's tokens, the one that ended it included.
        """
        drawn, kept = self.asked.choices, self.body.choices
        if drawn == kept:
            return choices
        prompts = [choices[start : start + drawn] for start in range(0, len(choices), drawn)]
        best = [choice for own in prompts for choice in sorted(own, key=_mean, reverse=True)[:kept]]
        return [replace(choice, index=k) for k, choice in enumerate(best)]

    def _usage(self, tokens: int) -> dict[str, Any]:
        """Return the numbers of prompt tokens, of drawn ``tokens`` and of both together.

        Over bytes they are those of the first member's tokenizer, and softmeet's own fields say so, with the numbers of
        bytes and of each member's own tokens in the same texts.
        """
        how, prompts, ours = self.asked.combination, sum(map(len, self.asked.prompts)), dict[str, Any]()
        if not how.symbols_are_tokens:
            counts = [self._own_tokens(i, reader.alphabet) for i, reader in enumerate(how.model.readers_of_members)]
            prompts, tokens = counts[0]["prompt_tokens"], counts[0]["completion_tokens"]
            written = sum(len(how.alphabet.decode(symbols)) for symbols in self._drawn.values())
            sizes = {"prompt_bytes": self.prompt_bytes(), "completion_bytes": written}
            ours = {"softmeet": {"unit": "token", "tokenizer": how.names[0], **sizes}}
            ours["softmeet"]["members"] = dict(zip(how.names, counts, strict=True))
        return {"prompt_tokens": prompts, "completion_tokens": tokens, "total_tokens": prompts + tokens, **ours}

    def prompt_bytes(self) -> int:
        """Return the number of bytes of all prompts."""
        return sum(len(self.asked.combination.alphabet.decode(prompt)) for prompt in self.asked.prompts)

    def _own_tokens(self, i: int, alphabet: Alphabet) -> dict[str, int]:
        """Return how many of a member's own tokens the prompts and the drawn texts are, as its tokenizer cuts each."""
        before = sum(len(own[i] or ()) for own in self.asked.own if own)
        # What begins a text is none of its tokens.
        texts = [prompt[prompt[0] in alphabet.ends :] for prompt in self.asked.prompts]
        return {
            "prompt_tokens": before + sum(map(alphabet.count, texts)),
            "completion_tokens": sum(map(alphabet.count, self._drawn.values())),
        }

    def _settings(self) -> dict[str, Any]:
        """Return the members, the settings and the seed that were used for the answer."""
        how = self.asked.combination
        files = {"files": [reader.name for reader in how.model.claimants]} if how.model.claimants else {}
        return {"members": list(how.names), **files, **how.shown(), "seed": self.asked.sampling.seed}

    def _choice(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any]:
        """Return one choice as JSON: its content, why it ended and softmeet's own fields, under ``softmeet``.

        Args:
            delta: new text and tokens of the choice, or, without streaming, the whole choice.
            first: whether nothing of this choice was sent before.
        """
        found = self.ours(delta)
        ended = {"finish_reason": delta.finish, "stop_reason": delta.stopped}
        ours = {"softmeet": found} if found else {}
        return {"index": delta.index, **self.content(delta, first=first), **ended, **ours}

    def ours(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return softmeet's own fields of a choice, of what is new in it.

        These are reports of tokens, if they are asked for, and at the choice's end the counts of its gate and, if they
        are asked for, how many tokens ended with each :class:`softmeet.Status`, scored ones of the prompt included, and
        where it stands in files.

        Args:
            delta: new text and tokens of the choice, or, without streaming, the whole choice.
        """
        found: dict[str, Any] = {}
        tokens = [*(delta.scored or []), *delta.tokens]
        if reports := [t.report for t in tokens if t.report is not None]:
            # JSON has no NaN and no infinity: null stands for them.
            found["tokens"] = to_jsonable_python(reports, inf_nan_mode="null")
        if self.body.softmeet and self.body.softmeet.statuses:
            self._statuses[delta.index].update(token.status for token in tokens)
            if delta.finish is not None:
                found["statuses"] = dict(self._statuses[delta.index])
        if self.asked.combination.gate:
            gate = self._gates[delta.index]
            for token in delta.tokens:
                gate["tokens"] += 1
                gate["gated"] += token.gated
                gate["seconds_saved"] += token.saved
            if delta.finish is not None:
                found["gate"] = gate | {"share": gate["gated"] / max(gate["tokens"], 1)}
        return found | (self._sources(delta) if self.asked.sources else {})

    def _sources(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return where a choice stands in files, and how much these claimed, once it has ended."""
        whole = self._written.setdefault(delta.index, ChoiceDelta(delta.index))
        whole.join(delta)
        return {} if delta.finish is None else told(self.asked, whole.text, whole.tokens)

    def _prompt_log_probs(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return vLLM's field ``prompt_logprobs``: for each of the prompt's tokens but the first an object by token id.

        An object has the most probable tokens and the prompt's own, with log-probability in nats, rank and text. It is
        left out unless it is asked for.
        """
        count = self.body.prompt_listed
        if count is None or delta.scored is None:
            return {}

        def described(token: int, log_prob: float | None, rank: int | None) -> dict[str, Any]:
            return {"logprob": _finite_nats(log_prob), "rank": rank, "decoded_token": self.texts.text_of(token)}

        rows = [
            {str(t.token): described(t.token, t.log_prob, t.rank)}
            | {str(j): described(j, x, rank) for rank, (j, x) in enumerate(t.top[:count], 1)}
            for t in delta.scored
        ]
        return {"prompt_logprobs": [None, *rows]}


class CompletionReply(Reply):
    """The writer of an answer of ``/v1/completions``."""

    body: CompletionRequest
    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def content(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any]:
        """Return ``text`` and ``logprobs`` of one choice; with ``echo`` the first text begins with the prompt's.

        Args:
            delta: new text and tokens of the choice, or, without streaming, the whole choice.
            first: whether nothing of this choice was sent before.
        """
        prompt = self.asked.prompts[delta.index // self.body.choices]
        echoed = self._decoded(prompt) if self.body.echo and first else ""
        found = {"text": echoed + delta.text, "logprobs": self._log_probs(delta, prompt)}
        return found | self._prompt_log_probs(delta)

    def _decoded(self, prompt: tuple[int, ...]) -> str:
        return str(self.asked.tokenizer.decode(list(prompt)))

    def _log_probs(self, delta: ChoiceDelta, prompt: tuple[int, ...]) -> dict[str, Any] | None:
        """Return a choice's tokens, log-probabilities in nats and text offsets; None if they are not asked for.

        Offsets count the characters of the prompt and the text behind it, whether the prompt is echoed or not.
        """
        if self.body.listed is None:
            return None
        # No member predicts the prompt's first token, so it has no log-probability.
        scored = [Token(prompt[0]), *delta.scored] if self.body.echo and delta.scored is not None else []
        rows = [*scored, *delta.tokens]
        tokenizer = self.asked.tokenizer
        if delta.index not in self._places:
            start = len(self._decoded(prompt))
            self._places[delta.index] = Places(tokenizer, start, special=not self.asked.skip_special)
        before, after = Places(tokenizer, special=True), self._places[delta.index]
        offsets = [before.push(t.token) for t in scored] + [after.push(t.token) for t in delta.tokens]
        return {
            "tokens": [self._name(t.token) for t in rows],
            "token_logprobs": [_finite_nats(t.log_prob) for t in rows],
            "top_logprobs": [None if t.log_prob is None else self._top(t) for t in rows],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float | None]:
        """Return log-probabilities in nats by the text of the most probable tokens and of the token itself."""
        # Two tokens may have the same bytes, whose text is the key unless ids are; the more probable one is kept.
        found: dict[str, float | None] = {}
        for j, x in [*token.top[: self.body.listed], (token.token, token.log_prob)]:
            found.setdefault(self._name(j), _finite_nats(x))
        return found

    def _name(self, token: int) -> str:
        """Return what a token is called: its text, or ``token_id:N`` if that is asked for, as vLLM has it."""
        by_id = getattr(self.body, "return_tokens_as_token_ids", None)
        return f"token_id:{token}" if by_id else self.texts.text_of(token)


class ChatReply(Reply):
    """The writer of an answer of ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def prompt_bytes(self) -> int:
        """Return the number of the messages' bytes, without templates."""
        return sum(len(message.plain()["content"].encode()) for message in getattr(self.body, "messages", ()))

    def _settings(self) -> dict[str, Any]:
        """Return what all answers have, and the members that were told the conversation by a plain template."""
        plainly = chat_of(self.asked.combination.model).plainly
        return super()._settings() | ({"plain_chat": [short(name) for name in plainly]} if plainly else {})

    def content(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any]:
        """Return ``message``, or in a stream ``delta``, and ``logprobs`` of one choice; its first delta names the role.

        Args:
            delta: new text and tokens of the choice, or, without streaming, the whole choice.
            first: whether nothing of this choice was sent before.
        """
        message = ({"role": "assistant"} if first else {}) | {"content": delta.text} | self._calls(delta)
        found = {"delta": message} if self.body.stream else {"message": message | {"refusal": None}}
        return found | {"logprobs": self._log_probs(delta)}

    def _calls(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return the field ``tool_calls`` of a choice's new calls, with null for a text that is empty; if there are."""
        if not delta.calls:
            return {}
        before = self._called[delta.index]
        self._called[delta.index] += len(delta.calls)
        found: list[dict[str, Any]] = []
        for k, call in enumerate(delta.calls, before):
            place = {"index": k} if self.body.stream else {}
            function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
            found.append({**place, "id": f"call_{uuid4().hex}", "type": "function", "function": function})
        return {"content": delta.text or None, "tool_calls": found}

    def _log_probs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """Return an entry for each token, with the most probable ones beside it; None unless they are asked for."""
        if self.body.listed is None:
            return None
        return {"content": self.entries(delta), "refusal": None}

    def document(self, choices: list[ChoiceDelta], tokens: int) -> dict[str, Any]:
        """Return the whole answer as :meth:`Reply.document` does, with the field ``prompt_logprobs`` beside choices."""
        return super().document(choices, tokens) | self._prompt_log_probs(choices[0])

    def entries(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Return new tokens as OpenAI's chat format has them, each with the most probable ones beside it.

        Over bytes an entry is a token of the first member's tokenizer, with the probability of its bytes one after the
        other, unless bytes are asked for; nothing stands beside it. In a stream it comes once its end is certain.
        """
        spelling = self.asked.combination.alphabet.spelling
        if spelling is None or (self.body.softmeet and self.body.softmeet.byte_logprobs):
            return [
                self._entry(t.token, t.log_prob)
                | {"top_logprobs": [self._entry(j, x) for j, x in t.top[: self.body.listed]]}
                for t in delta.tokens
            ]
        cutting, written = self._cut.setdefault(delta.index, (Cutting(spelling), []))
        written += delta.tokens
        found = cutting.push([t.token for t in delta.tokens], last=delta.finish is not None)
        return [self._group([written[k] for k in places]) for places in found]

    def _group(self, tokens: list[Token]) -> dict[str, Any]:
        own = b"".join(self.texts.bytes_of(t.token) for t in tokens)
        log_prob = sum(t.log_prob or 0.0 for t in tokens)
        entry = {"token": shown_bytes(own), "logprob": _finite_nats(log_prob), "bytes": list(own)}
        return entry | {"top_logprobs": [dict(entry)] if self.body.listed else []}

    def _entry(self, token: int, log_prob: float | None) -> dict[str, Any]:
        """Return one token as OpenAI's chat format has it: text, log-probability in nats and bytes."""
        own = list(self.texts.bytes_of(token))
        return {"token": self.texts.text_of(token), "logprob": _finite_nats(log_prob), "bytes": own}
