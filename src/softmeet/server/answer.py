"""An answer that is being written: the sequences of one request, from the batcher's thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tokenizers.decoders import DecodeStream

from softmeet.server.batcher import Batcher
from softmeet.server.sequences import Event, Failed, Finished, GenerationRequest, PromptScored, Sequence, Token


class TextStream:
    """The text of one sequence as its tokens come: no half characters, and nothing of a stop string.

    Args:
        tokenizer: a fast tokenizer of transformers'.
        stops: strings before which the text ends.

    Attributes:
        stopped: whether one of them came.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._decoded, self._held, self.stopped = 0, "", False

    def push(self, token: int) -> str:
        """Return the text that is certain with one more token, beyond what was returned before; it may be empty."""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._decoded += len(piece)
        return self._release(piece, final=False)

    def end(self) -> str:
        """Return the text that was held back, now that no token follows."""
        whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return self._release(whole[self._decoded :], final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        """Return what was held back and one more piece, up to a stop string or what may become one."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        if found:
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)


@dataclass
class ChoiceDelta:
    """What is new of one choice of an answer, or the whole choice, which is all of its deltas together.

    Args:
        index: of the choice within the answer.
        text: that is certain, and new.
        tokens: that were drawn.
        scored: the prompt's tokens but the first, where they were asked for.
        finish: why the choice has ended, ``"stop"`` or ``"length"``; None before.
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    scored: list[Token] | None = None
    finish: str | None = None


class AnswerStream:
    """The choices of one request as the batcher writes them; leaving an iteration early gives their places up.

    Needs a running event loop.

    Attributes:
        completion_tokens: how many tokens came so far, over all choices.

    Raises:
        BusyError, ClosingError: the batcher does not take the request.
    """

    def __init__(self, batcher: Batcher, request: GenerationRequest) -> None:
        self.request, self.completion_tokens = request, 0
        self._metrics, self._started = batcher.metrics, time.perf_counter()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        prompts = [prompt for prompt in request.prompts for _ in range(request.choices)]
        self._texts = [TextStream(request.tokenizer, request.stops) for _ in prompts]
        self._sequences = [Sequence(request, prompt, k, partial(emit, k)) for k, prompt in enumerate(prompts)]
        batcher.submit(self._sequences)

    async def deltas(self) -> AsyncIterator[ChoiceDelta]:
        """Yield what is new of any choice, as it comes, until all have ended.

        Raises:
            SoftmeetError: what made a sequence fail.
        """
        running = set(range(len(self._sequences)))
        try:
            while running:
                index, event = await self._events.get()
                if index in running:
                    delta = self._delta(index, event)
                    if delta.finish is not None:
                        running.discard(index)
                    yield delta
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Give up what has not ended."""
        for sequence in self._sequences:
            sequence.cancel()

    def _delta(self, index: int, event: Event) -> ChoiceDelta:
        text = self._texts[index]
        match event:
            case Failed(error):
                raise error
            case PromptScored(tokens):
                return ChoiceDelta(index, scored=tokens)
            case Finished(reason):
                rest = text.end()
                return ChoiceDelta(index, rest, finish="stop" if text.stopped else reason)
        if not self.completion_tokens:
            self._metrics.first.observe(time.perf_counter() - self._started)
        self.completion_tokens += 1
        piece = text.push(event.token)
        if text.stopped:
            self._sequences[index].cancel()
        return ChoiceDelta(index, piece, [event], finish="stop" if text.stopped else None)

    async def whole(self) -> list[ChoiceDelta]:
        """Wait for the end, and return every choice with all of its text and tokens.

        Raises:
            SoftmeetError: what made a sequence fail.
        """
        found = [ChoiceDelta(k) for k in range(len(self._sequences))]
        async for delta in self.deltas():
            choice = found[delta.index]
            choice.text += delta.text
            choice.tokens += delta.tokens
            choice.finish = delta.finish
            if delta.scored is not None:
                choice.scored = delta.scored
        return found
