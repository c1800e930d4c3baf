"""Keys and values of trees of tokens: few tensors for each tree, side by side in one cache for a call of the model.

All layers' keys and values of one shape are one tensor, so that a tree is put into a batch, and taken out of it again,
by a copy or two, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Of one tree: tensors of shape (parts, heads, columns, width), a part being a layer's keys or its values.
States = tuple[Tensor, ...]
# For each layer where its keys are, and where its values: (the number of the tensor, the number of the part).
Layout = tuple[tuple[tuple[int, int], tuple[int, int]], ...]


class _Room(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values with room for new tokens, which are written in place.

    Args:
        keys, values: (B, heads, columns and new ones, width).
        before: the number of columns that are in use.
    """

    def __init__(self, keys: Tensor, values: Tensor, before: int) -> None:
        super().__init__()
        self.keys, self.values, self.before = keys, values, before
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values, and return all, as a model does in its forward pass."""
        self.keys[:, :, self.before :] = key_states
        self.values[:, :, self.before :] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the number of columns before the new ones."""
        return self.before

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (the width of the attention mask for ``query_length`` new tokens; its first column, 0)."""
        return self.before + query_length, 0


class SideBySide:
    """The keys and values of B trees as one cache, with room for new columns.

    Trees of fewer columns are aligned at the right, with zeros at the left.

    Args:
        trees: each tree's states, none if it is empty.
        layout: of the states; none if all trees are empty.
        new: the number of new columns of each tree.
        model: the member, whose cache holds keys and values alone.

    Attributes:
        before: the number of columns before the new ones, those of the longest tree.
        cache: what the model is called with; it writes the new columns.
        layout: as given, but after a call for empty trees that which the model has.
    """

    def __init__(self, trees: Sequence[States], layout: Layout, new: int, model: PreTrainedModel) -> None:
        self.layout, self._whole = layout, list[Tensor]()
        self.before = max(states[0].shape[2] if states else 0 for states in trees)
        if not layout:
            self.cache = Cache(layers=[DynamicLayer() for _ in DynamicCache(config=model.config).layers])
            return
        for group, like in enumerate(next(filter(None, trees))):
            parts, heads, _, width = like.shape
            whole = like.new_empty(parts, len(trees), heads, self.before + new, width)
            for row, states in enumerate(trees):
                begin = self.before - (states[0].shape[2] if states else 0)
                # Columns that are masked get weight 0, but 0 · NaN is NaN.
                whole[:, row, :, :begin] = 0
                if states:
                    whole[:, row, :, begin : self.before] = states[group]
            self._whole.append(whole)
        parts_of = [(self._whole[k][i], self._whole[v][j]) for (k, i), (v, j) in layout]
        self.cache = Cache(layers=[_Room(keys, values, self.before) for keys, values in parts_of])

    def states(self, row: int, start: int, stop: int) -> States:
        """Return the columns ``start`` to ``stop - 1`` of one tree, new ones included, after the model was called.

        They are a copy, since a view would keep the whole batch in memory, unless the batch has one row.
        """
        if not self._whole:
            self._gather()
        found = tuple(whole[:, row, :, start:stop] for whole in self._whole)
        return found if self._whole[0].shape[1] == 1 else tuple(one.clone() for one in found)

    def _gather(self) -> None:
        """Put all layers' keys and values of one shape into one tensor."""
        groups = dict[Any, list[Float[Tensor, "B heads t _"]]]()
        kinds = list[list[Any]]()
        for layer in self.cache.layers:
            parts = layer.keys, layer.values
            kinds.append([(one.shape[1], one.shape[3], one.dtype, one.device) for one in parts])
            for kind, one in zip(kinds[-1], parts, strict=True):
                groups.setdefault(kind, []).append(one)
        counts = {kind: count() for kind in groups}
        order = list(groups)
        places = [[(order.index(kind), next(counts[kind])) for kind in pair] for pair in kinds]
        self.layout = tuple((keys, values) for keys, values in places)
        self._whole = [torch.stack(group) for group in groups.values()]
