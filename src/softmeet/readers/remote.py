"""A model behind a server of someone else's as a reader: what follows a text is asked for, token by token.

Most servers tell the k likeliest tokens alone. Of any other such a reader knows that it has at most what the k leave,
and no more than the least of them.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Literal
from urllib.parse import urldefrag

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError, ReaderError, cannot_load
from softmeet.members.huggingface import load_tokenizers
from softmeet.readers.http_host import Host, HostError
from softmeet.readers.reader import Explanation, Given, Predictions, Read, Row, Traits
from softmeet.readers.stateless import StatelessReader
from softmeet.readers.token_alphabet import TokenAlphabet
from softmeet.suspended import Done

# How many likeliest tokens are asked for, unless it is said otherwise: as many as most servers tell.
TOP = 20
# How many texts are asked about at once; a server that runs batches makes one of them.
_AT_ONCE = 8
# Seconds between two looks at whether one is answered, in which others go on.
_LOOK = 0.002
# What probabilities may sum to beyond 1: llama.cpp's server adds in single precision, and its 151,936 sum to 1.0006.
_SLACK = 2e-3
# The largest number in single precision, as which llama.cpp's server tells log 0.
_LARGEST = torch.finfo(torch.float32).max
# More tokens than any model has.
_EVERY = 1 << 24
# The bytes that a token may take in an answer, with its text and that in bytes.
_BYTES = 512
# How vLLM and softmeet name a token by its id, each in one way.
_ID = re.compile("token_id:(0|[1-9][0-9]{0,8})")
Told = dict[int, float]


class Protocol(ABC):
    """How a server is asked for the likeliest next tokens.

    Args:
        host: the server.
        model: the name of the model; None for the server's first or only one.

    Attributes:
        symbols: how many tokens there are, once that is known.
    """

    symbols = 0

    def __init__(self, host: Host, model: str | None) -> None:
        self.host, self.model = host, model

    @abstractmethod
    def likeliest(self, text: Sequence[int], top: int | None) -> Told:
        """Return log-probabilities in nats by id of the ``top`` likeliest tokens behind a text; None for all.

        Raises:
            HostError: if the server does not tell them.
        """

    def longest(self, text: Sequence[int], top: int | None) -> int:
        """Return how many bytes an answer may have that tells so many tokens behind a text, and may repeat the text."""
        return _BYTES * (len(text) + (top or self.symbols))

    @abstractmethod
    def limit(self) -> int | None:
        """Return the most tokens of a text; None if the server does not say.

        Raises:
            HostError: if the server has no such model.
        """


class Completions(Protocol):
    """``/completions`` of OpenAI's form with tokens by id, as vLLM and softmeet serve it."""

    def likeliest(self, text: Sequence[int], top: int | None) -> Told:
        """Return log-probabilities by id of the likeliest tokens behind a text, as of :meth:`Protocol.likeliest`."""
        asked = {
            "model": self.model, "prompt": list(text), "max_tokens": 1, "temperature": 0,
            "logprobs": -1 if top is None else top, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        found = self.host.post("/completions", asked, self.longest(text, top))
        try:
            (choice,) = found["choices"]
            (told,) = choice["logprobs"]["top_logprobs"]
            return {_id(name): value for name, value in told.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise HostError("answers without log-probabilities") from error

    def limit(self) -> int | None:
        """Return how long the model's texts may be, as vLLM and softmeet tell it, with room for the token asked for."""
        found = self.host.get("/models")
        try:
            models = {one["id"]: (one.get("max_model_len"), one.get("softmeet") or {}) for one in found["data"]}
            names = ", ".join(models)
            self.model = self.model or next(iter(models), None)
            if self.model not in models:
                raise HostError("has no model {}: it has {}", self.model, names or "none")
            most, ours = models[self.model]
            vocabulary, context = ours.get("vocabulary", "tokens"), ours.get("context")
        except (AttributeError, KeyError, TypeError) as error:
            raise HostError("lists no models") from error
        if vocabulary != "tokens":
            raise HostError("mixes over {}, and tells no tokens: serve members of one tokenizer there", vocabulary)
        most = context if most is None else most
        return None if most is None else _room(most)


class LlamaServer(Protocol):
    """``/completion`` of llama.cpp's server, which tells any number of tokens and keeps what it has read."""

    def likeliest(self, text: Sequence[int], top: int | None) -> Told:
        """Return log-probabilities by id of the likeliest tokens behind a text, as of :meth:`Protocol.likeliest`."""
        count = _EVERY if top is None else top
        asked = {"prompt": list(text), "n_predict": 1, "n_probs": count, "cache_prompt": True, "temperature": -1.0}
        found = self.host.post("/completion", asked, self.longest(text, top))
        try:
            (place,) = found["completion_probabilities"]
            listed = [(one["id"], one["logprob"]) for one in place["top_logprobs"]]
            told = dict(listed)
        except (KeyError, TypeError, ValueError) as error:
            raise HostError("answers without log-probabilities") from error
        if len(told) < len(listed):
            raise HostError("tells a token twice")
        return told

    def limit(self) -> int | None:
        """Return the room that each text has, with that for the token asked for."""
        try:
            most = self.host.get("/props")["default_generation_settings"]["n_ctx"]
        except (KeyError, TypeError) as error:
            raise HostError("does not tell how long texts may be") from error
        return _room(most)


def _id(name: str) -> int:
    if (found := _ID.fullmatch(name)) is None:
        raise HostError(
            "names tokens by their text, as {}, of which several can have the same: a server is needed that knows "
            "return_tokens_as_token_ids, such as vLLM's, softmeet's or llama.cpp's", name,
        )  # fmt: skip
    return int(found[1])


def _room(most: Any) -> int:
    """Return how long a text may be where ``most`` tokens have room, with that for the token asked for."""
    if type(most) is not int or most < 3:
        raise HostError("tells {} as the tokens of the longest text, where 3 or more were expected", most)
    return min(most, 1 << 30) - 1


class RemoteReader(StatelessReader):
    """A model behind a server, which is sent the whole text for each token, and reads what is new of it.

    Args:
        name: the member's name in messages.
        protocol: how the server is asked.
        tokenizer: the model's.
        top: how many likeliest tokens are asked for; ``"all"`` for all.

    Raises:
        CheckpointError: if the server does not answer as it should.

    Example:
        >>> from softmeet.readers.byte_tokenizer import byte_tokenizer
        >>> class Fixed(Protocol):
        ...     def likeliest(self, text, top):
        ...         return {0: -0.1, 1: -3.0}
        ...     def limit(self):
        ...         return 64
        >>> reader = RemoteReader("fixed", Fixed(None, None), byte_tokenizer(), top=2)
        >>> found = reader.read_whole([[1]], [[1]])
        >>> round(found.dropped.item(), 3), round(found.bounds().item(), 2)
        (0.045, -3.05)
    """

    def __init__(
        self, name: str, protocol: Protocol, tokenizer: PreTrainedTokenizerBase, top: int | Literal["all"] = TOP
    ) -> None:
        alphabet = TokenAlphabet.of(tokenizer)
        self._pool, self._waiting = (ThreadPoolExecutor(_AT_ONCE, f"softmeet-{of}") for of in ("remote", "waiting"))
        protocol.symbols = alphabet.size
        self._protocol, self._top = protocol, None if top == "all" or top >= alphabet.size else top
        traits = Traits(rounding="coarse", bound=0.05, known=self._top, row_cost=1.0, waits=True)
        try:
            super().__init__(name, alphabet, protocol.limit(), traits)
            self._told([[next(iter(alphabet.ends), 0)]])
        except HostError as error:
            raise cannot_load(name, f"its server {error}") from error

    def next_logits(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "k v"]:
        """Return the log-probabilities of the tokens that are told, -inf for the others.

        Raises:
            ReaderError: if the server fails, or tells what is none.
        """
        try:
            return self._told(texts)
        except HostError as error:
            raise ReaderError(f"{self.name} {error}") from error

    def asked_for(self, texts: Sequence[Sequence[int]]) -> Generator[Done, None, Tensor]:
        """Return what :meth:`next_logits` does, and yield until the server has answered."""
        running = self._waiting.submit(self.next_logits, texts)
        while not running.done():
            wait([running], _LOOK)
            yield None
        return running.result()

    def read(self, asked: Sequence[Read]) -> Any:
        """Read on in some rows, as of :meth:`Reader.read`, and say what the tokens that are not told can have."""
        found = yield from super().read(asked)
        return found if self.traits.known is None else _partial(found)

    def abort(self) -> None:
        """End all questions that wait for the server's answer at once, as failed, from any thread, and ask none more.

        This is for the end of a process, which need not wait for a server that hangs then.
        """
        self._protocol.host.abort()

    def explain(self, row: Row, top: int = 10, at: int | None = None) -> Explanation:
        """List the likeliest tokens behind a row's symbols, as the server tells them anew, and what it leaves out.

        ``details`` has ``known``, the number of tokens that it tells, ``unseen``, the probability of all others
        together, and ``most``, the largest log-probability in nats that one of these can have.
        """
        own = self._mine(row)
        found: Any = _partial(Given(self.next_logits([(*own.own, *own.text[:at])]), [1]))
        best = found.logits().topk(min(top, self._top or top))
        expected = [
            (self.alphabet.decode([token]).decode(errors="replace"), nats)
            for token, nats in zip(best.indices[0].tolist(), best.values[0].tolist(), strict=True)
        ]
        details = {
            "known": self._top or self.alphabet.size,
            "unseen": found.dropped.item(),
            "most": found.bounds().item(),
        }
        return Explanation(tuple(expected), details)

    def _told(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "k v"]:
        """Ask the server, and check what it says."""
        ask = partial(self._protocol.likeliest, top=self._top)
        # One thread keeps its connection.
        told = list(self._pool.map(ask, texts)) if len(texts) > 1 else list(map(ask, texts))
        found = torch.full((len(texts), self.alphabet.size), -math.inf)
        for row, one in zip(found, told, strict=True):
            ids, values = self._checked(one)
            row[ids] = values
        return found

    def _checked(self, told: Told) -> tuple[Tensor, Tensor]:
        if not told:
            raise HostError("tells no token")
        if wrong := [one for one in told if not (type(one) is int and 0 <= one < self.alphabet.size)]:
            raise HostError(
                "tells the token {}, and its tokenizer has {}: name the model's own by +tokenizer=",
                wrong[0], f"{self.alphabet.size:,}",
            )  # fmt: skip
        # True and false are integers, and an integer may be too large for a float.
        if odd := [one for one in told.values() if type(one) not in (int, float) or _LARGEST < abs(one) < math.inf]:
            raise HostError("tells {} as a log-probability", odd[0])
        values = torch.tensor(list(told.values()), dtype=torch.float64)
        if not values.max() > -math.inf or not (values <= _SLACK).all() or values.exp().sum() > 1 + _SLACK:
            raise HostError("tells log-probabilities whose sum is no probability")
        if self._top is None and len(told) < self.alphabet.size:
            raise HostError(
                f"tells {len(told):,} tokens of {self.alphabet.size:,}: ask for so many by +top={len(told)}"
            )
        # What it tells beyond what was asked for, as of the token that it took, is no harm: the likeliest are kept.
        most = values.topk(min(self._top or len(values), len(values))).indices
        return torch.tensor(list(told))[most], values[most].float()


def _partial(found: Predictions) -> Given:
    """Return predictions that know some tokens, with the most that any other can have."""
    logits = found.logits()
    known = ~logits.isneginf()
    dropped = -torch.expm1(logits.double().logsumexp(-1).clamp_max(0))
    least = logits.masked_fill(~known, math.inf).amin(-1)
    most = torch.minimum((dropped + _SLACK).log(), least.double())
    partial = Given(logits, found.counts, found.errors, found.work, most)
    partial.dropped = dropped
    return partial


def http(rest: str, tokenizer: str | None = None, top: str | None = None) -> RemoteReader:
    """Make the reader of ``http:REST``; see :func:`at`."""
    return at(f"http:{rest}", tokenizer, top)


def https(rest: str, tokenizer: str | None = None, top: str | None = None) -> RemoteReader:
    """Make the reader of ``https:REST``; see :func:`at`."""
    return at(f"https:{rest}", tokenizer, top)


def at(address: str, tokenizer: str | None, top: str | None) -> RemoteReader:
    """Make the reader of a model behind a server.

    Args:
        address: the server's, such as ``http://127.0.0.1:8000/v1#MODEL``; without ``#MODEL`` its first model.
        tokenizer: a member with the model's tokenizer: a checkpoint, a GGUF file, or a bundled name.
        top: how many likeliest tokens to ask for, a number or ``all``; None for 20.

    Raises:
        InvalidInputError: if the address is none, no tokenizer is named, or ``top`` is no number.
        CheckpointError: if the server does not answer as it should, or the tokenizer cannot be loaded.
    """
    url, model = urldefrag(address)
    host = Host(url)
    if tokenizer is None:
        raise InvalidInputError(
            f"expected the tokenizer of the model at {url}, which servers do not give: put +tokenizer=NAME behind it, "
            "the name of a checkpoint, a folder or a GGUF file"
        )
    if top is not None and top != "all" and not (top.isdecimal() and int(top) > 0):
        raise InvalidInputError(f"expected a number of tokens or all, got +top={top} behind {url}")
    count: int | Literal["all"] = TOP if top is None else "all" if top == "all" else int(top)
    (own,) = load_tokenizers([tokenizer])
    root = Host(url.removesuffix("/").removesuffix("/v1"))
    protocol = LlamaServer(root, model or None) if _is_llama(root) else Completions(host, model or None)
    return RemoteReader(address, protocol, own, count)


def _is_llama(root: Host) -> bool:
    """Return whether a server is llama.cpp's."""
    try:
        found = root.get("/props")
    except HostError:
        return False
    return isinstance(found, dict) and "default_generation_settings" in found
