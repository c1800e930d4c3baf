"""One member's running batch: rows join and leave at any token, and one forward serves them all.

Rows end at a common column and are padded on the left, as in transformers' own batched generation, so that whatever a
model does with a mask and positions is right. The columns move on by one a step; nothing is copied but when a row joins
or leaves, or the columns reach the end of the buffers.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softmeet.members.huggingface import last_hidden
from softmeet.members.partial_cache import KeysValues, PartialCache, catch_up, layers_of_keys_and_values
from softmeet.server.sequences import Sequence


class PrefixCache:
    """Keys and values of past prompts, for prompts that begin alike; the least recently used go first.

    Args:
        limit: how many tokens may be kept, over all prompts.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[tuple[int, ...], tuple[KeysValues, ...]] = OrderedDict()

    def longest(self, tokens: list[int] | tuple[int, ...]) -> tuple[int, tuple[KeysValues, ...]]:
        """Return how many leading tokens are known, and each layer's keys and values of at least those.

        At least the last token is left to compute. If no token is known, there are no keys and values.
        """

        def shared(known: tuple[int, ...]) -> int:
            return min(sum(1 for _ in takewhile(bool, map(eq, known, tokens))), len(tokens) - 1)

        best = max(self._kept, key=shared, default=())
        if not shared(best):
            return 0, ()
        self._kept.move_to_end(best)
        return shared(best), self._kept[best]

    def keep(self, tokens: list[int] | tuple[int, ...], states: tuple[KeysValues, ...]) -> None:
        """Keep each layer's keys and values of a prompt, unless it is longer than all that may be kept."""
        key = tuple(tokens)
        if len(key) <= self.limit and key not in self._kept:
            self._kept[key] = states
            while sum(map(len, self._kept)) > self.limit:
                self._kept.popitem(last=False)


@dataclass
class _Window:
    """Which part of the buffers is in use: the first ``rows`` rows, columns from ``first`` to before ``end``.

    The buffers have ``slots`` rows and ``columns`` columns.
    """

    rows: int = 0
    first: int = 0
    end: int = 0
    slots: int = 4
    columns: int = 256


class _BatchLayer(DynamicLayer):
    """Keys and values of one layer, (slots, heads, columns, width), written in place at the window's end.

    A sliding layer keeps everything too: the mask says what it sees.
    """

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window = window

    def allocate(self, like: KeysValues) -> None:
        """Make buffers for keys and values shaped like those, or larger ones if the window has grown."""
        w = self.window
        for name, part in zip(("keys", "values"), like, strict=True):
            old = getattr(self, name)
            if old is None or old.shape[0] < w.slots or old.shape[2] < w.columns:
                new = part.new_zeros(w.slots, part.shape[1], w.columns, part.shape[3])
                if old is not None:
                    new[: old.shape[0], :, : old.shape[2]] = old
                setattr(self, name, new)
        self.is_initialized = True

    def write(self, row: int, states: KeysValues) -> None:
        """Write one sequence's keys and values into a row, so that they end where the window ends, and zeros before."""
        w = self.window
        for buffer, part in zip((self.keys, self.values), states, strict=True):
            # A masked NaN is still a NaN, so that what another row left behind has to go.
            buffer[row] = 0
            buffer[row, :, w.end - part.shape[2] : w.end] = part[0]

    def shift(self, by: int) -> None:
        """Move the columns in use by ``by`` to the right; to the left if that is negative."""
        w = self.window
        for buffer in (self.keys, self.values):
            part = buffer[: w.rows, :, w.first : w.end].clone()
            buffer[: w.rows] = 0
            buffer[: w.rows, :, w.first + by : w.end + by] = part

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of one token of every row at the window's end; return all that the rows hold."""
        w = self.window
        seen = slice(w.first, w.end + 1)
        self.keys[: w.rows, :, w.end] = key_states[:, :, 0]
        self.values[: w.rows, :, w.end] = value_states[:, :, 0]
        return self.keys[: w.rows, :, seen], self.values[: w.rows, :, seen]

    def get_seq_length(self) -> int:
        """Return how many columns in use there are before the one that is written next."""
        return self.window.end - self.window.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a mask has for a query of ``query_length`` tokens, and its first column."""
        return self.get_seq_length() + query_length, 0


class MemberBatch:
    """A member, the sequences that it is running as ``rows`` of one batch, and prompts that it has run before.

    Args:
        name: of the member, for messages.
        model: the member, in evaluation mode.
        kept_tokens: how many prompt tokens may keep their keys and values for prompts that begin alike.

    Raises:
        InvalidInputError: the member's cache holds something else than keys and values.
    """

    def __init__(self, name: str, model: PreTrainedModel, kept_tokens: int = 16384) -> None:
        self.name, self.model = name, model
        self.rows: list[Sequence] = []
        advice = "its rows cannot join a running batch; use softmeet generate"
        depth = layers_of_keys_and_values(name, model.config, advice)
        self._prefixes = PrefixCache(kept_tokens)
        self._window = _Window()
        self._cache = Cache(layers=[_BatchLayer(self._window) for _ in range(depth)])
        self._lengths: list[int] = []

    @torch.inference_mode()
    def catch_up(self, sequences: list[tuple[Sequence, int]], *, every: bool = False) -> list[Float[Tensor, "t d"]]:
        """Run what sequences outside the batch have not run, such as their prompts, each in one chunk.

        Args:
            sequences: each with the index of this member among its members; at least one token is new to the member.
            every: whether the hidden states of every token are wanted, so that a prompt that begins like an earlier one
                is computed all the same.

        Returns:
            the hidden states of each at the tokens that were run.
        """
        done, hidden = catch_up(self.model, [self._begun(s, s.trails[i], every=every) for s, i in sequences])
        for (s, i), new, states in zip(sequences, done, hidden, strict=True):
            if not s.trails[i].run and states.isfinite().all():
                self._prefixes.keep(s.prompt, new.shorter(s.drawn).states)
            s.trails[i] = new
        return hidden

    def _begun(self, s: Sequence, trail: PartialCache, *, every: bool) -> PartialCache:
        """Return a sequence's trail with all that was not run; an empty one begins with what is known of its prompt."""
        if not trail.run and not every:
            reused, states = self._prefixes.longest(s.tokens)
            trail = PartialCache(states)
            trail = trail.shorter(trail.run - reused)
        return trail.longer(s.tokens[trail.run :])

    @torch.inference_mode()
    def join(self, s: Sequence, i: int) -> None:
        """Make a sequence whose prompt was run, and whose member ``i`` this is, a row of the batch.

        The batch takes over its keys and values.
        """
        states, s.trails[i] = s.trails[i].states, PartialCache()
        w, length = self._window, states[0][0].shape[2]
        # Powers of two with room for one more.
        w.slots = max(w.slots, 1 << len(self.rows).bit_length())
        w.columns = max(w.columns, 1 << max(length, w.end - w.first).bit_length())
        if not self.rows:
            w.first, w.end = 0, length
        elif length > w.end:
            self._shift(length - w.end)
        w.rows = len(self.rows) + 1
        for layer, like in zip(self._cache.layers, states, strict=True):
            layer.allocate(like)
            layer.write(w.rows - 1, like)
        w.first = min(w.first, w.end - length)
        self.rows.append(s)
        self._lengths.append(length)

    @torch.inference_mode()
    def leave(self, s: Sequence) -> None:
        """Take a sequence out of the batch; the last row takes its place."""
        k, last = self.rows.index(s), len(self.rows) - 1
        for layer in self._cache.layers:
            layer.keys[k], layer.values[k] = layer.keys[last], layer.values[last]
        self.rows[k], self._lengths[k] = self.rows[last], self._lengths[last]
        del self.rows[last], self._lengths[last]
        self._window.rows = last
        if self.rows:
            self._window.first = self._window.end - max(self._lengths)

    @torch.inference_mode()
    def step(self) -> Float[Tensor, "B d"]:
        """Run the newest token of every row, and return the hidden states there."""
        w = self._window
        if w.end >= w.columns:
            # Half of the buffer or more may be in use only if a row is that long, and then it has to grow.
            if 2 * (w.end - w.first) > w.columns:
                w.columns *= 2
            self._shift(-w.first)
        lengths = torch.tensor(self._lengths)
        mask = torch.arange(w.end - w.first + 1) >= w.end - w.first - lengths[:, None]
        ids = torch.tensor([s.tokens[-1:] for s in self.rows])
        hidden = last_hidden(
            self.model,
            ids,
            cache=self._cache,
            use_cache=True,
            attention_mask=mask.long(),
            position_ids=lengths[:, None],
        )
        w.end += 1
        self._lengths = [length + 1 for length in self._lengths]
        return hidden[:, -1]

    def _shift(self, by: int) -> None:
        """Move the columns in use, in buffers that are large enough for it."""
        w = self._window
        while w.end + by >= w.columns:
            w.columns *= 2
        for layer in self._cache.layers:
            layer.allocate((layer.keys, layer.values))
            layer.shift(by)
        w.first, w.end = w.first + by, w.end + by
