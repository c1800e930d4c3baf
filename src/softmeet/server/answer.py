"""A request's answer while it is written: events from the batcher's thread become text on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from softmeet.engine.text import Pieces
from softmeet.errors import SoftmeetError
from softmeet.server.batcher import Batcher
from softmeet.server.sequences import Event, Failed, Finished, GenerationRequest, PromptScored, Sequence, Token
from softmeet.server.tool_calls import Calls, FunctionCall, overlap


class TextStream:
    """The text of one sequence, decoded as its tokens come.

    A character is given once it is complete. Text that may begin a stop string is held back until that is decided;
    nothing after a stop string is ever given, nor the string itself unless ``show_stop``.

    Args:
        tokenizer: a fast tokenizer of transformers.
        stops: non-empty strings; the text ends before the first of them that occurs.
        min_tokens: a stop string that is complete within so many tokens does not count.
        special: whether special tokens are part of the text.
        show_stop: whether the text ends behind the stop string, not before it.

    Attributes:
        stopped: the stop string that was found, after which no more tokens should be pushed; else None.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: tuple[str, ...] = (),
        *,
        min_tokens: int = 0,
        special: bool = False,
        show_stop: bool = False,
    ) -> None:
        self._stops, self._min_tokens, self._show_stop = stops, min_tokens, show_stop
        self._pieces = Pieces(tokenizer, special=special)
        self._count, self._held = 0, ""
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """Add a token, and return the text that has become certain by it, perhaps none."""
        self._count += 1
        return self._release(self._pieces.push(token), final=False)

    def end(self) -> str:
        """Return the text that was held back, up to a stop string; called once, after the last token."""
        return self._release(self._pieces.end(), final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        """Add decoded text to the text held back, and return its certain part; the rest is held back.

        Args:
            piece: newly decoded text.
            final: whether no text follows, so that everything up to a stop string is certain.
        """
        text = self._held + piece
        if self._count > self._min_tokens and (found := self._first_stop(text)):
            at, self.stopped = found
            return text[: at + self._show_stop * len(self.stopped)]
        keep = 0 if final else max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Return where the first stop string in a text begins, and the string; None if there is none.

        One that was complete in what was held back does not count: it came within the first tokens.
        """
        starts = [(text.find(stop, max(0, len(self._held) - len(stop) + 1)), stop) for stop in self._stops]
        return min((start for start in starts if start[0] >= 0), default=None)


@dataclass
class ChoiceDelta:
    """New text and tokens of one choice (continuation) of an answer; or a whole choice, as all its deltas joined.

    Args:
        index: the choice's number within the answer.
        text: the new text, which no later token can change.
        tokens: the newly drawn tokens, including one that ends the text or whose text is still held back.
        scored: the prompt's tokens but the first, if they were scored and this is the delta that brings them; else
            None.
        finish: ``"stop"`` if the choice has ended at an end-of-text token, at a stop token or a stop string,
            ``"tool_calls"`` if it has so and calls functions, ``"length"`` at the number of tokens allowed; None if it
            has not ended.
        stopped: the stop string, or the id of the stop token, at which it has ended; else None.
        calls: the calls of functions that have become complete, if the request has functions; they are no text.
        began: when the first of its tokens came, on the clock of ``time.perf_counter``; None if none has.
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    scored: list[Token] | None = None
    finish: str | None = None
    stopped: str | int | None = None
    calls: list[FunctionCall] = field(default_factory=list)
    began: float | None = None

    def join(self, delta: ChoiceDelta) -> None:
        """Append what follows of the same choice."""
        self.text, self.tokens = self.text + delta.text, self.tokens + delta.tokens
        self.calls = self.calls + delta.calls
        self.began = delta.began if self.began is None else self.began
        self.finish, self.stopped = delta.finish, delta.stopped
        self.scored = self.scored if delta.scored is None else delta.scored


class AnswerStream:
    """The choices of one request, submitted to the batcher and read as they are generated.

    Made within a running event loop, and read once, by :meth:`deltas` or :meth:`whole`. Closing that iteration before
    its end cancels every sequence.

    Args:
        batcher: the batcher that generates; its sequences wait until it is started.
        request: the prompts and how they are continued, as :meth:`Serving.prepare` returns it.

    Attributes:
        request: the request.
        completion_tokens: the number of drawn tokens received so far, summed over choices: those that end a text or
            complete a stop string count, the prompt's do not.

    Raises:
        BusyError: if the batcher has no room for all of the request's sequences.
        ClosingError: if the batcher is shutting down.
    """

    def __init__(self, batcher: Batcher, request: GenerationRequest) -> None:
        self.request, self.completion_tokens = request, 0
        self._metrics, self._started = batcher.metrics, time.perf_counter()
        self._first: float | None = None
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        prompts = [prompt for prompt in request.prompts for _ in range(request.choices)]
        self._texts = [
            TextStream(
                request.tokenizer, request.stops, min_tokens=request.sampling.min_tokens,
                special=not request.skip_special, show_stop=request.show_stop,
            ) for _ in prompts
        ]  # fmt: skip
        self._calls = [Calls(request.most_calls) for _ in prompts]
        self._sequences = [Sequence(request, prompt, k, partial(emit, k)) for k, prompt in enumerate(prompts)]
        batcher.submit(self._sequences)

    async def deltas(self) -> AsyncIterator[ChoiceDelta]:
        """Yield the choices' new text and tokens in the order they are generated, until all choices have ended.

        Each choice has one delta for each drawn token, one before them if its prompt is scored, and a last one for its
        end, unless its last token completed a stop string. A delta's text may be empty.

        Raises:
            SoftmeetError: if a sequence failed, which ends the whole answer: the error of its event :class:`Failed`.
        """
        running = set(range(len(self._sequences)))
        try:
            while running:
                index, event = await self._events.get()
                if index in running:
                    delta = self._called(self._delta(index, event))
                    if delta.finish is not None:
                        running.discard(index)
                    yield delta
        finally:
            self.cancel()

    @property
    def counts(self) -> str:
        """What the log says of it: how many tokens its prompts have, and the answer, and when that began."""
        asked, began = self.request, "" if self._first is None else f", first {self._first:.3f}"
        if not asked.combination.symbols_are_tokens and asked.own:
            # Chats over bytes are told to each member in its own tokens.
            read = f"{sum(len(own[0] or ()) for own in asked.own)} tokens"
        else:
            read = str(sum(map(len, asked.prompts)))
        return f"{read}+{self.completion_tokens} {asked.combination.unit}{began}"

    def cancel(self) -> None:
        """Cancel every sequence of the answer that has not ended, so that it leaves the batch before its next token."""
        for sequence in self._sequences:
            sequence.cancel()

    def _delta(self, index: int, event: Event) -> ChoiceDelta:
        """Return the delta that an event of a choice makes; raise the event's error if it is :class:`Failed`."""
        text = self._texts[index]
        match event:
            case Failed(error):
                raise error
            case PromptScored(tokens):
                return ChoiceDelta(index, scored=tokens)
            case Finished(reason):
                rest = text.end()
                newest = self._sequences[index].tokens[-1]
                at = newest if reason == "stop" and newest in self.request.stop_token_ids else None
                stopped = at if text.stopped is None else text.stopped
                return ChoiceDelta(index, rest, finish=reason if stopped is None else "stop", stopped=stopped)
        now = time.perf_counter()
        if self._first is None:
            self._first = now - self._started
            self._metrics.first.observe(self._first)
        self.completion_tokens += 1
        hidden = event.token in self.request.ends and not self.request.show_stop
        piece = "" if hidden else text.push(event.token)
        if text.stopped:
            self._sequences[index].cancel()
        finish = "stop" if text.stopped else None
        return ChoiceDelta(index, piece, [event], finish=finish, stopped=text.stopped, began=now)

    def _called(self, delta: ChoiceDelta) -> ChoiceDelta:
        """Return a delta with the calls of functions in place of their text, if the request has functions."""
        if self.request.most_calls:
            own = self._calls[delta.index]
            delta.text, delta.calls = own.push(delta.text, last=delta.finish is not None)
            if own.count and delta.finish == "stop":
                delta.finish = "tool_calls"
        return delta

    async def whole(self) -> list[ChoiceDelta]:
        """Wait until all choices have ended, and return them in order, each with all of its text and tokens.

        Raises:
            SoftmeetError: if a sequence failed, which ends the whole answer.
        """
        found = [ChoiceDelta(k) for k in range(len(self._sequences))]
        async for delta in self.deltas():
            found[delta.index].join(delta)
        return found

    async def parts(self, seconds: float) -> AsyncIterator[ChoiceDelta]:
        """Yield what :meth:`deltas` does, but at most one part of a choice in so many seconds: what comes is joined.

        Raises:
            SoftmeetError: as of :meth:`deltas`.
        """
        held, sent = dict[int, ChoiceDelta](), dict[int, float]()
        try:
            async for delta in self.deltas():
                if delta.index in held:
                    held[delta.index].join(delta)
                else:
                    held[delta.index] = delta
                now = time.monotonic()
                if held[delta.index].finish is not None or now - sent.get(delta.index, -seconds) >= seconds:
                    sent[delta.index] = now
                    yield held.pop(delta.index)
        except SoftmeetError:
            for rest in held.values():
                yield rest
            raise
