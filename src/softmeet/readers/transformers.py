"""A causal language model of transformers as a reader of its own tokens."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from softmeet.errors import InvalidInputError, NonFiniteError, SoftmeetError
from softmeet.members.heads import head_of
from softmeet.members.opaque import Head
from softmeet.members.placement import whereabouts
from softmeet.members.quantized import rounds_coarsely
from softmeet.members.trunk import last_hidden, require_cache
from softmeet.readers.blocks import Seat
from softmeet.readers.kv import KeysAndValues
from softmeet.readers.open_rows import R, ReaderOfTokens
from softmeet.readers.prefixes import PrefixCache
from softmeet.readers.reader import Predictions, Read, Row, Traits, Work
from softmeet.readers.token_alphabet import TokenAlphabet
from softmeet.suspended import Done

_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


def others_than_keys_and_values(config: PreTrainedConfig) -> list[str]:
    """Return the kinds of layers of a model's cache that hold something else, such as a recurrent layer's state."""
    layers = DynamicCache(config=config).layers
    return sorted({type(one).__name__ for one in layers if type(one) not in _KEYS_AND_VALUES})


def require_keys_and_values(name: str, config: PreTrainedConfig, what: str) -> None:
    """Check that the layers of a member's cache hold nothing but keys and values.

    Args:
        name: the member's, for the message.
        config: the member's configuration.
        what: the end of the message, a clause that names the consequence or gives advice.

    Raises:
        InvalidInputError: if a layer of the cache holds something else, such as the state of a recurrent layer.
    """
    if other := others_than_keys_and_values(config):
        raise InvalidInputError(
            f"expected members whose cache holds keys and values, but {name} has {', '.join(other)}: {what}"
        )


# The members' own tokens before texts, by themselves, that are kept with what follows them.
_BEGUN = 16


# Where only members' own tokens before texts are kept, so many of them in all, and of each so many at most.
_OWN, _OWN_EACH = 8192, 2048


def stamp_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """Return what changes when a model's weights are changed in place, cast or moved."""
    parameters = list(model.parameters())
    first = parameters[0]
    return first.dtype, first.device, first.data_ptr(), sum(0 if p.is_inference() else p._version for p in parameters)


@dataclass(eq=False)
class _Text(Row):
    """A row: the keys and values of what was read, and the last hidden state.

    Attributes:
        own: the member's own tokens before the text.
        seat: the keys and values of these and of the symbols that were read, without ``pending``.
        pending: the last of these tokens, which still have to be run.
        last: (1, d), the last hidden state at the newest of them; None if it was taken back, or they were not run.
        is_new: whether nothing was read in it yet, but for what is known of earlier texts.
    """

    own: tuple[int, ...] = ()
    seat: Seat = field(default_factory=Seat)
    pending: tuple[int, ...] = ()
    last: Float[Tensor, "1 d"] | None = None
    length: int = 0
    known: int = 0
    is_new: bool = True


class States(Predictions):
    """Predictions as last hidden states, which the model's head turns into logits when these are asked for."""

    def __init__(
        self, head: Head, states: Float[Tensor, "k d"], counts: list[int], errors: dict[int, SoftmeetError],
        work: Work,
    ) -> None:  # fmt: skip
        self.counts, self.errors, self.work = counts, errors, work
        self._head, self._states = head, states

    def hidden(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k d"]:
        """Return the last hidden states at some places."""
        found = self._states[places]
        # Outside of inference mode, what was computed in it could not be changed in place.
        return found if torch.is_inference_mode_enabled() or not found.is_inference() else found.clone()

    states = hidden

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


class ModelReader(ReaderOfTokens[R]):
    """What readers of a causal language model's own tokens have in common, whatever they keep of a text.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer; None where texts are tokens from the beginning.
        name: its name in messages.
        head: its output layer; None to find it.

    Attributes:
        kind: the class of rows.
        can_crop: as of :class:`~softmeet.readers.reader.Traits`.

    Raises:
        InvalidInputError: if the model takes no cache.
        UnsupportedHeadError: if the output layer is of no known kind.
    """

    kind: type[R]
    can_crop = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str, head: Head | None = None
    ) -> None:
        super().__init__(self.kind)
        self.model, self.name = require_cache(model), name
        self.head: Head = head or head_of(model)
        self.limit = self._context = context_of(model)
        self.alphabet = TokenAlphabet(tokenizer, self.head.v, ends_of_texts(model, tokenizer))
        self.traits = Traits(
            can_crop=self.can_crop,
            rounding="coarse" if rounds_coarsely(model) else "fine",
            places=tuple(sorted(whereabouts(model))),
            cost=sum(own.nbytes for own in model.parameters()),
        )


class TransformersReader(ModelReader[_Text]):
    """A causal language model of transformers, read token by token.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer; None where texts are tokens from the beginning.
        name: its name in messages.
        own: the tokens before every text for which no others are given; None for the tokenizer's own.
        kept_tokens: the most tokens of earlier texts, in all, whose keys and values are kept for texts that begin
            alike; None to keep those of the member's own tokens before texts alone.
        head: its output layer; None to find it.
        at_once: whether all that is read in one call of :meth:`read` is one call of the model, however many tokens are
            new in each row; for models that read trees of tokens.

    Raises:
        InvalidInputError: if the model takes no cache, or one that holds more than keys and values.
        UnsupportedHeadError: if the output layer is of no known kind.
    """

    kind = _Text

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        own: Sequence[int] | None = None,
        kept_tokens: int | None = 16384,
        head: Head | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        require_keys_and_values(name, require_cache(model).config, "rows of a text cannot be read on")
        super().__init__(model, tokenizer, name, head)
        self.own = tuple(own or (tokenizer.encode("") if own is None and tokenizer is not None else ()))
        self.limit = self._context - len(self.own)
        self._kv, self._whole = KeysAndValues(model, at_once=at_once), kept_tokens is not None
        limit = _OWN if kept_tokens is None else kept_tokens
        self._prefixes, self._stamp = PrefixCache[Seat](limit, self._kv.leave), stamp_of(model)
        self._begun = dict[tuple[int, ...], tuple[Seat, Float[Tensor, "1 d"]]]()

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
        row = _Text(own=tuple(own) or self.own)
        row.pending = row.own
        self._require_own(row.own)
        self._forget_other_weights()
        found, kept = self._prefixes.longest([*row.own, *text]) if reuse and (row.own or text) else (0, None)
        row.known = row.length = max(0, found - len(row.own))
        if reuse and not row.known and row.own in self._begun:
            (kept, row.last), found = self._begun[row.own], len(row.own)
        if kept is not None:
            row.seat, row.pending = self._kv.alone(kept, found), row.own[found:]
        return self._opened(row)

    def _forget_other_weights(self) -> None:
        """Forget what is kept of earlier texts, if the weights were changed in place, cast or moved since."""
        if (now := stamp_of(self.model)) != self._stamp:
            self._stamp = now
            self._prefixes.clear()
            while self._begun:
                self._kv.leave(self._begun.popitem()[1][0])
            self._kv.forget_layout()

    def _copied(self, row: _Text) -> _Text:
        """Return a row that shares keys and values."""
        return _Text(row.own, self._kv.fork(row.seat), row.pending, row.last, row.length, row.known, row.is_new)

    def crop(self, row: Row, length: int) -> None:
        """Take back the symbols behind the first ``length``."""
        one = self._mine(row)
        self._require_length(one, length)
        if length < one.length:
            one.last, one.pending, one.length = None, (), length
            self._kv.crop(one.seat, len(one.own) + length)

    def close(self, row: Row) -> None:
        """Close a row, and free the memory of what no other row or kept text shares."""
        one = self._mine(row)
        self._rows.pop(one)
        self._kv.leave(one.seat)

    def read(self, asked: Sequence[Read]) -> Generator[Done, None, Predictions]:
        """Read on in some rows, as of :meth:`Reader.read`."""
        found = self._passed(asked) if len(asked) == 1 and not asked[0].keep else self._stepped(asked)
        if found is not None:
            return found
        rows = self._each_once(asked)
        pairs = list(zip(rows, asked, strict=True))
        refused = [self._refused(one, len(row.own) + row.length, one.symbols) for row, one in pairs]
        errors = {k: error for k, error in enumerate(refused) if error}
        new = {k: tokens for k, pair in enumerate(pairs) if k not in errors and (tokens := self._new(*pair))}
        before = {k: rows[k].seat.length for k in new}
        # A row of logits is long: models that give no hidden states compute no more of them than are wanted.
        last = max((1 + len(asked[k].symbols) - [*asked[k].at, len(asked[k].symbols)][0] for k in new), default=1)
        try:
            states, calls = yield from self._kv.read([(rows[k].seat, tokens) for k, tokens in new.items()], last)
        except BaseException:
            for k, length in before.items():
                self._kv.drop(rows[k].seat, rows[k].seat.path[length:])
                rows[k].seat.path = rows[k].seat.path[:length]
            self._leave_closed(rows)
            raise
        every = dict(zip(new, states, strict=True))
        for k, (row, one) in enumerate(pairs):
            if k not in errors and row.last is not None and one.at and not one.at[0]:
                every[k] = torch.cat((row.last, every[k])) if k in every else row.last
        every = dict(sorted(every.items()))
        work = Work(calls, sum(map(len, new.values())))
        found = self._settled(pairs, every, before, errors, work)
        self._leave_closed(rows)
        return found

    def _leave_closed(self, rows: Sequence[_Text]) -> None:
        """Give up what was read of rows that were closed between the pieces of a call."""
        for row in rows:
            if row not in self._rows:
                self._kv.leave(row.seat)

    def _stepped(self, asked: Sequence[Read]) -> Predictions | None:
        """Read one symbol more of each row, as while texts are written, with less ado; None if it is not that."""
        seats, tokens = list[Seat](), list[int]()
        for one in asked:
            row, symbols = one.row, one.symbols
            if not (isinstance(row, _Text) and row in self._rows and len(symbols) == 1 and one.keep):
                return None
            if row.last is None or row.pending or len(one.at) != 1 or one.at[0] != 1:
                return None
            if not (0 <= symbols[0] < self.alphabet.size and len(row.own) + row.length < self._context):
                return None
            seats.append(row.seat)
            tokens.append(symbols[0])
        states = self._kv.step(seats, tokens) if seats else None
        if states is None:
            return None
        for one, last in zip(asked, states.split(1), strict=True):
            one.row.last = last  # type: ignore[attr-defined]
            one.row.length += 1
        return States(self.head, states, [1] * len(seats), {}, Work(1, len(seats)))

    @torch.inference_mode()
    def _passed(self, asked: Sequence[Read]) -> Predictions | None:
        """Read a text from its beginning that is not kept, with no keys and values; None if it is not that."""
        (one,), (row,) = asked, self._each_once(asked)
        tokens = [*row.pending, *one.symbols]
        if row.seat.length or not one.at or self._refused(one, len(row.own) + row.length, one.symbols):
            return None
        few = slice(one.at[0] - len(one.symbols) - 1, None)
        states = last_hidden(self.model, torch.tensor([tokens]), few, use_cache=False)[0]
        return self._settled([(row, one)], {0: states}, {0: 0}, {}, Work(1, len(tokens)))

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
            every: by number, last hidden states at its last tokens, from the first at which one is wanted.
            before: by number, how many tokens of the row had been run.
            errors: by number, why it was not run; those of states that are no numbers are added.
            work: what reading has cost.
        """
        whole = torch.cat([*every.values()] or [torch.zeros(0, self.head.d, device=self.head.device)])
        # All rows are looked at in one transfer from the device, and each by itself where that finds something.
        finite = _finite(whole)
        wanted, counts, end = list[int](), [0] * len(pairs), 0
        for k, own in every.items():
            (row, one), end = pairs[k], end + len(own)
            well = finite or _finite(own)
            if well:
                wanted += [end - 1 - len(one.symbols) + place for place in one.at]
                counts[k] = len(one.at)
            else:
                errors[k] = NonFiniteError(f"expected finite numbers of {self.name}, got NaN or an infinity")
                self._kv.drop(row.seat, row.seat.path[before[k] :])
            if well and one.keep and row in self._rows:
                row.length += len(one.symbols)
                self._keep(row, own[-1:].clone())
            elif k in before:
                row.seat.path = row.seat.path[: before[k]]
        if wanted != [*range(len(whole))]:
            whole = whole.index_select(0, torch.tensor(wanted, dtype=torch.long, device=whole.device))
        return States(self.head, whole, counts, errors, work)

    def _new(self, row: _Text, one: Read) -> list[int]:
        """Return the tokens of a row that have to be run."""
        if not (one.symbols or one.at):
            return []
        if row.last is None and one.at and not one.at[0] and not row.pending:
            # The state before the first new symbol was taken back, and is computed again.
            row.pending, row.seat.path = row.seat.tokens[-1:], row.seat.path[:-1]
        return [*row.pending, *one.symbols]

    def _keep(self, row: _Text, last: Float[Tensor, "1 d"]) -> None:
        """Note what was read of a row, and keep the keys and values of what was first, for texts that begin alike."""
        row.pending, row.last = (), last
        if not row.is_new:
            return
        row.is_new, tokens = False, row.seat.tokens
        known = tokens if self._whole else row.own if len(row.own) <= _OWN_EACH else ()
        if known and self._prefixes.wants(known):
            self._prefixes.keep(known, self._kv.alone(row.seat, len(known), kept=True))
        if not row.length and len(tokens) <= _OWN_EACH and tokens not in self._begun:
            for old in list(self._begun)[: 1 - _BEGUN]:
                self._kv.leave(self._begun.pop(old)[0])
            self._begun[tokens] = self._kv.alone(row.seat, len(tokens), kept=True), last


def _finite(x: Tensor) -> bool:
    """Return whether all entries are numbers: 0 · NaN and 0 · ∞ are none, which is told faster than by isfinite."""
    return bool((x * 0).sum() == 0)
