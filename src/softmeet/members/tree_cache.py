"""Keys and values of trees of tokens: few tensors for each tree, side by side in one cache for a call of the model.

All layers' keys and values of one shape are one tensor, so that a tree's columns are put into a batch, and new ones
taken out of it, by a copy or two, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Of one tree: tensors of shape (parts, heads, columns, width), a part being a layer's keys or its values.
States = tuple[Tensor, ...]
# For each layer where its keys are, and where its values: (the number of the tensor, the number of the part).
Layout = tuple[tuple[tuple[int, int], tuple[int, int]], ...]
# Columns of a tree: all of the first so many, or those that are listed.
Columns = int | np.ndarray[Any, np.dtype[np.int64]]
# Free columns behind those of a tree when it is copied, at least, and as a share of the tree's.
_ROOM, _ROOM_SHARE = 32, 4
_CLAIMS = Lock()


class Store:
    """The keys and values of a tree's tokens, with room for more.

    Trees that begin alike share one store: each is its first so many columns, which never change.

    Args:
        states: those of one tree.
    """

    def __init__(self, states: States) -> None:
        self.tensors, self._used = states, states[0].shape[2]

    def copy(self, group: int, columns: int | Tensor, into: Tensor) -> None:
        """Copy columns of one of the tensors, of which ``group`` is the number: the first so many, or those listed."""
        if isinstance(columns, int):
            into.copy_(self.tensors[group][:, :, :columns])
        else:
            torch.index_select(self.tensors[group], 2, columns, out=into)

    def followed(self, columns: int, new: States) -> Store:
        """Return a store with the first ``columns`` columns of this one, and ``new`` ones behind them.

        It is this store if it has room there, and nothing else follows these columns in it.
        """
        end = columns + new[0].shape[2]
        with _CLAIMS:
            free = self._used == columns and end <= self.tensors[0].shape[2]
            if free:
                self._used = end
        store = self if free else self._copied(columns, end)
        for own, more in zip(store.tensors, new, strict=True):
            own[:, :, columns:end] = more
        return store

    def _copied(self, columns: int, used: int) -> Store:
        """Return a copy of the first columns with room, of which ``used`` columns are taken."""
        found = []
        for one in self.tensors:
            parts, heads, _, width = one.shape
            found.append(one.new_empty(parts, heads, used + max(_ROOM, used // _ROOM_SHARE), width))
            found[-1][:, :, :columns] = one[:, :, :columns]
        copy = Store(tuple(found))
        copy._used = used
        return copy


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
    """Columns of B rows, each those of some tree, as one cache with room for new ones.

    Rows of fewer columns are aligned at the right, with zeros at the left.

    Args:
        rows: for each row, (the store of its tree; None for a tree without tokens; the columns, listed for all rows or
            for none).
        layout: of the stores' tensors; none if no row has a store.
        new: the number of new columns of each row.
        model: the member, whose cache holds keys and values alone.

    Attributes:
        before: the number of columns before the new ones, those of the longest row.
        cache: what the model is called with; it writes the new columns.
        layout: as given, but after a call without any store that which the model has.
    """

    def __init__(
        self, rows: Sequence[tuple[Store | None, Columns]], layout: Layout, new: int, model: PreTrainedModel
    ) -> None:
        self.layout, self._whole = layout, list[Tensor]()
        lengths = [columns if isinstance(columns, int) else len(columns) for _, columns in rows]
        self.before = max(lengths)
        if not layout:
            self.cache = Cache(layers=[DynamicLayer() for _ in DynamicCache(config=model.config).layers])
            return
        for group, like in enumerate(next(store for store, _ in rows if store is not None).tensors):
            parts, heads, _, width = like.shape
            whole = like.new_empty(parts, len(rows), heads, self.before + new, width)
            # Columns that are masked get weight 0, but 0 · NaN is NaN.
            whole[:, :, :, : self.before - min(lengths)] = 0
            taken: Sequence[int | Tensor] = lengths
            if not isinstance(rows[0][1], int):
                # One transfer to the device for all rows.
                listed = np.concatenate([np.asarray(columns) for _, columns in rows])
                taken = torch.from_numpy(listed).to(like.device).split(lengths)
            for row, ((store, _), columns, length) in enumerate(zip(rows, taken, lengths, strict=True)):
                if store is not None:
                    store.copy(group, columns, whole[:, row, :, self.before - length : self.before])
            self._whole.append(whole)
        parts_of = [(self._whole[k][i], self._whole[v][j]) for (k, i), (v, j) in layout]
        self.cache = Cache(layers=[_Room(keys, values, self.before) for keys, values in parts_of])

    def new(self, row: int, count: int) -> States:
        """Return the first ``count`` new columns of a row, as views, after the model was called."""
        if not self._whole:
            self._gather()
        return tuple(whole[:, row, :, self.before : self.before + count] for whole in self._whole)

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
