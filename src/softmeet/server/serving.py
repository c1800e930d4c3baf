"""A server's settings, and the checks that turn a request's body into a generation request for the batcher."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jinja2
import torch

from softmeet.errors import SoftmeetError
from softmeet.hf import EnsembleForCausalLM
from softmeet.server.batcher import Batcher, Limits
from softmeet.server.ensembles import Ensembles, Served
from softmeet.server.errors import RequestError
from softmeet.server.metrics import Metrics
from softmeet.server.sampling import Sampling
from softmeet.server.schemas import CHANGES, ChatRequest, CompletionRequest, Extension
from softmeet.server.security import Protection
from softmeet.server.sequences import Combination, GenerationRequest
from softmeet.server.structures import Structures
from softmeet.server.texts import token_texts
from softmeet.solvers.clock import time_limit

# The most log-probabilities that an answer may list, in all of its tokens; they take some 300 MB.
_MOST_LISTED = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """All settings of a server, apart from its ensembles.

    Args:
        limits: how many sequences may run and wait, how many prompt tokens are kept, and the rule's time for a token.
        protection: API keys, hosts and limits on bodies.
        max_tokens: the most tokens that a request may ask for; one that asks for more is refused.
        max_choices: the most choices of a request, summed over its prompts; a request for more is refused.
        seconds: the most seconds that an answer may take from the end of :meth:`Serving.prepare`, waiting included.
        allowed: names of the fields under ``softmeet`` that requests may change, some of
            :data:`softmeet.server.schemas.CHANGES`.
        max_trust: the largest trust that a request may ask for, in nats per nat, or a member's own, if that is larger.
        parallel: whether members run at the same time, in a thread each; they do anyway if an ensemble has members on
            different devices.
        reproducible: whether every sequence is run and solved by itself, so that what shares the batch changes no bit.
        cors: origins (such as ``https://example.org``) whose pages may call the API from a browser.
        ui: whether the page at ``/ui`` is served.
    """

    limits: Limits = field(default_factory=Limits)
    protection: Protection = field(default_factory=Protection)
    max_tokens: int = 4096
    max_choices: int = 16
    seconds: float = 600.0
    allowed: Sequence[str] = CHANGES
    max_trust: float = 100.0
    parallel: bool = False
    reproducible: bool = False
    cors: Sequence[str] = field(default_factory=tuple)
    ui: bool = True


class Serving:
    """A server's ensembles, settings and metrics, with the batcher that generates for them.

    The batcher is not started: the lifespan of :func:`softmeet.server.app.create_app` starts it, or the caller does by
    :meth:`start`.

    Args:
        ensembles: all ensembles, as :func:`softmeet.server.ensembles.load` returns them, over tokens, not bytes.
        settings: the server's settings.

    Raises:
        InvalidInputError: if an ensemble is over bytes, or a member's cache holds anything but keys and values.
    """

    def __init__(self, ensembles: Ensembles, settings: ServerSettings) -> None:
        for served in ensembles:
            served.ensemble.model.require_tokens("the server")
            token_texts(served.ensemble.tokenizer)  # no request is to wait until they are read
        self.ensembles, self.settings, self.metrics = ensembles, settings, Metrics()
        parallel = settings.parallel or any(s.ensemble.model.apart for s in ensembles)
        names = {m: name for s in ensembles for m, name in zip(s.ensemble.model.members, s.names, strict=True)}
        self.batcher = Batcher(
            names, settings.limits, self.metrics, parallel=parallel, reproducible=settings.reproducible
        )
        self._structures = Structures(served.ensemble.model for served in ensembles)
        # Fast tokenizers change their own state, so one thread makes all calls, and none holds up the event loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="softmeet-tokenizer")

    def start(self) -> None:
        """Do once, for every ensemble, what the first token would otherwise wait for, and start the batcher.

        Each ensemble is solved at one position by its own rule, and by ``meet`` if requests may ask for other rules:
        heads are whitened then, and code is loaded. It takes seconds for members of some 10⁹ parameters.
        """
        for served in self.ensembles:
            self._warm_up(served.ensemble.model)
        self.batcher.start()

    @torch.inference_mode()
    def _warm_up(self, model: EnsembleForCausalLM) -> None:
        # Not a padding token, about which transformers would warn.
        token = int(any(getattr(member.config, "pad_token_id", None) == 0 for member in model.members))
        hidden = model.hidden_states(torch.tensor([[token]]))
        own = model.settings.ungated()
        every = [own, own.changed(rule="meet")] if "rule" in self.settings.allowed else [own]
        for settings in every:
            # Members may make nothing of the token; what they say of it is not used.
            with contextlib.suppress(SoftmeetError), time_limit(self.settings.limits.token_seconds):
                model.combiner.solve_rows(hidden, settings, proved=False)

    async def prepare(self, body: CompletionRequest | ChatRequest) -> GenerationRequest:
        """Check a request's body, and return it as a generation request with its prompts as token ids.

        Args:
            body: the request's body; pydantic has checked its fields' types and ranges when it was made.

        Raises:
            RequestError: if there is no such model (status 404) or member, a change is not allowed, more than
                ``settings.max_tokens`` tokens or than the context has, or more choices than ``settings.max_choices`` or
                than an idle server has places, are asked for, an id in ``logit_bias`` is no token's, a prompt is empty,
                has an invalid id or leaves no room in the context, the messages have no chat template or break its
                rules, a setting under ``softmeet`` is not valid, or the text cannot be what it has to be.
            BusyError: if too many others' structures are being compiled.
            RuleError: if the rule comes from a package that fails to provide it.
        """
        served, ours = self.ensembles.find(body.model), body.softmeet or Extension()
        in_thread = partial(asyncio.get_running_loop().run_in_executor, self._thread)
        combination = served.combination(ours, self.settings.allowed, self.settings.max_trust)
        choices, limit = body.n or 1, _limit(body, self.settings.max_tokens, combination.room(0))
        if isinstance(body, CompletionRequest):
            # What could be no prompt is refused before it is cut into tokens, which may take seconds.
            parts = _parts(body)
            _check_choices(len(parts), choices, self.settings)
            _check_texts(parts, combination, token_texts(served.ensemble.tokenizer).longest)
            prompts = await in_thread(_encoded, served, parts)
            top = body.logprobs
            score_prompt = bool(body.echo) and (top is not None or ours.report is not None)
        else:
            prompts = await in_thread(_templated, served, body)
            top, score_prompt = (body.top_logprobs or 0) if body.logprobs else None, False
            _check_choices(len(prompts), choices, self.settings)
        for prompt in prompts:
            _check_prompt(prompt, combination, limit)
        tokens = choices * sum(limit + score_prompt * len(prompt) for prompt in prompts)
        _check_listed(tokens, (top or 0) + (ours.report or 0) * (len(combination.names) + 2))
        sampling = _sampling(body, ours, combination.model.config.vocab_size)
        return GenerationRequest(
            combination=combination,
            sampling=replace(sampling, mask=await self._structures.mask(body, combination.model)),
            max_tokens=limit,
            top=top,
            report=ours.report,
            score_prompt=score_prompt,
            deadline=time.monotonic() + self.settings.seconds,
            prompts=tuple(prompts),
            choices=choices,
            stops=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            model=served.name,
            tokenizer=served.ensemble.tokenizer,
        )


def _check_choices(prompts: int, choices: int, settings: ServerSettings) -> None:
    """Raise RequestError if a number of prompts with so many choices each is not allowed, or could never find room."""
    total, places = prompts * choices, settings.limits.rows + settings.limits.waiting
    most = min(settings.max_choices, places)
    if total > most:
        limit = "limit, --max-choices" if settings.max_choices <= places else "room, --batch and --queue together"
        count = f"{prompts:,} prompt{'s' * (prompts > 1)} with n = {choices}"
        raise RequestError(
            f"expected at most {most:,} choices in all, this server's {limit}, got {total:,} ({count}): send fewer in "
            "each request",
            param="n" if choices > 1 else "prompt",
        )


def _limit(body: CompletionRequest | ChatRequest, server: int, context: int) -> int:
    """Return the most tokens of a choice: what a request asks for; else all for a chat, at most 16 for a completion.

    Args:
        body: the request.
        server: the server's limit.
        context: the length of the shortest member's context; the smaller of both is the limit.

    Raises:
        RequestError: if the request asks for more than the limit.
    """
    most = min(server, context)
    of, more = (
        ("this server's limit", ", or start the server with a larger --max-tokens")
        if server <= context
        else ("the context of the ensemble's shortest member", "")
    )
    for name in ("max_completion_tokens", "max_tokens"):
        if (asked := getattr(body, name, None)) is None:
            continue
        if asked > most:
            raise RequestError(
                f"expected {name} of at most {most:,}, {of}, got {asked:,}: ask for fewer{more}",
                param=name,
            )
        return int(asked)
    return most if isinstance(body, ChatRequest) else min(16, most)


def _sampling(body: CompletionRequest | ChatRequest, ours: Extension, vocabulary: int) -> Sampling:
    """Return the sampling options that a request gives; a seed is drawn if it gives none.

    Args:
        body: the request, whose fields have the names of :class:`Sampling`'s where they mean the same.
        ours: its field ``softmeet``, likewise.
        vocabulary: the number of tokens, which ids in ``logit_bias`` have to be below.

    Raises:
        RequestError: if an id in ``logit_bias`` is not below ``vocabulary``.
    """
    biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    if absent := [token for token in biases if token >= vocabulary]:
        raise RequestError(
            f"expected token ids below {vocabulary:,} in logit_bias, got {absent[0]}", param="logit_bias"
        )
    names = Sampling.__dataclass_fields__
    given = {name: x for source in (body, ours) for name, x in source if name in names and x is not None}
    return Sampling(**({"seed": secrets.randbits(53)} | given | {"logit_bias": biases}))


def _parts(body: CompletionRequest) -> list[Any]:
    """Return a request's prompts, each a text or a list of token ids."""
    prompt: Any = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _check_texts(parts: list[Any], combination: Combination, longest: int) -> None:
    """Raise RequestError if a text is so long that, in tokens of up to so many bytes, it fits into no context."""
    # Normalisation may shorten a text, hardly ever to a quarter.
    most = 4 * longest * combination.room(0)
    for part in parts:
        if isinstance(part, str) and longest and len(part) > most:
            raise RequestError(
                f"expected a prompt of at most {combination.room(0)} tokens, the shortest member's context, got a text "
                f"of {len(part):,} characters: shorten it",
                param="prompt", code="context_length_exceeded",
            )  # fmt: skip


def _check_listed(tokens: int, each: int) -> None:
    """Raise RequestError if an answer may have more log-probabilities, of ``each`` a token, than is kept in memory."""
    if tokens * each > _MOST_LISTED:
        raise RequestError(
            f"expected at most {_MOST_LISTED:,} log-probabilities in an answer, got {tokens * each:,} ({tokens:,} "
            f"tokens with {each} each): ask for fewer tokens (max_tokens), choices, logprobs or a smaller report",
        )


def _encoded(served: Served, parts: list[Any]) -> list[tuple[int, ...]]:
    """Return the token ids of each prompt, given as a text or as token ids."""
    tokenizer = served.ensemble.tokenizer
    return [tuple(tokenizer(p, verbose=False)["input_ids"] if isinstance(p, str) else p) for p in parts]


def _templated(served: Served, body: ChatRequest) -> list[tuple[int, ...]]:
    """Return a list of one prompt: the token ids that the tokenizer's chat template makes of the messages.

    Raises:
        RequestError: if the tokenizer has no chat template, or the template refuses the messages.
    """
    tokenizer = served.ensemble.tokenizer
    if not tokenizer.chat_template:
        raise RequestError(
            f"the tokenizer of {served.name} has no chat template, so there is no saying how its members would have "
            "been trained to chat: use /v1/completions",
            param="messages", code="no_chat_template",
        )  # fmt: skip
    try:
        messages = [message.plain() for message in body.messages]
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template refuses these messages: {error}"[:300], param="messages") from error
    return [tuple(found)]


def _check_prompt(prompt: tuple[int, ...], combination: Combination, limit: int) -> None:
    """Raise RequestError if a prompt is empty, has an invalid id, or leaves no room in the shortest context.

    Args:
        prompt: the prompt's token ids.
        combination: the ensemble whose vocabulary and context count.
        limit: the number of tokens asked for; if it is 0, the prompt may fill the context.
    """
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
