"""One member's running batch: sequences join and leave it at any token, and one forward pass serves all of them.

Each sequence is a row. All rows end at the same column and are padded on the left, as in transformers' batched
generation, so that any model which respects an attention mask and position ids is right. Every step writes one more
column. Keys and values are copied only when a row joins or leaves, or when the columns reach the end of the buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softmeet.members.huggingface import last_hidden, require_cache
from softmeet.members.partial_cache import (
    KeysValues,
    PartialCache,
    catch_up,
    cut,
    layers_of_keys_and_values,
)
from softmeet.readers.prefixes import PrefixCache
from softmeet.server.sequences import Sequence

# The most tokens of one sequence that a member runs at once.
PIECE = 256


def _bytes(states: Iterable[KeysValues]) -> int:
    return sum(part.numel() * part.element_size() for pair in states for part in pair)


@dataclass
class _Window:
    """The part of a batch's buffers that is in use: rows 0 to ``rows`` - 1, and columns ``first`` to ``end`` - 1.

    The buffers of all layers have ``slots`` rows and ``columns`` columns, or get them at the next ``allocate``.
    """

    rows: int = 0
    first: int = 0
    end: int = 0
    slots: int = 4
    columns: int = 256


class _BatchLayer(DynamicLayer):
    """Keys and values of one layer for all rows of a batch, two buffers of shape (slots, heads, columns, width).

    A layer with sliding-window attention keeps all columns too; the attention mask hides those out of its window.

    Args:
        window: the part of the buffers that is in use, shared by all layers of the batch.
    """

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window = window

    def allocate(self, like: KeysValues) -> None:
        """Make the two buffers; if they exist but have fewer slots or columns than the window, enlarge them.

        Args:
            like: keys and values, each (1, heads, t, width), whose heads, width, dtype and device the buffers take.
        """
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
        """Write one sequence's keys and values into a row, ending at the window's end; the rest of the row becomes 0.

        Args:
            row: the row's number.
            states: keys and values, each (1, heads, t, width).
        """
        w = self.window
        for buffer, part in zip((self.keys, self.values), states, strict=True):
            # Clear what an earlier sequence left: masked entries get weight 0, but 0 · NaN is NaN.
            buffer[row] = 0
            buffer[row, :, w.end - part.shape[2] : w.end] = part[0]

    def shift(self, by: int) -> None:
        """Move the columns in use ``by`` columns to the right, to the left if it is negative; all others become 0."""
        w = self.window
        for buffer in (self.keys, self.values):
            part = buffer[: w.rows, :, w.first : w.end].clone()
            buffer[: w.rows] = 0
            buffer[: w.rows, :, w.first + by : w.end + by] = part

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write t new tokens of every row from the column ``window.end`` on, in place, as a model's forward pass does.

        Args:
            key_states, value_states: of the new tokens, each (rows, heads, t, width).
            args, kwargs: ignored; other caches of transformers take more.

        Returns:
            (keys, values) of the columns in use and the new ones, each (rows, heads, columns in use + t, width).
        """
        w = self.window
        end = w.end + key_states.shape[2]
        self.keys[: w.rows, :, w.end : end] = key_states
        self.values[: w.rows, :, w.end : end] = value_states
        return self.keys[: w.rows, :, w.first : end], self.values[: w.rows, :, w.first : end]

    def get_seq_length(self) -> int:
        """Return the number of columns in use, without those that the next tokens will take."""
        return self.window.end - self.window.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (width, first column) of the attention mask for ``query_length`` new tokens; the first column is 0."""
        return self.get_seq_length() + query_length, 0


class MemberBatch:
    """One member with its running batch and its cache of earlier prompts.

    Attributes:
        name: the member's name in messages.
        model: the member.
        rows: (sequence, this member's index i in ``sequence.members``) for each row of the running batch, in order; an
            ensemble may have the model several times, with prompts of their own.

    Args:
        name: the member's name in messages.
        model: the member, in evaluation mode; it becomes ``member``.
        kept_tokens: the most prompt tokens, over all prompts, whose keys and values are kept for later prompts.

    Raises:
        InvalidInputError: if the member takes no cache, or its cache holds anything but keys and values.
    """

    def __init__(self, name: str, model: PreTrainedModel, kept_tokens: int = 16384) -> None:
        self.name, self.member = name, model
        self.rows: list[tuple[Sequence, int]] = []
        require_cache(model)
        advice = "its rows cannot join a running batch; use softmeet generate"
        depth = layers_of_keys_and_values(name, model.config, advice)
        self._prefixes = PrefixCache[tuple[KeysValues, ...]](kept_tokens)
        self._window = _Window()
        self._cache = Cache(layers=[_BatchLayer(self._window) for _ in range(depth)])
        self._lengths: list[int] = []

    @property
    def cache_bytes(self) -> int:
        """The number of bytes of the batch's buffers, in use or not, and of the prompts kept."""
        layers = [(layer.keys, layer.values) for layer in self._cache.layers if layer.is_initialized]
        return _bytes(layers) + sum(map(_bytes, self._prefixes.states))

    @property
    def kept_tokens(self) -> int:
        """The number of prompt tokens whose keys and values are kept for later prompts."""
        return self._prefixes.tokens

    @torch.inference_mode()
    def catch_up(
        self,
        sequences: list[tuple[Sequence, int]],
        *,
        every: bool = False,
        pause: Callable[[], None] = lambda: None,
    ) -> list[Float[Tensor, "t d"]]:
        """Run the member on tokens that are new to it, of sequences outside the running batch, such as prompts.

        Args:
            sequences: pairs of a sequence and this member's index i in ``sequence.members``; at least one token of each
                is new to the member. ``sequence.trails[i]``, the tokens that the member has run with their keys and
                values, is brought up to date.
            every: whether to run all tokens of a prompt that the member has not begun; else the keys and values of
                those with which an earlier prompt began too are taken from the cache of prompts.
            pause: called between the pieces of many tokens.

        Returns:
            for each sequence the last hidden states at the t tokens that were run, (t, d); with ``every`` of a new
            prompt those alone that all members share, without it perhaps that at the newest token alone.
        """
        begun = [self._begun(s, i, every=every) for s, i in sequences]
        done, hidden = catch_up(self.member, begun, piece=PIECE, between=pause, newest=not every)
        for (s, i), old, new, states in zip(sequences, begun, done, hidden, strict=True):
            if not s.trails[i].run:
                s.reused[i] = old.run
                if states.isfinite().all():
                    self._prefixes.keep(s.read_by(i), new.shorter(s.drawn).states)
            s.trails[i] = new
        # What is a member's own comes before what all share.
        return [states[-len(s.tokens) :] for (s, _), states in zip(sequences, hidden, strict=True)] if every else hidden

    def _begun(self, s: Sequence, i: int, *, every: bool) -> PartialCache:
        """Return the trail of a sequence's member i with all tokens that were not run as pending.

        If the member has run none, the trail begins with the states of an earlier prompt with the same beginning,
        unless ``every``.
        """
        trail: PartialCache = s.trails[i]
        tokens = [*s.read_by(i), *s.tokens[len(s.prompt) :]]
        if not trail.run and not every:
            reused, states = self._prefixes.longest(tokens)
            trail = PartialCache(states or ())
            trail = trail.shorter(trail.run - reused)
        return trail.longer(tokens[trail.run :])

    @torch.inference_mode()
    def join(self, s: Sequence, i: int) -> None:
        """Add a sequence to the running batch, as its last row.

        The keys and values in ``s.trails[i]`` move to the batch's buffers, and the trail is emptied.

        Args:
            s: the sequence; this member has run all of its tokens but the newest.
            i: this member's index in ``s.members``.
        """
        states, s.trails[i] = s.trails[i].states, PartialCache()
        w, length = self._window, states[0][0].shape[2]
        # Powers of two, with room for one more row and one more column.
        w.slots = max(w.slots, 1 << len(self.rows).bit_length())
        w.columns = max(w.columns, 1 << max(length, w.end - w.first).bit_length())
        if not self.rows:
            w.first, w.end = 0, length
        elif length > w.end:
            self._shift(length - w.end)
        for layer, like in zip(self._cache.layers, states, strict=True):
            layer.allocate(like)
            layer.write(len(self.rows), like)
        w.rows, w.first = len(self.rows) + 1, min(w.first, w.end - length)
        self.rows.append((s, i))
        self._lengths.append(length)

    @torch.inference_mode()
    def leave(self, s: Sequence, i: int, *, keep: bool = False) -> PartialCache:
        """Remove the row of a sequence's member i, which has to be in ``rows``; the last row takes its place.

        Returns:
            a copy of the keys and values of the tokens that were run, with ``keep``; else an empty cache.
        """
        k, last = self.rows.index((s, i)), len(self.rows) - 1
        end = self._window.end
        trail = PartialCache(cut(self._cache, k, end - self._lengths[k], end)) if keep else PartialCache()
        for layer in self._cache.layers:
            layer.keys[k], layer.values[k] = layer.keys[last], layer.values[last]
        self.rows[k], self._lengths[k] = self.rows[last], self._lengths[last]
        del self.rows[last], self._lengths[last]
        self._window.rows = last
        if self.rows:
            self._window.first = self._window.end - max(self._lengths)
        return trail

    def step(self) -> Float[Tensor, "B d"]:
        """Run the member on the newest token of every row, at least one.

        Returns:
            (B, d), the last hidden states at these tokens, in the order of the B sequences in ``rows``.
        """
        return self.read([s.tokens[-1:] for s, _ in self.rows])[:, -1]

    @torch.inference_mode()
    def read(self, ids: list[list[int]]) -> Float[Tensor, "B t d"]:
        """Run the member on the next tokens of every row, and write their keys and values to the buffers.

        Args:
            ids: for each of the B sequences in ``rows``, at least one, the t tokens that follow those that were run.

        Returns:
            (B, t, d), the last hidden states at these tokens.
        """
        w, new = self._window, len(ids[0])
        if w.end + new > w.columns:
            # Grow the buffers if more than half of the columns are in use; else moving them to the left is enough.
            if 2 * (w.end - w.first) > w.columns:
                w.columns *= 2
            self._shift(-w.first, room=new)
        lengths = torch.tensor(self._lengths)[:, None]
        hidden = last_hidden(
            self.member,
            torch.tensor(ids),
            cache=self._cache,
            use_cache=True,
            attention_mask=(torch.arange(w.end - w.first + new) >= w.end - w.first - lengths).long(),
            position_ids=lengths + torch.arange(new),
        )
        w.end += new
        self._lengths = [length + new for length in self._lengths]
        return hidden

    def forget(self, count: int) -> None:
        """Take back the last ``count`` tokens that were run of every row, at most as many as the shortest has."""
        self._window.end -= count
        self._lengths = [length - count for length in self._lengths]

    def _shift(self, by: int, room: int = 1) -> None:
        """Move the columns in use ``by`` columns right, left if it is negative, before ``room`` columns for new tokens.

        The buffers are enlarged if needed.
        """
        w = self._window
        while w.end + by + room > w.columns:
            w.columns *= 2
        for layer in self._cache.layers:
            layer.allocate((layer.keys, layer.values))
            layer.shift(by)
        w.first, w.end = w.first + by, w.end + by
