"""A recurrent language model of transformers as a reader: its state is a text's own, and cannot be taken back."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError, NonFiniteError, SoftmeetError
from softmeet.members.heads import head_of
from softmeet.members.opaque import Head
from softmeet.members.placement import whereabouts
from softmeet.members.quantized import rounds_coarsely
from softmeet.members.trunk import last_hidden, require_cache
from softmeet.readers.open_rows import ReaderOfRows
from softmeet.readers.reader import Predictions, Read, Row, Traits, Work
from softmeet.readers.token_alphabet import TokenAlphabet
from softmeet.readers.transformers import States, context_of, ends_of_texts


@dataclass(eq=False)
class _Passed(Row):
    """A row: the tokens that were read, and the model's state behind them.

    Attributes:
        tokens: the member's own before the text, and the symbols that were read, without ``pending``.
        pending: those of them that still have to be run.
        length: the number of symbols that were read.
        cache: the state; None before the first token.
        last: (1, d), the last hidden state at the newest token.
    """

    tokens: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    length: int = 0
    cache: Any = None
    last: Float[Tensor, "1 d"] | None = None


class RecurrentReader(ReaderOfRows[_Passed]):
    """A causal language model whose state is no list of keys and values, read token by token, a text at a time.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer; None where texts are tokens from the beginning.
        name: its name in messages.
        head: its output layer; None to find it.

    Raises:
        InvalidInputError: if the model takes no cache.
        UnsupportedHeadError: if the output layer is of no known kind.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str, head: Head | None = None
    ) -> None:
        super().__init__(_Passed)
        self.model, self.name = require_cache(model), name
        self.head: Head = head or head_of(model)
        self.limit = context_of(model)
        self.alphabet = TokenAlphabet(tokenizer, self.head.v, ends_of_texts(model, tokenizer))
        self.traits = Traits(
            can_crop=False,
            rounding="coarse" if rounds_coarsely(model) else "fine",
            places=tuple(sorted(whereabouts(model))),
            cost=sum(own.nbytes for own in model.parameters()),
        )

    @property
    def bytes(self) -> int:
        """The bytes of the states of all open rows."""
        layers = [layer for row in list(self._rows) if row.cache is not None for layer in row.cache.layers]
        return sum(part.nbytes for layer in layers for part in vars(layer).values() if isinstance(part, Tensor))

    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row, as of :meth:`Reader.open`; nothing is known of earlier texts."""
        return self._opened(_Passed(pending=list(own)))

    def fork(self, row: Row, count: int = 1, length: int | None = None) -> list[Row]:
        """Open rows that begin with all of a row's symbols, each with a copy of its state."""
        one = self._mine(row)
        if length not in (None, one.length):
            raise self.cannot("fork a row at less than its length")
        forks = [
            replace(one, tokens=list(one.tokens), pending=list(one.pending), cache=copy.deepcopy(one.cache))
            for _ in range(count)
        ]
        self._rows |= dict.fromkeys(forks)
        return list(forks)

    def close(self, row: Row) -> None:
        """Give a row up, with its state."""
        one = self._mine(row)
        self._rows.pop(one)
        one.cache = one.last = None

    def read(self, asked: Sequence[Read]) -> Generator[None, None, Predictions]:
        """Read on in some rows, one after the other."""
        rows = self._each_once(asked)
        found, counts, work, errors = list[Tensor](), [0] * len(rows), Work(), dict[int, SoftmeetError]()
        for k, (row, one) in enumerate(zip(rows, asked, strict=True)):
            tokens, fresh = [*row.pending, *one.symbols], row.cache is None
            try:
                states = self._states(row, one, tokens)
            except SoftmeetError as error:
                errors[k] = error
                continue
            if one.at:
                found.append(states[[len(states) - 1 - len(one.symbols) + place for place in one.at]])
                counts[k] = len(one.at)
            work = work.and_(calls=1 if fresh and tokens else len(tokens), tokens=len(tokens))
            if k + 1 < len(rows):
                yield
        told = torch.cat(found) if found else torch.zeros(0, self.head.d, device=self.head.device)
        return States(self.head, told, counts, errors, work)

    def _check(self, row: _Passed, one: Read, tokens: list[int]) -> None:
        """Raise InvalidInputError if tokens cannot be read, or there is nothing to predict from."""
        if wrong := [token for token in tokens if not 0 <= token < self.alphabet.size]:
            raise InvalidInputError(f"expected symbols of {self.name} below {self.alphabet.size:,}, got {wrong[0]}")
        if (count := len(row.tokens) + len(tokens)) > self.limit:
            raise InvalidInputError(
                f"expected a text of at most {self.limit:,} tokens, the context of {self.name}, got {count:,}"
            )
        if one.at and not one.at[0] and row.last is None and len(tokens) == len(one.symbols):
            raise InvalidInputError(
                f"expected a token to predict from, but {self.name} puts none before a text: read a symbol first"
            )

    @torch.inference_mode()
    def _states(self, row: _Passed, one: Read, tokens: list[int]) -> Float[Tensor, "t d"]:
        """Read tokens in a row; returns the last hidden states at them, behind the one before, if there is one."""
        self._check(row, one, tokens)
        before = [] if row.last is None else [row.last]
        if not tokens:
            return torch.cat(before) if before else torch.zeros(0, self.head.d, device=self.head.device)
        cache = DynamicCache(config=self.model.config) if row.cache is None else row.cache
        cache = cache if one.keep or row.cache is None else copy.deepcopy(cache)
        try:
            # Behind a state recurrent layers read one token a call; several they read as if nothing were before them.
            pieces = [tokens] if row.cache is None else [[token] for token in tokens]
            ran = [last_hidden(self.model, torch.tensor([own]), cache=cache, use_cache=True)[0] for own in pieces]
            states = torch.cat(ran)
            if not bool(states.isfinite().all()):
                raise NonFiniteError(f"expected finite numbers of {self.name}, got NaN or an infinity")
        except BaseException:
            if cache is row.cache:
                # The state is behind tokens that were not read: what was read before them is read again.
                row.cache, row.last, row.pending, row.tokens = None, None, row.tokens + row.pending, []
            raise
        if one.keep:
            row.cache, row.last, row.length = cache, states[-1:], row.length + len(one.symbols)
            row.tokens, row.pending = row.tokens + tokens, []
        return torch.cat([*before, states])
