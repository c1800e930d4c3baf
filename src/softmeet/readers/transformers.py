"""A causal language model of transformers as a reader of its own tokens."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError, NonFiniteError, SoftmeetError
from softmeet.members.heads import head_of
from softmeet.members.huggingface import require_cache
from softmeet.members.opaque import Head
from softmeet.members.placement import whereabouts
from softmeet.members.quantized import rounds_coarsely
from softmeet.members.reading import Work
from softmeet.readers.blocks import Seat
from softmeet.readers.kv import KeysAndValues, require_keys_and_values
from softmeet.readers.prefixes import PrefixCache
from softmeet.readers.reader import Predictions, Read, Reader, Row, Traits


@dataclass(frozen=True, eq=False)
class TokenAlphabet:
    """The tokens of a tokenizer, as the symbols of a reader.

    Attributes:
        tokenizer: the tokenizer; None where no text is ever encoded or decoded.
        size: the number of ids, padding of the vocabulary included.
        ends: the ids that end a text.
    """

    tokenizer: PreTrainedTokenizerBase | None
    size: int
    ends: frozenset[int]

    @cached_property
    def _texts(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InvalidInputError("expected a reader with a tokenizer, to encode or decode a text: give it one")
        return self.tokenizer

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._texts.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without those that the tokenizer puts before every text."""
        return list(self._texts.encode(text, add_special_tokens=False))

    def decode(self, symbols: Sequence[int]) -> bytes:
        """Return the bytes of tokens."""
        kept = [token for token in symbols if token not in self._special]
        return str(self._texts.decode(kept, clean_up_tokenization_spaces=False)).encode()

    def count(self, symbols: Sequence[int]) -> int:
        """Return the number of tokens."""
        return len(symbols)

    def may_follow(self, symbols: Sequence[int]) -> None:
        """Return None: any token can follow."""
        return


# Where only a member's own tokens are kept: those of so many contexts.
_OWN = 16


def stamp_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """Return what changes when a model's weights are changed in place, cast or moved."""
    parameters = list(model.parameters())
    first = parameters[0]
    return first.dtype, first.device, first.data_ptr(), sum(0 if p.is_inference() else p._version for p in parameters)


@dataclass(eq=False)
class _Text(Row):
    """A row: the tokens that were read, where their keys and values are, and the last hidden state.

    Attributes:
        tokens: the member's own tokens before the text, and the symbols that were read.
        own: how many of them are the member's own.
        seat: the keys and values of the first of all these tokens.
        last: (1, d), the last hidden state at the newest of them; None if it was taken back.
        is_new: whether nothing was read in it yet, but for what is known of earlier texts.
    """

    tokens: list[int] = field(default_factory=list)
    own: int = 0
    seat: Seat = field(default_factory=Seat)
    last: Float[Tensor, "1 d"] | None = None
    known: int = 0
    is_new: bool = True

    @property
    def length(self) -> int:  # type: ignore[override]
        """The number of symbols that were read."""
        return len(self.tokens) - self.own


class States(Predictions):
    """Predictions as last hidden states, which the model's head turns into logits when these are asked for."""

    def __init__(
        self, head: Head, states: Float[Tensor, "k d"], counts: Sequence[int], errors: dict[int, SoftmeetError],
        work: Work,
    ) -> None:  # fmt: skip
        super().__init__(counts, errors, work)
        self._head, self._states = head, states

    def hidden(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k d"]:
        """Return the last hidden states at some places."""
        return self._states[places]

    def logits(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k v"]:
        """Return the head's logits at some places."""
        return self._head.logits(self._states[places])


def context_of(model: PreTrainedModel) -> int:
    """Return the number of tokens in a model's context; 2⁶³ - 1 if nothing limits it."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def ends_of_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Return the ids that end a text."""
    named = model.generation_config.eos_token_id
    ends = named if isinstance(named, list) else [named]
    return frozenset({getattr(tokenizer, "eos_token_id", None), *ends} - {None})


class TransformersReader(Reader):
    """A causal language model of transformers, read token by token.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer; None where texts are tokens from the beginning.
        name: its name in messages.
        own: the tokens before every text for which no others are given; None for the tokenizer's own.
        kept_tokens: the most tokens of earlier texts, in all, whose keys and values are kept for texts that begin
            alike; None to keep those of the member's own tokens before texts alone.
        head: its output layer; None to find it.

    Raises:
        InvalidInputError: if the model takes no cache, or one that holds more than keys and values.
        UnsupportedHeadError: if the output layer is of no known kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        own: Sequence[int] | None = None,
        kept_tokens: int | None = 16384,
        head: Head | None = None,
    ) -> None:
        require_cache(model)
        require_keys_and_values(name, model.config, "rows of a text cannot be read on")
        self.model, self.name = model, name
        self.head: Head = head or head_of(model)
        self.own = tuple(own or (tokenizer.encode("") if own is None and tokenizer is not None else ()))
        self._context = context_of(model)
        self.limit = self._context - len(self.own)
        self.alphabet = TokenAlphabet(tokenizer, self.head.v, ends_of_texts(model, tokenizer))
        weights = list(model.parameters())
        self.traits = Traits(
            rounding="coarse" if rounds_coarsely(model) else "fine",
            places=tuple(sorted(whereabouts(model))),
            cost=sum(own.nbytes for own in weights),
        )
        self._kv = KeysAndValues(model)
        self._whole, limit = kept_tokens is not None, _OWN * self._context if kept_tokens is None else kept_tokens
        self._prefixes, self._stamp = PrefixCache[Seat](limit, self._kv.leave), stamp_of(model)
        self._rows = set[_Text]()

    @property
    def bytes(self) -> int:
        """The bytes of the keys and values of all open rows and of texts that are kept, with room for more."""
        return self._kv.bytes

    @property
    def kept_tokens(self) -> int:
        """The number of tokens of earlier texts whose keys and values are kept."""
        return self._prefixes.tokens

    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row, as of :meth:`Reader.open`."""
        before = list(own or self.own)
        row = _Text(tokens=before, own=len(before))
        wrong = [token for token in before if not 0 <= token < self.alphabet.size]
        if wrong or len(before) >= self._context:
            said = f"the id {wrong[0]}" if wrong else f"{len(before):,} tokens"
            raise InvalidInputError(
                f"expected at most {self._context - 1:,} tokens of {self.name} before a text, of ids below "
                f"{self.alphabet.size:,}, got {said}"
            )
        if reuse and (before or text):
            self._forget_other_weights()
            found, kept = self._prefixes.longest([*before, *text])
            if kept is not None:
                row.seat, row.known = self._kv.alone(kept, found), max(0, found - len(before))
                row.tokens += text[: row.known]
        self._rows.add(row)
        return row

    def _forget_other_weights(self) -> None:
        """Forget what is kept of earlier texts, if the weights were changed in place since."""
        if self._prefixes.tokens and (now := stamp_of(self.model)) != self._stamp:
            self._prefixes.clear()
            self._stamp = now

    def fork(self, row: Row, count: int = 1, length: int | None = None) -> list[Row]:
        """Open rows that begin with a row's symbols; keys and values are shared."""
        one = self._mine(row)
        seats = [self._kv.fork(one.seat, one.seat.length) for _ in range(count)]
        forks = [replace(one, tokens=list(one.tokens), seat=seat) for seat in seats]
        self._rows.update(forks)
        for fork in forks:
            self.crop(fork, one.length if length is None else length)
        return list(forks)

    def crop(self, row: Row, length: int) -> None:
        """Take back the symbols behind the first ``length``."""
        one = self._mine(row)
        if not 0 <= length <= one.length:
            raise InvalidInputError(f"expected a length from 0 to {one.length}, the row's, got {length}")
        if length < one.length:
            del one.tokens[one.own + length :]
            one.last, one.seat.path = None, one.seat.path[: one.own + length]

    def close(self, row: Row) -> None:
        """Close a row, and free the memory of what no other row or kept text shares."""
        one = self._mine(row)
        self._rows.discard(one)
        self._kv.leave(one.seat)

    def _mine(self, row: Row) -> _Text:
        if not (isinstance(row, _Text) and row in self._rows):
            raise InvalidInputError(f"expected an open row of {self.name}: open() gives one, and close() ends it")
        return row

    def read(self, asked: Sequence[Read]) -> Generator[None, None, Predictions]:
        """Read on in some rows, as of :meth:`Reader.read`."""
        rows = [self._mine(one.row) for one in asked]
        if len(set(map(id, rows))) < len(rows):
            raise InvalidInputError(f"expected each row of {self.name} once in a call of read")
        pairs = list(zip(rows, asked, strict=True))
        errors = {k: error for k, pair in enumerate(pairs) if (error := self._refused(*pair))}
        new = {k: tokens for k, pair in enumerate(pairs) if k not in errors and (tokens := self._new(*pair))}
        before = {k: rows[k].seat.length for k in new}
        try:
            last = max((len(asked[k].symbols) + 1 - place for k in new for place in asked[k].at[:1]), default=1)
            states, calls = yield from self._kv.read([(rows[k].seat, tokens) for k, tokens in new.items()], last)
        except BaseException:
            for k, length in before.items():
                rows[k].seat.path = rows[k].seat.path[:length]
            raise
        ran = dict(zip(new, states, strict=True))
        every = {
            k: torch.cat([own for own in (row.last, ran.get(k)) if own is not None])
            for k, (row, one) in enumerate(pairs)
            if k not in errors and (one.symbols or one.at)
        }
        work = Work(calls, sum(map(len, new.values())))
        return self._settled(pairs, every, before, errors, work)

    def _settled(
        self,
        pairs: Sequence[tuple[_Text, Read]],
        every: dict[int, Float[Tensor, "t d"]],
        before: dict[int, int],
        errors: dict[int, SoftmeetError],
        work: Work,
    ) -> Predictions:
        """Note what was read of rows, and return the predictions.

        Args:
            pairs: each row with what was asked of it.
            every: by number, the last hidden states of what was run for it, behind the one before, if that is known.
            before: by number, how many tokens of the row had been run.
            errors: by number, why it was not run; those of states that are no numbers are added.
            work: what reading has cost.
        """
        # All rows are looked at in one transfer from the device.
        finite = torch.stack([own.isfinite().all() for own in every.values()]).tolist() if every else []
        wanted, counts = list[Tensor](), [0] * len(pairs)
        for (k, own), well in zip(every.items(), finite, strict=True):
            row, one = pairs[k]
            if well:
                newest = len(own) - 1 - len(one.symbols)
                wanted.append(own[[newest + place for place in one.at]])
                counts[k] = len(one.at)
            else:
                errors[k] = NonFiniteError(f"expected finite numbers of {self.name}, got NaN or an infinity")
                self._kv.drop(row.seat, row.seat.path[before[k] :])
            if well and one.keep:
                self._keep(row, one.symbols, own[-1:])
            elif k in before:
                row.seat.path = row.seat.path[: before[k]]
        told = torch.cat(wanted) if wanted else torch.zeros(0, self.head.d, device=self.head.device)
        return States(self.head, told, counts, errors, work)

    def _new(self, row: _Text, one: Read) -> list[int]:
        """Return the tokens of a row that have to be run."""
        if row.last is None and one.at and not one.at[0]:
            # The state before the first new symbol was taken back, and is computed again.
            row.seat.path = row.seat.path[: len(row.tokens) - 1]
        return [*row.tokens[row.seat.length :], *one.symbols]

    def _refused(self, row: _Text, one: Read) -> SoftmeetError | None:
        """Return why some symbols cannot be read; None if they can."""
        length = len(row.tokens) + len(one.symbols)
        if wrong := [token for token in one.symbols if not 0 <= token < self.alphabet.size]:
            return InvalidInputError(f"expected symbols of {self.name} below {self.alphabet.size:,}, got {wrong[0]}")
        if length > self._context:
            return InvalidInputError(
                f"expected a text of at most {self._context:,} tokens, the context of {self.name}, got {length:,}"
            )
        if one.at and not one.at[0] and not row.tokens:
            return InvalidInputError(
                f"expected a token to predict from, but {self.name} puts none before a text: read a symbol first"
            )
        return None

    def _keep(self, row: _Text, symbols: Sequence[int], last: Float[Tensor, "1 d"]) -> None:
        """Note what was read of a row, and keep the keys and values of what was first, for texts that begin alike."""
        row.tokens += symbols
        known = row.tokens if self._whole else row.tokens[: row.own]
        if row.is_new and known and self._prefixes.wants(known):
            self._prefixes.keep(known, self._kv.alone(row.seat, len(known)))
        row.last, row.is_new = last, False
