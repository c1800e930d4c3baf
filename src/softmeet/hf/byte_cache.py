"""What every member of a byte ensemble has read of each row, behind the interface of a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from softmeet.members.byte_member import Reading

# Readings of each row that are kept, so that as many symbols can be taken back without reading anew.
_KEPT = 16


@dataclass(frozen=True)
class Row:
    """One row: its symbols, and the readings after the last few of them, the newest last; none if it has to be read."""

    symbols: tuple[int, ...] = ()
    readings: tuple[Reading, ...] = ()

    def longer(self, symbol: int, reading: Reading) -> Row:
        """With one symbol more."""
        return Row((*self.symbols, symbol), (*self.readings[1 - _KEPT :], reading))

    def shorter(self, by: int) -> Row:
        """Without the last symbols."""
        return Row(self.symbols[: len(self.symbols) - by], self.readings[: max(0, len(self.readings) - by)])


class RowsRead(CacheLayerMixin):
    """A member's rows; to transformers a layer of the cache."""

    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: rows bring their own."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: no model sees this as its cache."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Give the sizes of any layer's mask."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Count the symbols of the longest row."""
        return max((len(row.symbols) for row in self.rows), default=0)

    def get_max_length(self) -> int:
        """Give none."""
        return -1

    def reset(self) -> None:
        """Forget all rows."""
        self.rows = []

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last symbols of every row away; the number is negative, as in transformers."""
        self.rows = [row.shorter(abs(tokens_to_remove)) for row in self.rows]

    def reorder_cache(self, beam_idx: Int[Tensor, " B"]) -> None:
        """Make row k what row beam_idx[k] was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.rows = [row for row in self.rows for _ in range(repeats)]

    def batch_select_indices(self, indices: Int[Tensor, " B"] | Bool[Tensor, " B"]) -> None:
        """Select some rows, in that order."""
        if self.rows:
            self.rows = [self.rows[k] for k in torch.arange(len(self.rows))[indices.cpu()].tolist()]


class ByteCache(Cache):
    """One layer for each member, so that reordering, cropping and resetting reach them all."""

    lagging = False

    def __init__(self, n: int) -> None:
        self.members = [RowsRead() for _ in range(n)]
        super().__init__(layers=list(self.members))
