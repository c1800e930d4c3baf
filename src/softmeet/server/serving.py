"""From a request to a plan: what it asks for, checked against the ensemble and the server's limits."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jinja2

from softmeet.server.answer import Answer, Plan
from softmeet.server.engine import Engine, Limits
from softmeet.server.ensembles import Ensembles, Served
from softmeet.server.errors import RequestError
from softmeet.server.metrics import Metrics
from softmeet.server.sampling import Sampling
from softmeet.server.schemas import CHANGES, ChatRequest, CompletionRequest, Extension
from softmeet.server.security import Protection
from softmeet.server.work import Combination, Work


@dataclass(frozen=True)
class Settings:
    """Everything that can be set about a server but its ensembles.

    Args:
        limits: of the engine.
        protection: of the door.
        max_tokens: that one sequence may draw.
        max_choices: sequences of one request.
        seconds: that an answer may take.
        allowed: what requests may change, of :data:`softmeet.server.schemas.CHANGES`.
        parallel: run members in threads of their own, as those in different places are in any case.
        cors: origins whose pages may ask.
        ui: serve the page at ``/ui``.
    """

    limits: Limits = field(default_factory=Limits)
    protection: Protection = field(default_factory=Protection)
    max_tokens: int = 4096
    max_choices: int = 16
    seconds: float = 600.0
    allowed: Sequence[str] = CHANGES
    parallel: bool = False
    cors: Sequence[str] = field(default_factory=tuple)
    ui: bool = True


class Serving:
    """Ensembles, the engine that runs them, and what requests may ask of them."""

    def __init__(self, ensembles: Ensembles, settings: Settings) -> None:
        for served in ensembles:
            served.ensemble.model.require_tokens("the server")
        self.ensembles, self.settings, self.metrics = ensembles, settings, Metrics()
        parallel = settings.parallel or any(s.ensemble.model.apart for s in ensembles)
        self.engine = Engine(ensembles.members(), settings.limits, parallel=parallel, metrics=self.metrics)
        # Fast tokenizers change their own state; one thread keeps calls apart, and off the event loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="softmeet-tokenizer")

    async def answer(self, plan: Plan) -> Answer:
        """Begin to run a plan."""
        return Answer(self.engine, plan)

    async def completion(self, request: CompletionRequest) -> Plan:
        """What ``/v1/completions`` asks for.

        Raises:
            RequestError, InvalidInputError: it cannot be had.
        """
        served, top = self.ensembles.find(request.model), request.logprobs
        prompts = await asyncio.get_running_loop().run_in_executor(self._thread, _encoded, served, request.prompt)
        scored = bool(request.echo) and (top is not None or _extension(request).report is not None)
        limit = 16 if request.max_tokens is None else request.max_tokens
        return self._plan(request, served, prompts, limit, top, score_prompt=scored)

    async def chat(self, request: ChatRequest) -> Plan:
        """What ``/v1/chat/completions`` asks for.

        Raises:
            RequestError, InvalidInputError: it cannot be had.
        """
        served = self.ensembles.find(request.model)
        prompt = await asyncio.get_running_loop().run_in_executor(self._thread, _templated, served, request)
        limit = request.max_completion_tokens or request.max_tokens or self.settings.max_tokens
        top = (request.top_logprobs or 0) if request.logprobs else None
        return self._plan(request, served, [prompt], limit, top, score_prompt=False)

    def _plan(
        self,
        request: CompletionRequest | ChatRequest,
        served: Served,
        prompts: list[tuple[int, ...]],
        limit: int,
        top: int | None,
        *,
        score_prompt: bool,
    ) -> Plan:
        ours, choices = _extension(request), request.n or 1
        combination, members = served.combination(ours, self.settings.allowed)
        if len(prompts) * choices > self.settings.max_choices:
            raise RequestError(
                f"expected at most {self.settings.max_choices} choices in all, got {len(prompts)} prompts times n = "
                f"{choices}",
                param="n",
            )
        for prompt in prompts:
            _check_prompt(prompt, combination, limit)
        work = Work(
            combination=combination,
            sampling=_sampling(request, ours, combination.model.config.vocab_size),
            max_tokens=min(limit, self.settings.max_tokens),
            top=top,
            report=ours.report,
            score_prompt=score_prompt,
            deadline=time.monotonic() + self.settings.seconds,
        )
        stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        return Plan(served.name, prompts, choices, work, members, served.ensemble.tokenizer, stops)


def _extension(request: CompletionRequest | ChatRequest) -> Extension:
    return request.softmeet or Extension()


def _sampling(request: CompletionRequest | ChatRequest, ours: Extension, vocabulary: int) -> Sampling:
    biases = {int(token): bias for token, bias in (request.logit_bias or {}).items()}
    if absent := [token for token in biases if token >= vocabulary]:
        raise RequestError(
            f"expected token ids below {vocabulary:,} in logit_bias, got {absent[0]}", param="logit_bias"
        )
    return Sampling(
        seed=secrets.randbits(53) if request.seed is None else request.seed,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=request.top_p or 1.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=biases,
        top_k=ours.top_k,
        min_p=ours.min_p,
        repetition_penalty=ours.repetition_penalty,
    )


def _encoded(served: Served, prompt: Any) -> list[tuple[int, ...]]:
    """A prompt in any of its four forms, as token ids."""
    parts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    tokenizer = served.ensemble.tokenizer
    return [tuple(tokenizer(p, verbose=False)["input_ids"] if isinstance(p, str) else p) for p in parts]


def _templated(served: Served, request: ChatRequest) -> tuple[int, ...]:
    tokenizer = served.ensemble.tokenizer
    if not tokenizer.chat_template:
        raise RequestError(
            f"the tokenizer of {served.name} has no chat template, so there is no saying how its members would have "
            "been trained to chat: use /v1/completions",
            param="messages", code="no_chat_template",
        )  # fmt: skip
    try:
        found = tokenizer.apply_chat_template(
            [message.plain() for message in request.messages], add_generation_prompt=True, return_dict=False
        )
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template refuses these messages: {error}"[:300], param="messages") from error
    return tuple(found)


def _check_prompt(prompt: tuple[int, ...], combination: Combination, limit: int) -> None:
    vocabulary, room = combination.model.config.vocab_size, combination.room(len(prompt))
    if not prompt:
        raise RequestError("expected a prompt of at least one token, got an empty one", param="prompt")
    if not all(0 <= token < vocabulary for token in prompt):
        raise RequestError(f"expected token ids from 0 to {vocabulary - 1:,}", param="prompt")
    if combination.room(0) < len(prompt) + (limit > 0 and not room):
        raise RequestError(
            f"expected a prompt shorter than the shortest member's context of {combination.room(0)} tokens, got "
            f"{len(prompt)}: shorten it",
            param="prompt", code="context_length_exceeded",
        )  # fmt: skip
