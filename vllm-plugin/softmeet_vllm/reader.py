"""A model that vLLM runs as a reader: its engine, in processes of its own, writes the tokens that softmeet takes."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import secrets
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection, Listener
from shutil import rmtree
from tempfile import mkdtemp
from threading import Thread
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.errors import CheckpointError, InvalidInputError, ReaderError, cannot_load
from softmeet.members.huggingface import load_tokenizers
from softmeet.readers.reader import Row, Traits
from softmeet.readers.stateless import StatelessReader
from softmeet.readers.token_alphabet import TokenAlphabet
from softmeet_vllm.asked import MEMBERS

# How many texts vLLM runs at once, and the most tokens of a text where its model allows more.
_ROWS, _CONTEXT = 64, 4096
# Seconds in which a request comes to vLLM's scheduler.
_SENT = 0.002
_OVER = -1
# Seconds between two looks at whether vLLM lives.
_PATIENCE = 2.0
_TIMEOUT, _SECOND = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "VLLM_USE_V2_MODEL_RUNNER"
# Largest mean KL in nats between predictions of a text alone and among others, in half precision.
_COARSE = 0.05


@dataclass(eq=False)
class _Request:
    """A text that vLLM writes.

    Attributes:
        number: its own; -1 if vLLM goes on with it no more.
        taken: the token that vLLM still has to take; None if there is none.
        told: what follows it, (v,); None while vLLM is at it.
    """

    number: int
    taken: int | None = None
    told: Float[Tensor, " v"] | None = None


class VllmReader(StatelessReader):
    """A checkpoint that vLLM runs, as a member.

    Every text that goes on by one token goes on in vLLM's batch; others are asked for anew, and its prefix cache knows
    how they begin.

    Args:
        path: the checkpoint, a folder or a name on the Hub.
        context: the most tokens of a text; None for 4,096, or the model's own if that is less.
        dtype: in which vLLM runs it; None for the checkpoint's.

    Raises:
        CheckpointError: if vLLM cannot run it.
    """

    def __init__(self, path: str, context: int | None = None, dtype: str | None = None) -> None:
        # By its tokens, every text behind which vLLM stands still; the numbers of those, and of others that are over.
        self._live, self._standing = dict[tuple[int, ...], _Request](), list[int]()
        self._failed: Exception | None = None
        self._numbers, self._tasks = count(), set[asyncio.Task[None]]()
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, daemon=True, name="softmeet-vllm").start()
        try:
            self._engine, self._processor = self._started(path, context, dtype)
        except Exception as error:
            raise error if isinstance(error, CheckpointError) else cannot_load(path, str(error)) from error
        atexit.register(self.shut_down)
        model = self._engine.model_config
        (tokenizer,) = load_tokenizers([model.tokenizer])
        ends = {tokenizer.eos_token_id, *_listed(model.try_get_generation_config().get("eos_token_id"))} - {None}
        alphabet = TokenAlphabet(tokenizer, model.get_vocab_size(), frozenset(ends))
        coarse = model.dtype != torch.float32
        traits = Traits(rounding="coarse" if coarse else "fine", bound=_COARSE if coarse else 1e-3, row_cost=0.1)
        super().__init__(path, alphabet, model.max_model_len - 1, traits)

    def _started(self, path: str, context: int | None, dtype: str | None) -> tuple[Any, Connection]:
        """Start vLLM's engine, and return it with the connection to its processor."""
        try:
            from vllm import AsyncEngineArgs
        except ImportError as error:
            raise cannot_load(path, "vLLM is not installed beside softmeet-vllm") from error
        from vllm.platforms import current_platform

        from softmeet_vllm.step import ADDRESS

        key = secrets.token_bytes(16)
        folder = mkdtemp(prefix="softmeet-")
        listener = Listener(f"{folder}/step", "AF_UNIX", authkey=key)
        given: dict[str, Any] = {"max_model_len": context or _most(path)}
        if current_platform.is_cpu():
            given["block_size"] = 32  # vLLM's own there is 128, and its cache shares whole blocks
        args = AsyncEngineArgs(
            path, dtype=dtype or "auto", max_num_seqs=_ROWS, logits_processors=["softmeet_vllm.step:Step"],
            enable_prefix_caching=True, enable_chunked_prefill=False, async_scheduling=False, disable_log_stats=True,
            **given,
        )  # fmt: skip
        before = {name: os.environ.pop(name, None) for name in (MEMBERS, _TIMEOUT, _SECOND)}
        # A step takes as long as whoever takes tokens lets it wait.
        os.environ |= {ADDRESS: json.dumps([listener.address, key.hex()]), _TIMEOUT: str(1 << 30), _SECOND: "0"}
        connected: Future[Connection] = Future()
        Thread(target=lambda: connected.set_result(listener.accept()), daemon=True).start()
        try:
            engine = self._run(_made(args))
            return engine, connected.result(60)
        finally:
            listener.close()
            rmtree(folder, ignore_errors=True)
            for name in (ADDRESS, _TIMEOUT, _SECOND):
                os.environ.pop(name)
            os.environ |= {name: value for name, value in before.items() if value is not None}

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self, row: Row) -> None:
        """Give a row up; with the last one, vLLM ends what it writes."""
        super().close(row)
        if not self._rows:
            self._let_go()

    def _let_go(self) -> None:
        """Have vLLM end all texts, behind which it stands still."""
        if self._standing:
            with suppress(OSError):
                self._answer([0] * len(self._standing), self._standing)
            self._live = {}

    def _answer(self, tokens: Sequence[int], ended: Sequence[int]) -> None:
        """Tell vLLM's batch the tokens that it takes, and which texts end, of which these are not looked at."""
        if ended:
            self._run(self._engine.abort([str(number) for number in ended]))
        self._processor.send(tokens)
        self._standing = []

    def shut_down(self) -> None:
        """End vLLM's processes."""
        self._let_go()
        self._processor.close()
        self._engine.shutdown()

    def next_logits(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "k v"]:
        """Return what follows each of k texts, (k, v) logits in nats, fp32.

        Raises:
            InvalidInputError: if a text is empty.
            ReaderError: if vLLM has ended.
        """
        if not all(texts):
            raise InvalidInputError(f"expected a token to predict from, but {self.name} puts none before a text")
        asked = [tuple(text) for text in texts]
        live, wanted, begun = self._live, dict[tuple[int, ...], _Request](), dict[tuple[int, ...], _Request]()
        wanted |= {text: live[text] for text in asked if text in live}
        for text in [text for text in dict.fromkeys(asked) if text not in wanted]:
            before = live.get(text[:-1])
            if before is not None and before not in wanted.values():
                before.taken, before.told = text[-1], None
                wanted[text] = before
            else:
                wanted[text] = begun[text] = _Request(next(self._numbers))
        self._live = wanted
        try:
            if begun:
                self._run(self._begin(begun))
            while any(request.told is None for request in wanted.values()):
                self._step(wanted.values())
        except (EOFError, OSError) as error:
            raise ReaderError(f"{self.name} failed in vLLM, which has ended") from error
        self._live = {text: request for text, request in wanted.items() if request.number in self._standing}
        return torch.stack([wanted[text].told for text in asked])  # type: ignore[misc]

    def _step(self, wanted: Iterable[_Request]) -> None:
        """Have vLLM go on behind what it has told, if there is anything, and hear what follows then."""
        by_number = {request.number: request for request in wanted}
        if self._standing:
            self._go_on(by_number)
        while not self._processor.poll(_PATIENCE):
            if self._failed is not None or self._engine.errored:
                why, self._failed = self._failed, None
                raise ReaderError(f"{self.name} failed in vLLM: {why or 'it has ended'}") from why
        self._standing = self._processor.recv()
        told = np.frombuffer(self._processor.recv_bytes(), np.float32).reshape(len(self._standing), -1)
        for number, logits in zip(self._standing, told, strict=True):
            if (request := by_number.get(number)) is not None and request.told is None:
                request.told = torch.from_numpy(logits.copy())

    def _go_on(self, by_number: Mapping[int, _Request]) -> None:
        """Tell vLLM's batch which tokens it takes; what nobody has a token for ends."""
        ended, tokens = list[int](), list[int]()
        for number in self._standing:
            request = by_number.get(number)
            if request is not None and request.taken is not None:
                tokens.append(request.taken)
                request.taken = None
                continue
            # It cannot wait for the others of the batch: when it is wanted again, it begins anew.
            tokens.append(0)
            ended.append(number)
            if request is not None:
                request.number = _OVER
        self._answer(tokens, ended)

    async def _begin(self, begun: Mapping[tuple[int, ...], _Request]) -> None:
        """Have vLLM begin some texts, together."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        from softmeet_vllm.step import NUMBER

        for text, request in begun.items():
            params = SamplingParams(
                temperature=0, max_tokens=None, ignore_eos=True, detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY, extra_args={NUMBER: request.number},
            )  # fmt: skip
            prompt = TokensPrompt(prompt_token_ids=list(text))
            self._tasks.add(task := self._loop.create_task(self._write(prompt, params, request.number)))
            task.add_done_callback(self._tasks.discard)
        # On their way before what stands still is told to go on, so that they join its batch.
        await asyncio.sleep(_SENT)

    async def _write(self, prompt: Any, params: Any, number: int) -> None:
        """Have vLLM write a text to its end, which nobody reads."""
        try:
            async for _ in self._engine.generate(prompt, params, str(number)):
                pass
        except Exception as error:
            self._failed = error


async def _made(args: Any) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(args)


def _most(path: str) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path).get_text_config(decoder=True)
    return min(_CONTEXT, getattr(config, "max_position_embeddings", None) or _CONTEXT)


def _listed(ends: Any) -> list[int]:
    return ends if isinstance(ends, list) else [ends]


def vllm_reader(rest: str, context: str | None = None, dtype: str | None = None) -> VllmReader:
    """Make the reader of ``vllm:REST``, a checkpoint that vLLM runs; see :class:`VllmReader`."""
    if context is not None and not (context.isdecimal() and int(context) > 1):
        raise InvalidInputError(f"expected a number of tokens above 1 as +context behind {rest}, got {context!r}")
    return VllmReader(rest, None if context is None else int(context), dtype)
