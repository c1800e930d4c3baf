"""One member's running batch: rows join and leave at any token, and one forward serves them all.

Rows end at a common column and are padded on the left, as in transformers' own batched generation, so that whatever a
model does with a mask and positions is right. The columns move on by one a step; nothing is copied but when a row joins
or leaves, or the columns reach the end of the buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softmeet.members.huggingface import last_hidden
from softmeet.members.partial_cache import KeysValues, PartialCache, catch_up, layers_of_keys_and_values
from softmeet.members.placement import home
from softmeet.server.prefixes import Prefixes


@dataclass
class _Window:
    """Which part of the buffers is in use: the first ``rows`` rows, columns from ``first`` to before ``end``."""

    rows: int = 0
    first: int = 0
    end: int = 0
    slots: int = 4
    columns: int = 256


class _Layer(DynamicLayer):
    """Keys and values of one layer, (slots, heads, columns, width), written in place at the window's end.

    A sliding layer keeps everything too: the mask says what it sees.
    """

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window = window

    def allocate(self, like: KeysValues) -> None:
        """Make the buffers for states like those, or larger ones if the window has grown."""
        w = self.window
        for name, part in zip(("keys", "values"), like, strict=True):
            old = getattr(self, name)
            if old is not None and old.shape[0] >= w.slots and old.shape[2] >= w.columns:
                continue
            new = part.new_zeros(w.slots, part.shape[1], w.columns, part.shape[3])
            if old is not None:
                new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)
        self.is_initialized = True

    def put(self, row: int, states: KeysValues) -> None:
        """Write a prompt's states into a row, ending at the window's end, and zeros before it."""
        w = self.window
        for buffer, part in zip((self.keys, self.values), states, strict=True):
            # A masked NaN is still a NaN, so that what another row left behind has to go.
            buffer[row] = 0
            buffer[row, :, w.end - part.shape[2] : w.end] = part[0]

    def shift(self, by: int) -> None:
        """Move the columns in use by so many to the right (to the left if negative)."""
        w = self.window
        for buffer in (self.keys, self.values):
            part = buffer[: w.rows, :, w.first : w.end].clone()
            buffer[: w.rows] = 0
            buffer[: w.rows, :, w.first + by : w.end + by] = part

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for buffer in (self.keys, self.values):
            buffer[target] = buffer[source]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of every row at the window's end; give back all that the rows hold."""
        w = self.window
        seen = slice(w.first, w.end + 1)
        self.keys[: w.rows, :, w.end] = key_states[:, :, 0]
        self.values[: w.rows, :, w.end] = value_states[:, :, 0]
        return self.keys[: w.rows, :, seen], self.values[: w.rows, :, seen]

    def get_seq_length(self) -> int:
        """The columns before the one that is written next."""
        return self.window.end - self.window.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As :meth:`get_seq_length`, with the query, and where they begin."""
        return self.get_seq_length() + query_length, 0


class MemberBatch:
    """A member and the rows that it is running.

    Args:
        name: for messages.
        model: in evaluation mode.
        kept_tokens: how many prompt tokens may keep their states for prompts that begin alike.

    Raises:
        InvalidInputError: the member's cache holds something else than keys and values.
    """

    def __init__(self, name: str, model: PreTrainedModel, kept_tokens: int = 16384) -> None:
        self.name, self.model = name, model
        self.prefixes = Prefixes(kept_tokens)
        advice = "its rows cannot join a running batch; use softmeet generate"
        self._depth = layers_of_keys_and_values(name, model.config, advice)
        self._window = _Window()
        self._cache = Cache(layers=[_Layer(self._window) for _ in range(self._depth)])
        self._lengths: list[int] = []
        self.rows: list[int] = []

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], *, every: bool) -> tuple[Float[Tensor, "t d"], list[KeysValues], int]:
        """Run a prompt by itself.

        Args:
            tokens: the prompt.
            every: want the hidden states of every position, not only of the last ones.

        Returns:
            (hidden states of the last positions, keys and values of each layer, how many tokens were not computed
            again).
        """
        reused, states = (0, None) if every else self.prefixes.longest(tokens)
        cache = Cache(layers=[DynamicLayer() for _ in range(self._depth)])
        if states is not None:
            for layer, (keys, values) in zip(cache.layers, states, strict=True):
                layer.update(keys[:, :, :reused], values[:, :, :reused])
        ids = torch.tensor([tokens[reused:]], device=home(self.model))
        mask = torch.ones(1, len(tokens), dtype=torch.int64, device=ids.device)
        hidden = last_hidden(self.model, ids, cache=cache, use_cache=True, attention_mask=mask)[0]
        found = [(layer.keys, layer.values) for layer in cache.layers]
        if hidden.isfinite().all():
            self.prefixes.keep(tokens, found)
        return hidden, found, reused

    @torch.inference_mode()
    def catch_up(
        self, rows: Sequence[tuple[PartialCache, Sequence[int], int, bool]]
    ) -> tuple[list[PartialCache], list[Float[Tensor, "t d"]]]:
        """Run what sequences outside the batch have not run, each in one chunk.

        Args:
            rows: for each its trail, all of its tokens, how many of them are its prompt, and whether every one's hidden
                states are wanted, so that a prompt that begins like an earlier one is computed all the same.

        Returns:
            (the trails with nothing pending; the hidden states at the tokens that were).
        """
        trails = [self._begun(trail, tokens, every=every) for trail, tokens, _, every in rows]
        done, hidden = catch_up(self.model, trails)
        for (trail, tokens, prompt, _), new, states in zip(rows, done, hidden, strict=True):
            if not trail.run and states.isfinite().all():
                self.prefixes.keep(tokens[:prompt], list(new.shorter(len(tokens) - prompt).states))
        return done, hidden

    def _begun(self, trail: PartialCache, tokens: Sequence[int], *, every: bool) -> PartialCache:
        """With the rest of the tokens pending, and what is known of a prompt that begins alike."""
        if not trail.run and not every:
            reused, states = self.prefixes.longest(tokens)
            trail = PartialCache(tuple(states or ())).shorter(states[0][0].shape[2] - reused) if states else trail
        return trail.longer(tokens[trail.run :])

    @torch.inference_mode()
    def join(self, row: int, states: list[KeysValues]) -> None:
        """A prompt that was run becomes a row of the batch.

        Args:
            row: its name, for :meth:`leave`.
            states: as :meth:`prefill` gives them.
        """
        w, length = self._window, states[0][0].shape[2]
        # Powers of two with room for one more.
        w.slots = max(w.slots, 1 << len(self.rows).bit_length())
        w.columns = max(w.columns, 1 << max(length, w.end - w.first).bit_length())
        layers: list[_Layer] = self._cache.layers
        for layer, like in zip(layers, states, strict=True):
            layer.allocate(like)
        if not self.rows:
            w.first, w.end = 0, length
        elif length > w.end:
            self._shift(length - w.end)
        w.rows = len(self.rows) + 1
        for layer, like in zip(layers, states, strict=True):
            layer.put(w.rows - 1, like)
        w.first = min(w.first, w.end - length)
        self.rows.append(row)
        self._lengths.append(length)

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Take a row out; the last one takes its place."""
        k, last = self.rows.index(row), len(self.rows) - 1
        if k != last:
            for layer in self._cache.layers:
                layer.move(last, k)
        self.rows[k], self._lengths[k] = self.rows[last], self._lengths[last]
        del self.rows[last], self._lengths[last]
        self._window.rows = last
        if self.rows:
            self._window.first = self._window.end - max(self._lengths)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Float[Tensor, "B d"]:
        """One more token for every row, in the order of ``rows``; the hidden states there."""
        w = self._window
        if w.end >= w.columns:
            # Half of the buffer or more may be in use only if a row is that long, and then it has to grow.
            if 2 * (w.end - w.first) > w.columns:
                w.columns *= 2
            self._shift(-w.first)
        place = home(self.model)
        lengths = torch.tensor(self._lengths)
        mask = torch.arange(w.end - w.first + 1) >= w.end - w.first - lengths[:, None]
        hidden = last_hidden(
            self.model,
            torch.tensor(tokens)[:, None].to(place),
            cache=self._cache,
            use_cache=True,
            attention_mask=mask.long().to(place),
            position_ids=lengths[:, None].to(place),
        )
        w.end += 1
        self._lengths = [length + 1 for length in self._lengths]
        return hidden[:, -1]

    def _shift(self, by: int) -> None:
        w = self._window
        while w.end + by >= w.columns:
            w.columns *= 2
        for layer in self._cache.layers:
            layer.allocate((layer.keys, layer.values))
            layer.shift(by)
        w.first, w.end = w.first + by, w.end + by
