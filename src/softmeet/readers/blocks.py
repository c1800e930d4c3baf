"""Blocks of keys and values, the seats of texts in them, and one call of a model on new tokens of some seats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from softmeet.readers.masks import Masks

# Of a text's tokens, the columns of their keys and values, first to last.
Path = np.ndarray[Any, np.dtype[np.int64]]
NOTHING: Path = np.empty(0, np.int64)


class Place(NamedTuple):
    """Where a layer's keys or values are: (the number of the tensor, the number of its part)."""

    tensor: int
    part: int


@dataclass(eq=False)
class Seat:
    """The place of one text's keys and values.

    Attributes:
        block: the block; None before the first token.
        slot: its row there.
    """

    block: Block | None = None
    slot: int = 0
    _path: Path = field(default_factory=lambda: NOTHING)

    @property
    def path(self) -> Path:
        """The columns of its tokens, (tokens,), ascending."""
        if self.block is not None and self.block.late:
            self.block.catch_up()
        return self._path

    @path.setter
    def path(self, columns: Path) -> None:
        if self.block is not None:
            self.block.change()
        self._path = columns

    @property
    def length(self) -> int:
        """The number of tokens that were run."""
        return len(self.path)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of these tokens."""
        return () if self.block is None else tuple(self.block.ids[self.slot, self.path].tolist())

    @property
    def is_whole(self) -> bool:
        """Whether the tokens' columns stand side by side, up to the last that is in use."""
        path, end = self.path, 0 if self.block is None else self.block.end
        return not len(path) or (int(path[0]), int(path[-1])) == (end - len(path), end - 1)

    def follow(self, count: int) -> None:
        """Make the last ``count`` columns in use its own."""
        assert self.block is not None
        end = self.block.end
        self._path = np.concatenate((self._path, np.arange(end - count, end)))


class Block:
    """Slots of keys and values of one model.

    Attributes:
        tensors: for each shape of keys or values, (parts, slots, heads, columns, width); none before the model's first
            call.
        slots, columns: how many there are, free ones included.
        end: the number of the first column that is free in all slots.
        ids: (slots, columns), the tokens that were run.
        seats: all that are in the block.
        late: how many of the last columns all seats have that their paths do not list yet.
        looked: how many seats there were, at most, since it was looked whether the block is too large.
        steady: what is kept between calls in which all seats get one token more; None if there is nothing to keep.
    """

    def __init__(self, tensors: Sequence[Tensor], slots: int, columns: int, end: int) -> None:
        self.tensors, self.slots, self.columns, self.end = list(tensors), slots, columns, end
        self.ids = np.zeros((slots, columns), np.int64)
        self.seats = list[Seat]()
        self.late = self.looked = 0
        self.steady: Any = None

    def catch_up(self) -> None:
        """Have all seats' paths list the columns that are late."""
        count, self.late = self.late, 0
        for seat in self.seats if count else ():
            seat.follow(count)

    def paths(self) -> list[Path]:
        """Return the paths of all seats."""
        self.catch_up()
        return [seat._path for seat in self.seats]

    def change(self) -> None:
        """Take note that seats or columns change otherwise than by one token more of each."""
        if self.late:
            self.catch_up()
        self.steady = None

    @property
    def bytes(self) -> int:
        """The bytes of all slots, in use or not."""
        return sum(one.nbytes for one in self.tensors)


class InPlace(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values of the first slots; a call of the model writes new columns behind all others.

    Args:
        block: the block.
        place: where the layer's keys and its values are.
        slots: how many of the first.
        first: the first column that is on a path.
    """

    def __init__(self, block: Block, place: tuple[Place, Place], slots: int, first: int) -> None:
        super().__init__()
        self.block, self.first = block, first
        (own, part), (other, another) = place
        self.keys, self.values = block.tensors[own][part, :slots], block.tensors[other][another, :slots]
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values, and return those of all columns."""
        end = self.block.end
        stop = end + key_states.shape[2]
        self.keys[:, :, end:stop] = key_states
        self.values[:, :, end:stop] = value_states
        return self.keys[:, :, self.first : stop], self.values[:, :, self.first : stop]

    def get_seq_length(self) -> int:
        """Return the number of columns before the new ones."""
        return self.block.end - self.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (the width of the attention mask for ``query_length`` new tokens; its first column, 0)."""
        return self.block.end - self.first + query_length, 0


class Call:
    """One call of the model on new tokens of some seats of a block.

    Attributes:
        ids, depths: (slots, new), the new tokens, at the right, and their positions; 0 at padding.
        columns: for each seat, the columns of its new tokens.
    """

    def __init__(
        self,
        block: Block,
        seats: Sequence[Seat],
        tokens: Sequence[Sequence[int]],
        slots: dict[int, list[int]],
        new: int,
    ) -> None:
        self._block, self._seats, self._slots = block, seats, slots
        self._many = 1 + max([seat.slot for seat in block.seats])
        self._first = min([int(own[0]) for own in block.paths() if len(own)], default=block.end)
        self.ids, self.depths = np.zeros((2, self._many, new), np.int64)
        self.columns = [NOTHING] * len(seats)
        every, ahead = np.arange(block.end, block.end + new), np.arange(new)
        for slot, own in slots.items():
            at = new - sum(len(tokens[k]) for k in own)
            for k in own:
                begin, at = at, at + len(tokens[k])
                self.ids[slot, begin:at] = tokens[k]
                self.depths[slot, begin:at] = ahead[: at - begin] + seats[k].length
                self.columns[k] = every[begin:at]

    def layer(self, place: tuple[Place, Place]) -> Any:
        """Return a layer's cache, of the slots in use."""
        return InPlace(self._block, place, self._many, self._first)

    def mask(self, masks: Masks) -> Any:
        """Return the attention mask: of columns at the left where that is all, else of each new token's own."""
        end, (_, new) = self._block.end, self.ids.shape
        alone = all(len(own) == 1 for own in self._slots.values())
        pairs = list(zip(self._seats, self.columns, strict=True))
        # Padding among the new tokens would attend to nothing, which is NaN where a softmax is of less precision.
        if alone and all(len(own) == new and seat.is_whole for seat, own in pairs):
            starts = np.full(self._many, end)
            starts[[seat.slot for seat in self._seats]] = [
                int((seat.path if seat.length else own)[0]) for seat, own in pairs
            ]
            return torch.from_numpy(np.arange(self._first, end + new) >= starts[:, None]).long()
        width = end + new - self._first
        allowed = np.zeros((self._many, new, width), bool)
        depths = np.zeros((self._many, width), np.int64)
        # Every token attends to itself; padding too, since a softmax over nothing is NaN.
        allowed[:, np.arange(new), width - new + np.arange(new)] = True
        for seat, own in pairs:
            path, count = seat.path - self._first, len(own)
            first, at = int(own[0]) - end, int(own[0]) - self._first
            depths[seat.slot, path] = np.arange(len(path))
            depths[seat.slot, at : at + count] = np.arange(len(path), len(path) + count)
            rows = allowed[seat.slot, first : first + count]
            rows[:, path] = True
            if count > 1:
                rows[:, at : at + count] = np.tri(count, dtype=bool)
        return masks.of(allowed, depths)
