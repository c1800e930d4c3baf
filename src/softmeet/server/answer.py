"""An answer under way: the sequences of one request, from events on the engine's thread to parts on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from softmeet.server.engine import Engine
from softmeet.server.text import TextStream
from softmeet.server.work import Event, Failed, Finished, PromptScored, Sequence, Token, Work


@dataclass(frozen=True)
class Gated:
    """Of a choice's tokens, those at which a gate was closed, and about how many seconds that saved."""

    tokens: int = 0
    gated: int = 0
    seconds_saved: float = 0.0


@dataclass(frozen=True)
class Part:
    """Something new of one choice: text that is certain, tokens that came, or the end.

    ``scored`` holds the prompt's tokens but the first, where they were asked for. At the end, ``gate`` says at how many
    tokens a gate was closed, and about how many seconds that saved.
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    scored: list[Token] | None = None
    finish: str | None = None
    gate: Gated | None = None


@dataclass(frozen=True)
class Plan:
    """What a request comes to.

    Args:
        model: the name of the ensemble.
        prompts: token ids.
        choices: continuations of each prompt; choice c of prompt p has index p · choices + c.
        work: of every sequence, but for its prompt, its key and where its events go.
        members, tokenizer: of the ensemble that was asked for.
        stops: strings before which a text ends.
    """

    model: str
    prompts: list[tuple[int, ...]]
    choices: int
    work: Work
    members: tuple[str, ...]
    tokenizer: Any
    stops: tuple[str, ...] = ()


class Answer:
    """Runs a plan; whoever leaves the iteration early gives its places up.

    Attributes:
        completion_tokens: how many came so far, over all choices.

    Raises:
        BusyError, ClosingError: as ``Engine.submit``.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self.plan, self.completion_tokens = plan, 0
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._engine, self._started = engine, time.perf_counter()
        indices = range(len(plan.prompts) * plan.choices)
        self._gates = [Gated() for _ in indices]
        self._texts = [TextStream(plan.tokenizer, plan.stops) for _ in indices]
        self._sequences = [self._sequence(k) for k in indices]
        engine.submit(self._sequences)

    def _sequence(self, index: int) -> Sequence:
        def emit(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return Sequence(self.plan.work, self.plan.prompts[index // self.plan.choices], index, emit)

    async def parts(self) -> AsyncIterator[Part]:
        """Everything new, of any choice, as it comes.

        Raises:
            SoftmeetError: what made a sequence fail.
        """
        running = set(range(len(self._sequences)))
        try:
            while running:
                index, event = await self._events.get()
                if index not in running:
                    continue
                part = self._with_gate(self._part(index, event))
                if part.finish is not None:
                    running.discard(index)
                yield part
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Give up what has not ended."""
        for sequence in self._sequences:
            sequence.cancel()

    def _with_gate(self, part: Part) -> Part:
        found = self._gates[part.index]
        for token in part.tokens:
            found = Gated(found.tokens + 1, found.gated + token.gated, found.seconds_saved + token.saved)
        self._gates[part.index] = found
        return replace(part, gate=found) if part.finish is not None and self.plan.work.combination.gate else part

    def _part(self, index: int, event: Event) -> Part:
        text = self._texts[index]
        match event:
            case Failed(error):
                raise error
            case PromptScored(tokens):
                return Part(index, scored=tokens)
            case Finished(reason):
                rest = text.end()
                return Part(index, rest, finish="stop" if text.stopped else reason)
        if not self.completion_tokens:
            self._engine.metrics.first.observe(time.perf_counter() - self._started)
        self.completion_tokens += 1
        piece = text.push(event.token)
        if text.stopped:
            self._sequences[index].cancel()
        return Part(index, piece, [event], finish="stop" if text.stopped else None)

    async def whole(self) -> list[Part]:
        """Every choice at its end, with all of its text and tokens.

        Raises:
            SoftmeetError: what made a sequence fail.
        """
        found = [Part(k) for k in range(len(self._sequences))]
        async for part in self.parts():
            old = found[part.index]
            found[part.index] = replace(
                old,
                text=old.text + part.text,
                tokens=old.tokens + part.tokens,
                scored=part.scored if part.scored is not None else old.scored,
                finish=part.finish,
                gate=part.gate,
            )
        return found
