"""Blocks of keys and values, the seats of texts in them, and one call of a model on new tokens of some seats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softmeet.members.placement import home
from softmeet.members.trunk import Trunk

Depths = Int[np.ndarray, "B k"]
Allowed = Bool[np.ndarray, "B q k"]


def empty_cache(model: PreTrainedModel) -> Cache:
    """Return a cache that keeps the keys and values of all tokens, those behind windows too."""
    return Cache(layers=[DynamicLayer() for _ in DynamicCache(config=model.config).layers])


class Masks:
    """Makes the attention masks of a model, which has to stay on its device and in its dtype.

    Args:
        model: a causal LM.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        self._place, self._dtype = home(model), next(model.parameters()).dtype
        self._window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self._kinds = getattr(config, "layer_types", None)

    def padding(self, real: Bool[np.ndarray, "B k"]) -> Float[Tensor, "B 1 1 k"] | None:
        """Make the additive mask of one new token of each text, in columns of which some are no token's.

        Args:
            real: which columns are a token's of its text.

        Returns:
            the mask, as :meth:`of` has it; None where a window may matter among so many columns.
        """
        if self._window is not None and real.shape[1] >= self._window:
            return None
        return self._additive(real[:, None])

    def of(self, allowed: Allowed, depths: Depths) -> Any:
        """Make the additive mask, (B, 1, queries, keys); a dict of one by kind of layer if windows matter.

        Args:
            allowed: which columns, the new ones last, each new token attends to, (B, queries, keys).
            depths: the position of each column's token in its text, (B, keys).
        """
        full, new = self._additive(allowed), depths[:, -allowed.shape[1] :]
        if self._window is None or new.max() < self._window:
            return full
        narrow = self._additive(allowed & (new[:, :, None] - depths[:, None, :] < self._window))
        return narrow if self._kinds is None else {"full_attention": full, "sliding_attention": narrow}

    def _additive(self, allowed: Allowed) -> Float[Tensor, "B 1 q k"]:
        forbidden = torch.from_numpy(~allowed[:, None])
        mask = torch.zeros(forbidden.shape, dtype=self._dtype)
        return mask.masked_fill_(forbidden, torch.finfo(self._dtype).min).to(self._place)


# Of a text's tokens, the columns of their keys and values, first to last.
Path = np.ndarray[Any, np.dtype[np.int64]]
NOTHING: Path = np.empty(0, np.int64)
# The most columns of a slot, for each of its longest text and beside these, before texts that part get slots of their
# own.
_MANY, _MORE = 2, 64
# How many slots may be run, and columns beside a few be read, for each that is needed, before these are copied for the
# call: what is copied is read and written before the call reads it.
_VAIN, _ASIDE, _BESIDE = 1.25, 3, 64
# How many columns texts that share a row may have together, if none has more by itself.
_ROW = 512


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
        return len(self._path) + (self.block.late if self.block is not None else 0)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of these tokens."""
        return () if self.block is None else tuple(self.block.ids[self.slot, self.path].tolist())

    @property
    def is_whole(self) -> bool:
        """Whether the tokens' columns stand side by side, up to the last that is in use."""
        path, end = self.path, 0 if self.block is None else self.block.end
        return not len(path) or (int(path[0]), int(path[-1])) == (end - len(path), end - 1)


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
        in_place: what the last call in place has made of the layers, with its (slots, first column); None to make it
            anew.
        steady: what is kept between calls in which all seats get one token more; None if there is nothing to keep.
    """

    def __init__(self, tensors: Sequence[Tensor], slots: int, columns: int, end: int) -> None:
        self.tensors, self.slots, self.columns, self.end = list(tensors), slots, columns, end
        self.ids = np.zeros((slots, columns), np.int64)
        self.seats = list[Seat]()
        self.late = self.looked = 0
        self.steady: Any = None
        self.in_place: tuple[tuple[int, int], list[InPlace]] | None = None

    def catch_up(self) -> None:
        """Have all seats' paths list the columns that are late."""
        columns, self.late = np.arange(self.end - self.late, self.end), 0
        for seat in self.seats if len(columns) else ():
            seat._path = np.concatenate((seat._path, columns))

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


class Apart(InPlace):
    """One layer's keys and values of some slots, each of columns of its own, copied for a call of the model.

    Args:
        block: the block, behind whose columns the call writes.
        place: where the layer's keys and its values are.
        call: the call.
    """

    def __init__(self, block: Block, place: tuple[Place, Place], call: Call) -> None:
        super().__init__(block, place, block.slots, block.end - call.wide)
        self._cells_of = call.cells_of

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values, and return these behind those of the columns."""
        found, new = list[Tensor](), key_states.shape[2]
        for known, states in ((self.keys, key_states), (self.values, value_states)):
            cells, flat, width = self._cells_of(known), known.view(-1, known.shape[-1]), known.shape[-1]
            flat[cells[:, :, -new:].reshape(-1)] = states.reshape(-1, width)
            found.append(flat.index_select(0, cells.view(-1)).view(*cells.shape, width))
        return found[0], found[1]


def by_slot(seats: Sequence[Seat]) -> dict[int, list[int]]:
    """Return, for each slot, the numbers of the seats that are in it."""
    slots = defaultdict[int, list[int]](list)
    for k, seat in enumerate(seats):
        slots[seat.slot].append(k)
    return slots


def union(paths: Sequence[Path]) -> Path:
    """Return the columns that are on some path, ascending."""
    return paths[0] if len(paths) == 1 else np.unique(np.concatenate(paths))


def parted(seats: list[Seat]) -> list[list[Seat]]:
    """Return seats of one slot in groups: those apart of which each would attend past more columns than are its own."""
    longest = max((seat.path for seat in seats), key=len)
    if len(union([seat.path for seat in seats])) <= _MANY * len(longest) + _MORE:
        return [seats]
    common = min(_common(seat.path, longest) for seat in seats)
    groups = defaultdict[int, list[Seat]](list)
    for seat in seats:
        path = seat.path if seat.length > common else longest
        groups[int(path[common])].append(seat)
    return [part for group in groups.values() for part in parted(group)]


def _common(path: Path, longest: Path) -> int:
    """Return at how many first columns a path is as a longer one; that one's last at most, if it is all of the path."""
    other = np.flatnonzero(path != longest[: len(path)])
    return int(other[0]) if len(other) else len(longest) - 1


def copy_path(source: Block, slot: int, columns: Path, target: Block, into: int) -> None:
    """Copy columns of a slot to the last columns in use of another block's slot."""
    end, count = target.end, len(columns)
    if not count:
        return
    side_by_side = columns[-1] - columns[0] == count - 1
    where: Any = slice(int(columns[0]), int(columns[-1]) + 1) if side_by_side else torch.from_numpy(columns)
    target.ids[into, end - count : end] = source.ids[slot, columns]
    for one, other in zip(source.tensors, target.tensors, strict=True):
        other[:, into, :, end - count : end] = one[:, slot, :, where if side_by_side else where.to(one.device)]


def lay_out(block: Block, cache: Cache) -> list[tuple[Place, Place]]:
    """Put what a model's first call has written into a block, and return where each layer's keys and values are."""
    groups, layout = dict[Any, list[Tensor]](), []
    for layer in cache.layers:
        pair = []
        for part in (layer.keys, layer.values):
            kind = part.shape[1], part.shape[3], part.dtype, part.device
            own = groups.setdefault(kind, [])
            pair.append(Place(list(groups).index(kind), len(own)))
            own.append(part)
        layout.append((pair[0], pair[1]))
    for one in map(torch.stack, groups.values()):
        parts, slots, heads, new, width = one.shape
        whole = one.new_zeros(parts, slots, heads, block.columns, width)
        whole[:, :, :, block.end : block.end + new] = one
        block.tensors.append(whole)
    return layout


def packed(tokens: Mapping[int, int], behind: Mapping[int, int]) -> list[list[int]]:
    """Return slots in rows, so that few new tokens are padding.

    Args:
        tokens: for each slot the number of its new tokens; a row has as many as that with the most.
        behind: for each slot, how many columns these attend to; a row has few more than the slot with the most.
    """
    new, wide = max(tokens.values()), max(_ROW, *behind.values())
    rows, left, room = list[list[int]](), 0, 0
    for slot in sorted(tokens, key=lambda slot: -tokens[slot]):
        if tokens[slot] > left or behind[slot] > room:
            rows.append([])
            left, room = new, wide
        rows[-1].append(slot)
        left, room = left - tokens[slot], room - behind[slot]
    return rows


class Call:
    """One call of the model on new tokens of some seats of a block.

    Args:
        block: the block.
        seats: of the texts.
        tokens: of each, the new ones, at least one.
        mixed: whether slots may share a row, in which a text that has no numbers takes them from the others.

    Attributes:
        block: as given.
        new: the number of columns that the new tokens take, at most, of a slot.
        ids, depths: (rows, new), the new tokens, at the right, and their positions; 0 at padding.
        columns: for each seat, the columns of its new tokens.
        places: for each seat, (the row of its new tokens; which of that row's is the first).
        at_the_end: whether each seat's new tokens are the last of a row.
        wide: how many columns the call reads before the new ones.
        is_mixed: whether slots share a row.
    """

    def __init__(
        self, block: Block, seats: Sequence[Seat], tokens: Sequence[Sequence[int]], *, mixed: bool = True
    ) -> None:
        slots, new_of, paths = by_slot(seats), list(map(len, tokens)), [seat.path for seat in seats]
        counts = {slot: sum(new_of[k] for k in own) for slot, own in slots.items()}
        self.block, self._seats, self._paths, self.new = block, seats, paths, (new := max(counts.values()))
        first = min([int(path[0]) for path in paths if len(path)], default=block.end)
        # Padding among the new tokens would attend to nothing, which is NaN where a softmax is of less precision.
        self._whole = len(slots) == len(seats) and min(new_of) == new and all(seat.is_whole for seat in seats)
        self._behind = {slot: union([paths[k] for k in own]) for slot, own in slots.items()}
        needed, many = {slot: len(own) for slot, own in self._behind.items()}, 1 + max(slots)
        rows = packed(counts, needed) if mixed else [[slot] for slot in slots]
        # What is run in vain costs more than a copy of what is not; a first call tells how keys and values look.
        vain = many > _VAIN * len(rows) or block.end - first > _ASIDE * max(needed.values()) + _BESIDE
        self._apart = vain and bool(block.tensors)
        if not self._apart:
            rows = [[slot] * (slot in slots) for slot in range(many)]
            self._behind = dict.fromkeys(slots, np.arange(first, block.end))
            needed = dict.fromkeys(slots, block.end - first)
        self._rows, self._bases = rows, dict[int, int]()
        self._cells = dict[Any, Tensor]()
        self.wide = max(sum(needed[slot] for slot in own) for own in rows)
        self.at_the_end, self.is_mixed = len(seats) == sum(map(bool, rows)), max(map(len, rows)) > 1
        self.ids, self.depths = np.zeros((2, len(rows), new), np.int64)
        self.columns, self.places = [NOTHING] * len(seats), [(0, 0)] * len(seats)
        every, ahead = np.arange(block.end, block.end + new), np.arange(new)
        for row, together in enumerate(rows):
            base, at = self.wide, new - sum(counts[slot] for slot in together)
            for slot in reversed(together):
                base = self._bases[slot] = base - needed[slot]
            for slot in together:
                column = new - counts[slot]
                for k in slots[slot]:
                    (begin, at), (start, column) = (at, at + new_of[k]), (column, column + new_of[k])
                    self.ids[row, begin:at] = tokens[k]
                    self.depths[row, begin:at] = ahead[: new_of[k]] + len(paths[k])
                    self.columns[k], self.places[k] = every[start:column], (row, begin)

    def layers(self, layout: Sequence[tuple[Place, Place]]) -> list[Any]:
        """Return the layers' caches, of what the call reads."""
        block = self.block
        if self._apart:
            return [Apart(block, place, self) for place in layout]
        where = len(self._rows), block.end - self.wide
        if block.in_place is None or block.in_place[0] != where:
            block.in_place = where, [InPlace(block, place, *where) for place in layout]
        return block.in_place[1]

    def cells_of(self, known: Float[Tensor, "slots heads columns d"]) -> Int[Tensor, "rows heads k"]:
        """Return which cells of keys or values the call reads, counted through slots, heads and columns, new ones last.

        Those at the left of a row that has fewer than others are any; padding among the new ones has free ones.
        """
        (heads, many), place, end = known.shape[1:3], known.device, self.block.end
        if (found := self._cells.get((heads, place))) is not None:
            return found
        slots, columns = np.zeros((2, len(self._rows), 1, self.wide + self.new), np.int64)
        for row, together in enumerate(self._rows):
            slots[row] = together[0]
            columns[row, 0, self.wide :] = np.arange(end, end + self.new)
            for slot in together:
                at = slice(self._bases[slot], self._bases[slot] + len(self._behind[slot]))
                slots[row, 0, at], columns[row, 0, at] = slot, self._behind[slot]
        for seat, own, (row, begin) in zip(self._seats, self.columns, self.places, strict=True):
            at = slice(self.wide + begin, self.wide + begin + len(own))
            slots[row, 0, at], columns[row, 0, at] = seat.slot, own
        found = torch.from_numpy((slots * heads + np.arange(heads)[:, None]) * many + columns).to(place)
        return self._cells.setdefault((heads, place), found)

    def mask(self, masks: Masks) -> Any:
        """Return the attention mask: none for one text, of columns at the left, or of those that each token sees."""
        many, new, width = len(self._rows), self.new, self.wide + self.new
        if self._whole and many == 1:
            return None
        if self._whole:
            starts = np.full(many, self.wide)
            for path, (row, _) in zip(self._paths, self.places, strict=True):
                starts[row] -= len(path)
            return torch.from_numpy(np.arange(width) >= starts[:, None]).long()
        allowed = np.zeros((many, new, width), bool)
        depths = np.zeros((many, width), np.int64)
        # Every token attends to itself; padding too, since a softmax over nothing is NaN.
        allowed[:, np.arange(new), width - new + np.arange(new)] = True
        each = zip(self._seats, self._paths, self.columns, self.places, strict=True)
        for seat, known, own, (row, first) in each:
            count = len(own)
            path = self._bases[seat.slot] + np.searchsorted(self._behind[seat.slot], known)
            at = self.wide + first
            depths[row, path] = np.arange(len(known))
            depths[row, at : at + count] = np.arange(len(known), len(known) + count)
            mine = allowed[row, first : first + count]
            mine[:, path] = True
            if count > 1:
                mine[:, at : at + count] = np.tri(count, dtype=bool)
        return masks.of(allowed, depths)


class Steady:
    """The texts of a block, of which every call runs one token more.

    Args:
        trunk: the model.
        block: the block, in which all of these texts are, and no other.
        seats: of the texts, each whole and in a slot of its own.
        layout: for each layer where its keys and values are.
        masks: returns what makes the model's attention masks; None if it takes the mask of padding alone.

    Attributes:
        seats: as given.
    """

    def __init__(
        self,
        trunk: Trunk,
        block: Block,
        seats: Sequence[Seat],
        layout: Sequence[tuple[Place, Place]],
        masks: Callable[[], Masks | None],
    ) -> None:
        self._trunk, self._block, self.seats = trunk, block, list(seats)
        self._slots = [seat.slot for seat in seats]
        many, first = 1 + max(self._slots), min(int(seat.path[0]) for seat in seats)
        self._first, self._ids = first, [[0] for _ in range(many)]
        self._mask = torch.ones(many, block.columns - first, dtype=torch.long)
        self._mask[:, : block.end - first] = 0
        self._positions = torch.zeros(many, 1, dtype=torch.long)
        for seat in seats:
            self._mask[seat.slot, int(seat.path[0]) - first :] = 1
            self._positions[seat.slot] = seat.length
        # As transformers has it, no mask where nothing is padding.
        self._padded = not bool(self._mask.all())
        made = masks() if self._padded else None
        if made is not None and (whole := made.padding(self._mask.bool().numpy())) is not None:
            # Of a mask of padding each call would make this one anew.
            self._mask = whole
        self._in_order = self._slots == list(range(many))
        self._cache = Cache(layers=[InPlace(block, place, many, first) for place in layout])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor | None:
        """Run one token more of each text, in one call of the model.

        Returns:
            (texts, d), the last hidden states; None if there is no room, or they are not finite: then nothing was run.
        """
        block, ids = self._block, self._ids
        if block.end == block.columns:
            return None
        for slot, token in zip(self._slots, tokens, strict=True):
            ids[slot][0] = token
        mask = self._mask[..., : block.end + 1 - self._first] if self._padded else None
        (states,) = self._trunk(
            torch.tensor(ids), cache=self._cache, use_cache=True, attention_mask=mask, position_ids=self._positions
        ).unbind(1)
        if not self._in_order:
            states = states[self._slots]
        # 0 · NaN and 0 · ∞ are no numbers, which is told faster than by isfinite.
        if not bool((states * 0).sum() == 0):
            return None
        block.ids[self._slots, block.end] = tokens
        block.end += 1
        block.late += 1
        self._positions = self._positions + 1
        return states
