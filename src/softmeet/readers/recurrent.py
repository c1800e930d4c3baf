"""A recurrent language model of transformers as a reader: its state is a text's own, and cannot be taken back."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from softmeet.errors import NonFiniteError, SoftmeetError
from softmeet.members.trunk import last_hidden
from softmeet.readers.reader import Predictions, Read, Row, Work
from softmeet.readers.transformers import ModelReader, States
from softmeet.suspended import Done


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


class RecurrentReader(ModelReader[_Passed]):
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

    kind = _Passed
    can_crop = False

    @property
    def bytes(self) -> int:
        """The bytes of the states of all open rows."""
        layers = [layer for row in list(self._rows) if row.cache is not None for layer in row.cache.layers]
        return sum(part.nbytes for layer in layers for part in vars(layer).values() if isinstance(part, Tensor))

    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row, as of :meth:`Reader.open`; nothing is known of earlier texts."""
        return self._opened(_Passed(pending=list(own)))

    def _copied(self, row: _Passed) -> _Passed:
        """Return a row with a copy of the state."""
        return replace(row, tokens=list(row.tokens), pending=list(row.pending), cache=copy.deepcopy(row.cache))

    def close(self, row: Row) -> None:
        """Give a row up, with its state."""
        one = self._mine(row)
        self._rows.pop(one)
        one.cache = one.last = None

    def read(self, asked: Sequence[Read]) -> Generator[Done, None, Predictions]:
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
                yield None
        told = torch.cat(found) if found else torch.zeros(0, self.head.d, device=self.head.device)
        return States(self.head, told, counts, errors, work)

    @torch.inference_mode()
    def _states(self, row: _Passed, one: Read, tokens: list[int]) -> Float[Tensor, "t d"]:
        """Read tokens in a row; returns the last hidden states at them, behind the one before, if there is one."""
        if error := self._refused(one, len(row.tokens), tokens):
            raise error
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
