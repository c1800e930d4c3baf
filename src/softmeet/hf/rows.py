"""Layers of transformers' cache that keep an object for each sequence in place of keys and values.

A *sequence* is a row of the batch that is generated: a prompt and its continuation so far.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


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
