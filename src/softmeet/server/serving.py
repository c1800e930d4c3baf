"""A server's settings, and the checks that turn a request's body into a generation request for the batcher."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, TypeVar

import torch

from softmeet.engine import ANSWER_TOKENS
from softmeet.engine.draw import Sampling
from softmeet.engine.limits import AnswerLength
from softmeet.errors import SoftmeetError
from softmeet.hf import EnsembleForCausalLM
from softmeet.hf.chat import TEMPERATURE, chat_of, take_plain
from softmeet.hf.prompts import encoded, states_behind
from softmeet.server import prompts
from softmeet.server.batcher import Batcher
from softmeet.server.ensembles import Ensembles, Served, behind_passages, readers_of
from softmeet.server.errors import BusyError, RequestError
from softmeet.server.limits import Limits
from softmeet.server.metrics import Metrics
from softmeet.server.schemas import CHANGES, CompletionRequest, Extension, Generation
from softmeet.server.security import Protection
from softmeet.server.sequences import Combination, GenerationRequest
from softmeet.server.sources import asks
from softmeet.server.strict import PassedOver
from softmeet.server.structures import Structures
from softmeet.server.texts import token_texts
from softmeet.solvers.clock import time_limit

T = TypeVar("T")
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
            different devices. "auto" measures whether it pays, unless ``reproducible``.
        reproducible: whether every sequence is run and solved by itself, so that what shares the batch changes no bit.
        speculate: how many tokens are drafted at a time while a single sequence runs, for the same tokens in less time;
            "auto" for as many as pay, 0 for none, as of ``reproducible``.
        one_member: whether plain sampling by ``prob-mean`` draws each token from one member while a single sequence
            runs, unless ``reproducible``.
        plain_chat: whether members without a chat template take a plain one.
        sources: whether requests may ask where answers stand in the user's files.
        strict: whether unknown fields and models of requests are refused; else they are passed over, and the first
            ensemble answers.
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
    parallel: bool | Literal["auto"] = "auto"
    reproducible: bool = False
    speculate: int | Literal["auto"] = "auto"
    one_member: bool = True
    plain_chat: bool = False
    sources: bool = False
    strict: bool = False
    cors: Sequence[str] = field(default_factory=tuple)
    ui: bool = True


class Serving:
    """A server's ensembles, settings and metrics, with the batcher that generates for them.

    The batcher is not started: the lifespan of :func:`softmeet.server.app.create_app` starts it, or the caller does by
    :meth:`start`.

    Args:
        ensembles: all ensembles, as :func:`softmeet.server.ensembles.load` returns them.
        settings: the server's settings.

    Raises:
        InvalidInputError: if a member's cache holds anything but keys and values.
    """

    def __init__(self, ensembles: Ensembles, settings: ServerSettings) -> None:
        for served in ensembles:
            if settings.plain_chat:
                take_plain(served.ensemble.model)
            token_texts(served.ensemble.tokenizer)  # no request is to wait until they are read
        self.ensembles, self.settings, self.metrics = ensembles, settings, Metrics()
        self.passed_over = None if settings.strict else PassedOver()
        told = False if settings.reproducible and settings.parallel == "auto" else settings.parallel
        parallel = True if any(s.ensemble.model.apart for s in ensembles) else told
        models, names = zip(*((s.ensemble.model, s.names) for s in ensembles), strict=True)
        readers = readers_of(models, names, 0 if settings.reproducible else settings.limits.kept_tokens)
        self.batcher = Batcher(
            readers,
            settings.limits.within(readers.values()),
            self.metrics,
            parallel=parallel,
            reproducible=settings.reproducible,
            speculate=0 if settings.reproducible else settings.speculate,
            one_member=settings.one_member and not settings.reproducible,
        )
        self._structures = Structures(served.ensemble.model for served in ensembles)
        # Nothing holds up the event loop, and short texts do not wait for the long ones of others.
        self._short, self._long = (ThreadPoolExecutor(1, f"softmeet-tokenizer-{of}") for of in ("short", "long"))
        self._at_tokenizer = 0

    def start(self) -> None:
        """Do once, for every ensemble, what the first token would otherwise wait for, and start the batcher.

        Each ensemble is solved at one position by its own rule, and by ``meet`` if requests may ask for other rules:
        heads are whitened then, and code is loaded. It takes seconds for members of some 10⁹ parameters.
        """
        for served in self.ensembles:
            # Fast tokenizers change their own state in the first call, when none of the threads may read it.
            for own in (served.ensemble.tokenizer, *chat_of(served.ensemble.model).tokenizers):
                own("a", verbose=False)
            self._warm_up(served.ensemble.model)
        self.batcher.start()

    @torch.inference_mode()
    def _warm_up(self, model: EnsembleForCausalLM) -> None:
        own = model.settings.ungated()
        every = [own, own.changed(rule="meet", weights=None)] if "rule" in self.settings.allowed else [own]
        hidden = None
        for settings in every:
            # Members may make nothing of the token, or fail; what they say of it is not used.
            with contextlib.suppress(SoftmeetError), time_limit(self.settings.limits.token_seconds):
                model.require(settings)
                hidden = hidden or states_behind(model, encoded(model, model.tokenizer, ["a"]))
                model.combiner.solve_rows(hidden, settings, proved=False)

    async def on_tokenizer(self, size: int, work: Callable[..., T], *arguments: Any) -> T:
        """Call a function that uses a tokenizer, on the thread of all such calls, and return what it returns.

        Args:
            size: the characters or tokens that it works on: long work is done apart from short.
            work: the function.
            arguments: its arguments.

        Raises:
            BusyError: if as many such calls wait as the batch and the queue have places.
        """
        if self._at_tokenizer >= (most := self.settings.limits.rows + self.settings.limits.waiting):
            raise BusyError(f"expected at most {most:,} requests whose texts wait to be read: ask again later")
        thread = self._long if size > prompts.LONG else self._short
        self._at_tokenizer += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work, *arguments)
        finally:
            self._at_tokenizer -= 1

    async def encoded(self, served: Served, body: Any) -> tuple[int, ...]:
        """Return the token ids of a body's ``prompt``, a text, or of its ``messages`` if it has none.

        Raises:
            RequestError: if the text is too long for any context, or the messages have no chat template or break its
                rules.
        """
        combination = served.combination(Extension(), ())
        if body.prompt is None and not combination.symbols_are_tokens:
            raise RequestError(
                "expected a prompt: over bytes every member has a chat prompt of its own, in its own tokens",
                param="messages",
            )
        field, texts = prompts.texts_of(body)
        size = prompts.work_of(body, texts)
        await self._require_short(texts, combination, served, field)
        if body.prompt is None:
            return (await self.on_tokenizer(size, prompts.templated, served, combination, body))[0][0]
        return await self.on_tokenizer(size, prompts.tokens_of, served, body.prompt, body.add_special_tokens)

    async def _require_short(self, texts: Sequence[str], how: Combination, served: Served, param: str) -> None:
        """Raise RequestError if a text is so long that it fits into no context; it is not cut into tokens for that."""
        prompts.check_texts(texts, how, served.ensemble.tokenizer, param)
        if (longest := max(map(len, texts), default=0)) > prompts.LONG:
            await self.on_tokenizer(longest, prompts.check_pieces, texts, how, served.ensemble.tokenizer, param)

    async def prepare(self, body: Generation) -> GenerationRequest:
        """Check a request's body, and return it as a generation request with its prompts as token ids.

        Args:
            body: the request's body; pydantic has checked its fields' types and ranges when it was made.

        Raises:
            RequestError: if there is no such member or, where that is refused, no such model (status 404), a change is
                not allowed, more than ``settings.max_tokens`` tokens or than the context has, or more choices than
                ``settings.max_choices`` or than an idle server has places, are asked for, an id in ``logit_bias`` or
                ``stop_token_ids`` is no token's, fields contradict each other, a prompt is empty, has an invalid id or
                leaves no room in the context, the messages have no chat template or break its rules, a setting under
                ``softmeet`` is not valid, or the text cannot be what it has to be.
            BusyError: if too many others' structures are being compiled.
            RuleError: if the rule comes from a package that fails to provide it.
        """
        served, ours = self.ensembles.find(body.model, self.passed_over), body.softmeet or Extension()
        sources = asks(ours, told=self.settings.sources)
        combination = served.combination(ours, self.settings.allowed, self.settings.max_trust)
        most = _symbols(_limit(body, self.settings.max_tokens, combination), ours, combination)
        _check_together(body, most, combination.unit)
        parts = prompts.parts(body) if isinstance(body, CompletionRequest) else []
        _check_choices(len(parts) or 1, body, self.settings)
        # What could be no prompt or passage is refused before it is cut into tokens, which may take seconds.
        passages, (field, texts) = [passage.text for passage in ours.passages or ()], prompts.texts_of(body)
        size = prompts.work_of(body, texts) + sum(map(len, passages))
        whole = {"softmeet.passages": passages} | ({field: texts} if body.truncate_prompt_tokens is None else {})
        for name, some in whole.items():
            await self._require_short(some, combination, served, name)
        if passages:
            combination = await self.on_tokenizer(size, behind_passages, combination, ours)
        limit, score_prompt = _limit(body, self.settings.max_tokens, combination), body.prompt_listed is not None
        if isinstance(body, CompletionRequest):
            score_prompt |= bool(body.echo) and (body.logprobs is not None or ours.report is not None)
            encode = partial(prompts.encoded, scored=score_prompt)
            found, own = await self.on_tokenizer(size, encode, served, combination, parts, body)
        else:
            found, own = await self.on_tokenizer(size, prompts.templated, served, combination, body)
        for prompt, read in zip_longest(found, own, fillvalue=()):
            prompts.check_prompt(prompt, combination, limit, read)
            if not combination.symbols_are_tokens:
                await self.on_tokenizer(size, prompts.check_spelled, prompt, combination, read)
        top, longest = _most_listed(body, combination.model.config.vocab_size), _symbols(limit, ours, combination)
        tokens = body.drawn * sum(longest + score_prompt * len(prompt) for prompt in found)
        _check_listed(tokens, combination, (top or 0) + (ours.report or 0) * (len(combination.names) + 2))
        sampling = _sampling(body, ours, combination.model.config.vocab_size)
        return GenerationRequest(
            combination=combination,
            sampling=replace(sampling, mask=await self._structures.mask(body, combination.model)),
            max_tokens=limit,
            max_bytes=ours.max_bytes,
            top=top,
            report=ours.report,
            sources=sources,
            score_prompt=score_prompt,
            deadline=time.monotonic() + self.settings.seconds,
            prompts=tuple(found),
            own=own,
            choices=body.drawn,
            stops=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            ignore_eos=bool(body.ignore_eos),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            skip_special=body.hides_special,
            show_stop=bool(body.include_stop_str_in_output),
            most_calls=prompts.most_calls(body),
            model=served.name,
            tokenizer=served.ensemble.tokenizer,
        )


def _check_together(body: Generation, limit: int, unit: str) -> None:
    """Raise RequestError if fields of a request, each valid by itself, contradict each other.

    Args:
        body: the request.
        limit: the most tokens, or over bytes the most bytes, of a choice.
        unit: which of both it is.
    """
    if body.drawn < body.choices:
        raise RequestError(
            f"expected best_of of at least n = {body.choices}, got {body.drawn}: raise it, or leave it out",
            param="best_of",
        )
    if body.stream and body.drawn > body.choices:
        raise RequestError(
            "best_of cannot be streamed: which choice is the best is known at the end: leave stream or best_of out",
            param="best_of",
        )
    if body.stream and body.prompt_listed is not None:
        raise RequestError(
            "prompt_logprobs cannot be streamed: leave stream or prompt_logprobs out", param="prompt_logprobs"
        )
    if (body.min_tokens or 0) > limit:
        raise RequestError(
            f"expected min_tokens of at most {limit:,}, the most {unit} of this answer, got {body.min_tokens:,}: ask "
            "for fewer, or for a larger max_tokens",
            param="min_tokens",
        )


def _most_listed(body: Generation, v: int) -> int | None:
    """Return how many of v tokens are listed at most at one of the answer or of a prompt; None if none is described."""
    asked = [body.listed, body.prompt_listed, 0 if body.drawn > body.choices else None]
    return max((min(count, v) for count in asked if count is not None), default=None)


def _check_choices(prompts: int, body: Generation, settings: ServerSettings) -> None:
    """Raise RequestError if a request with so many prompts asks for too many choices, or could never find room."""
    choices, passages = body.drawn, len((body.softmeet and body.softmeet.passages) or [None])
    total, places = prompts * choices * passages, settings.limits.rows + settings.limits.waiting
    most = min(settings.max_choices, places)
    if total > most:
        limit = "limit, --max-choices" if settings.max_choices <= places else "room, --batch and --queue together"
        name = "n" if choices == body.choices else "best_of"
        count = f"{prompts:,} prompt{'s' * (prompts > 1)} with {name} = {choices}"
        count += f" and {passages} passages, each of which is a row" if passages > 1 else ""
        raise RequestError(
            f"expected at most {most:,} choices in all, this server's {limit}, got {total:,} ({count}): send fewer in "
            "each request",
            param=name if choices > 1 else "softmeet.passages" if passages > 1 else "prompt",
        )


def _limit(body: Generation, server: int, combination: Combination) -> int:
    """Return the most tokens of a choice: what a request asks for, or else as many as texts have everywhere.

    Args:
        body: the request; one for a text of at most so many bytes has no other limit than the server's.
        server: the server's limit.
        combination: the ensemble; the smaller of ``server`` and the shortest member's context is the limit; over bytes
            members' contexts end an answer, as the bytes that they hold are not known before.

    Raises:
        RequestError: if the request asks for more than the limit.
    """
    most, of, more = server, "this server's limit", ", or start the server with a larger --max-tokens"
    if (context := combination.room(0)) < server:
        most, of, more = context, "the context of the ensemble's shortest member", ""
    for name in prompts.LENGTHS:
        if (asked := getattr(body, name, None)) is None:
            continue
        if asked > most:
            raise RequestError(
                f"expected {name} of at most {most:,}, {of}, got {asked:,}: ask for fewer{more}", param=name
            )
        return int(asked)
    return most if body.softmeet and body.softmeet.max_bytes else min(ANSWER_TOKENS, most)


def _symbols(tokens: int, ours: Extension, combination: Combination) -> int:
    """Return the most tokens of a choice that are drawn: over bytes, of the bytes that so many tokens may have.

    Raises:
        RequestError: if a number of bytes is given over tokens.
    """
    if ours.max_bytes is not None and combination.symbols_are_tokens:
        raise RequestError(
            "max_bytes is for ensembles over bytes, and this one is over tokens: say max_tokens",
            param="softmeet.max_bytes",
        )
    return AnswerLength(combination.alphabet, tokens, ours.max_bytes).longest or 0


def _sampling(body: Generation, ours: Extension, vocabulary: int) -> Sampling:
    """Return the sampling options that a request gives; a conversation has a temperature, and a seed is drawn else.

    Args:
        body: the request, whose fields have the names of :class:`Sampling`'s where they mean the same.
        ours: its field ``softmeet``, likewise.
        vocabulary: the number of tokens, which ids in ``logit_bias`` and ``stop_token_ids`` have to be below.

    Raises:
        RequestError: if such an id is not below ``vocabulary``.
    """
    biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    for field_name, ids in (("logit_bias", biases), ("stop_token_ids", body.stop_token_ids or ())):
        if absent := [token for token in ids if not 0 <= token < vocabulary]:
            raise RequestError(
                f"expected token ids below {vocabulary:,} in {field_name}, got {absent[0]}", param=field_name
            )
    names = Sampling.__dataclass_fields__
    given: dict[str, Any] = {} if isinstance(body, CompletionRequest) else {"temperature": TEMPERATURE}
    given |= {name: x for source in (ours, body) for name, x in source if name in names and x is not None}
    # vLLM has -1, too, for all tokens.
    top_k = max(given.get("top_k", 0), 0)
    changes = {"logit_bias": biases, "top_k": top_k, "is_seeded": "seed" in given}
    return Sampling(**({"seed": secrets.randbits(53)} | given | changes))


def _check_listed(tokens: int, combination: Combination, each: int) -> None:
    """Raise RequestError if an answer may have more log-probabilities, of ``each`` a token, than is kept in memory."""
    if tokens * each > _MOST_LISTED:
        unit, field = combination.unit, "max_tokens" if combination.symbols_are_tokens else "softmeet.max_bytes"
        raise RequestError(
            f"expected at most {_MOST_LISTED:,} log-probabilities in an answer, got {tokens * each:,} ({tokens:,} "
            f"{unit} with {each} each): ask for fewer {unit} ({field}), choices, logprobs or a smaller report",
        )
