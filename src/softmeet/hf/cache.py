"""``EnsembleCache``: one cache per member, which transformers uses as a single cache.

A *sequence* is a row of the batch that is generated: a prompt and its continuation so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from softmeet.members.partial_cache import PartialCache, catch_up, layers_of_keys_and_values


class RowsLayer(CacheLayerMixin):
    """A layer of transformers' cache that keeps one object for each sequence, in place of keys and values.

    Attributes:
        rows: the member's state of each sequence: an object with a ``length`` in tokens and a method ``shorter(k)``,
            which returns a copy without the last k tokens. Empty before the first token.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer holds no keys and values that would need memory."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise NotImplementedError: transformers requires the method, but no model writes into this layer."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (the number of tokens that a mask covers: all so far and ``query_length`` new ones; its offset, 0)."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Count the tokens of the longest sequence, whether the member has run them or not."""
        return max((row.length for row in self.rows), default=0)

    def get_max_length(self) -> int:
        """Return -1, by which transformers' caches say that the layer sets no limit to a sequence's length."""
        return -1

    def reset(self) -> None:
        """Forget all sequences: the layer is then as before the first token."""
        self.rows = []

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |``tokens_to_remove``| tokens of every sequence; transformers passes a negative number."""
        self.rows = [row.shorter(abs(tokens_to_remove)) for row in self.rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times, its copies side by side."""
        self.rows = [row for row in self.rows for _ in range(repeats)]

    def batch_select_indices(self, indices: Int[Tensor, " B"] | Bool[Tensor, " B"]) -> None:
        """Keep the sequences at ``indices``, numbers or a mask, in that order; a number may come more than once."""
        if self.rows:
            self.rows = [self.rows[k] for k in torch.arange(len(self.rows))[indices.cpu()].tolist()]

    reorder_cache = batch_select_indices


class Lagging(RowsLayer):
    """A layer with a partial KV cache of each sequence: tokens that the member has not run yet are kept as pending."""

    def follow(self, tokens: Sequence[Sequence[int]]) -> None:
        """Add new token ids to each sequence as pending, without running them; an empty layer begins the sequences.

        Args:
            tokens: for each sequence, in order, the ids of its new tokens, which may be an empty list.
        """
        rows = self.rows or [PartialCache()] * len(tokens)
        self.rows = [row.longer(new) for row, new in zip(rows, tokens, strict=True)]

    def run(
        self, model: PreTrainedModel, rows: Int[Tensor, " k"], *, newest: bool = False
    ) -> list[Float[Tensor, "t d"]]:
        """Run the pending tokens of some sequences, which then are pending no longer.

        Args:
            model: the member, in evaluation mode.
            rows: (k,), the numbers of the sequences, each with at least one pending token.
            newest: whether the states at the newest token are enough, as :func:`catch_up` has it.

        Returns:
            For each sequence, in the order of ``rows``, the last hidden states at its t pending tokens, (t, d).
        """
        chosen = rows.tolist()
        caught, hidden = catch_up(model, [self.rows[k] for k in chosen], newest=newest)
        for k, row in zip(chosen, caught, strict=True):
            self.rows[k] = row
        return hidden


class EnsembleCache(Cache):
    """The cache of an ensemble over tokens: its layers are the layers of all members' caches, in one list.

    So transformers' reordering, cropping and resetting reach every member.

    Args:
        configs: the members' configurations, in order.
        lagging: whether members after the first may have run fewer tokens than the first, as under the gate ``unsure``.

    Attributes:
        members: each member's own cache: a ``DynamicCache``; with ``lagging`` a :class:`Lagging` layer for all but
            the first.

    Raises:
        InvalidInputError: if ``lagging`` and the cache of a member after the first holds anything but keys and values.
    """

    def __init__(self, configs: Sequence[PreTrainedConfig], *, lagging: bool = False) -> None:
        self.lagging = lagging
        self.members: list[Any] = []
        for i, config in enumerate(configs):
            if lagging and i:
                layers_of_keys_and_values(f"member {i}", config, "it cannot catch up, so leave out the gate 'unsure'")
            self.members.append(Lagging() if lagging and i else DynamicCache(config=config))
        layers = [[one] if isinstance(one, Lagging) else one.layers for one in self.members]
        super().__init__(layers=[layer for own in layers for layer in own])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Count the tokens that the cache holds; 0 if all members are recurrent, whose states do not count them."""
        if not any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return 0
        return int(super().get_seq_length(layer_idx))
