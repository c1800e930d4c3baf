"""One cache per member, behind the interface of one."""

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
    """What a member knows of each row, as an object of its own; to transformers a layer of the cache.

    Attributes:
        rows: each has a ``length`` in tokens, and a method ``shorter``, which takes so many of its last tokens away.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: rows bring their own."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse, as transformers requires the method and no model sees this as its cache."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of any layer's mask."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Count the tokens of the longest row, run or not."""
        return max((row.length for row in self.rows), default=0)

    def get_max_length(self) -> int:
        """Say, by -1, that rows may grow without bound."""
        return -1

    def reset(self) -> None:
        """Forget all rows, as before the first token."""
        self.rows = []

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens of every row away; the number is negative, as in transformers."""
        self.rows = [row.shorter(abs(tokens_to_remove)) for row in self.rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row so many times."""
        self.rows = [row for row in self.rows for _ in range(repeats)]

    def batch_select_indices(self, indices: Int[Tensor, " B"] | Bool[Tensor, " B"]) -> None:
        """Keep some rows, in the order of their indices."""
        if self.rows:
            self.rows = [self.rows[k] for k in torch.arange(len(self.rows))[indices.cpu()].tolist()]

    reorder_cache = batch_select_indices


class Lagging(RowsLayer):
    """A member's rows as partial KV caches, each of which may be behind by any number of tokens."""

    def follow(self, tokens: Sequence[Sequence[int]]) -> None:
        """Note the new tokens of every row, without running them."""
        rows = self.rows or [PartialCache()] * len(tokens)
        self.rows = [row.longer(new) for row, new in zip(rows, tokens, strict=True)]

    def run(self, model: PreTrainedModel, rows: Int[Tensor, " k"]) -> list[Float[Tensor, "t d"]]:
        """Bring some rows up to date, and return their last hidden states at the tokens that were pending."""
        chosen = rows.tolist()
        caught, hidden = catch_up(model, [self.rows[k] for k in chosen])
        for k, row in zip(chosen, caught, strict=True):
            self.rows[k] = row
        return hidden


class EnsembleCache(Cache):
    """The members' caches; its layers are theirs, so that reordering, cropping and resetting reach every member.

    Args:
        configs: the members' configurations, in order.
        lagging: all members but the first may be behind it, as the gate ``unsure`` lets them.

    Raises:
        InvalidInputError: a member that is to lag keeps something else than keys and values.
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
