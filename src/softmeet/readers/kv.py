"""Keys and values of many texts of one model, in blocks that are read on in place.

A *block* has *slots*, the rows of a call of the model, and columns, one for each token that was run in a slot.
A *seat* is a text's place in it: its slot and its *path*, the columns of its tokens. Texts that begin alike share the
columns of their beginning in one slot; a text of its own has a slot of its own, whose path ends at the block's last
column, as in left-padded batches. So forking copies nothing, taking back shortens a path, and reading on writes new
columns behind all others.

Texts of different blocks that are read in one call are brought into one block, where they stay.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.members.trunk import Trunk, last_hidden, require_cache
from softmeet.readers.blocks import (
    NOTHING,
    Block,
    Call,
    Masks,
    Path,
    Place,
    Seat,
    Steady,
    by_slot,
    copy_path,
    empty_cache,
    lay_out,
    parted,
    union,
)
from softmeet.suspended import Done, finished

# The most tokens of one text that the model runs at once.
PIECE = 256
# Free columns of a block that is made: at least so many, and one for every so many in use.
_ROOM, _SHARE = 64, 2
# The most slots that are run for each text that is read: beyond, some are run in vain for too little.
_FEW = 2
# Times the slots or the columns that are in use, from which a block is made anew when a text leaves it.
_TOO_MANY = 4
# Kinds of layers, by their names in configurations, that read a tree of tokens by masks.
_KINDS = {"full_attention", "sliding_attention", "global"}
# What a model is checked on: a trunk, and after it a chain beside another; and the relative error of rounding at most.
_TRUNK, _OTHER, _CHAIN, _NEAR = range(3), range(3, 11), (11, 12), 1e-3


class KeysAndValues:
    """The keys and values of all texts that one model reads.

    Args:
        model: a causal LM, in evaluation mode, whose cache holds keys and values alone.
        at_once: whether :meth:`read` runs all new tokens of all texts in one call, however many they are; for models
            that read trees.
    """

    def __init__(self, model: PreTrainedModel, *, at_once: bool = False) -> None:
        self._model, self._at_once = model, at_once
        self._layout, self._likes = list[tuple[Place, Place]](), list[Tensor]()
        self._blocks = list[Block]()

    @cached_property
    def _trunk(self) -> Trunk:
        return Trunk(self._model)

    @cached_property
    def _masks(self) -> Masks:
        return Masks(self._model)

    @cached_property
    def reads_trees(self) -> bool:
        """Whether the model reads each path of a tree of tokens as it reads that path by itself; tried when it matters.

        Without it each text has a slot of its own, and only texts of which equally many tokens are new may be run in
        one call.
        """
        try:
            if not self._at_once:
                require_trees(self._model)
        except InvalidInputError:
            return False
        return True

    def _tree_masks(self) -> Masks | None:
        """Return what makes the model's attention masks; None if it takes the mask of padding alone."""
        return self._masks if self.reads_trees else None

    @property
    def bytes(self) -> int:
        """The bytes of all blocks."""
        return sum(block.bytes for block in list(self._blocks))

    def forget_layout(self) -> None:
        """Forget the shapes, dtypes and devices of keys and values, which the model's next call tells."""
        self._layout, self._likes = [], []
        for made in ("_trunk", "_masks"):
            vars(self).pop(made, None)

    def leave(self, seat: Seat) -> None:
        """Give a seat up; a block without seats is given back, one that is far too large for the others made anew."""
        block, gone = seat.block, seat.length
        if block is None:
            return
        block.looked = max(block.looked, len(block.seats))
        self._out(seat)
        if not (left := len(block.seats)):
            return
        # To look at all others each time that one of many leaves would take longer than what it saves.
        is_seen = block.slots <= _TOO_MANY or block.looked < 2 * left
        if gone <= _TOO_MANY * _ROOM and is_seen:
            return
        block.looked = len(block.seats)
        longest = max(other.length for other in block.seats)
        slots = len({other.slot for other in block.seats})
        if gone > _TOO_MANY * (longest + _ROOM) or block.slots > _TOO_MANY * slots:
            self._rebuild(block, 0, 0, 0)

    def _out(self, seat: Seat) -> None:
        if (block := seat.block) is not None:
            block.change()
            block.seats.remove(seat)
            if not block.seats:
                self._blocks.remove(block)
                block.in_place = None  # which refers to the block
        seat.block, seat.path = None, NOTHING

    def fork(self, seat: Seat) -> Seat:
        """Return another seat of the same tokens."""
        other = Seat(seat.block, seat.slot, seat.path)
        if seat.block is not None:
            seat.block.change()
            seat.block.seats.append(other)
        return other

    @torch.inference_mode()
    def alone(self, seat: Seat, length: int, *, kept: bool = False) -> Seat:
        """Return another seat of the first ``length`` tokens, in a block of its own, so that it keeps no other's.

        If it is ``kept``, and not read on, there is no room for more.
        """
        other = Seat(None, 0, seat.path[:length])
        if seat.block is not None and length:
            other.block = self._new(1, length, 0, room=not kept)
            copy_path(seat.block, seat.slot, other.path, other.block, 0)
            other.path = np.arange(length)
            other.block.seats.append(other)
        return other

    @torch.inference_mode()
    def run(
        self, seats: Sequence[Seat], tokens: Sequence[Sequence[int]], last: int | None = None
    ) -> list[tuple[Path, Float[Tensor, "t d"]]]:
        """Run new tokens of some texts, in one call of the model.

        Args:
            seats: of each text.
            tokens: of each, the ids that follow, at least one.
            last: of a model whose logits stand in for its hidden states, at how many last tokens of each text these are
                enough; None for all.

        Returns:
            for each, (the columns of its new tokens, for :meth:`keep`; the last hidden states at them, or the last).
        """
        block = self._together(seats)
        block.change()
        new = max(sum(len(tokens[k]) for k in own) for own in by_slot(seats).values())
        # Other models count columns, in which there must be no hole.
        holes = not self._at_once and any(seat.length and not seat.is_whole for seat in seats) and not self.reads_trees
        if holes or block.end + new > block.columns:
            self._rebuild(block, 0, 0, new)
        call = Call(block, seats, tokens)
        hidden = self._states(call, last)
        if call.is_mixed and not bool(hidden.isfinite().all()):
            call = Call(block, seats, tokens, mixed=False)
            hidden = self._states(call, last)
        block.end += call.new
        left, found = call.new - hidden.shape[1], []
        for seat, own, columns, (row, first) in zip(seats, tokens, call.columns, call.places, strict=True):
            block.ids[seat.slot, columns] = own
            found.append((columns, hidden[row, max(first - left, 0) : first - left + len(own)]))
        return found

    def _states(self, call: Call, last: int | None) -> Float[Tensor, "rows k d"]:
        """Make a call of the model, and return the last hidden states, perhaps of the last few tokens of rows alone."""
        cache = Cache(layers=call.layers(self._layout)) if self._layout else empty_cache(self._model)
        few = slice(None) if last is None or not call.at_the_end else slice(-last, None)
        inputs = {"attention_mask": call.mask(self._masks), "position_ids": torch.from_numpy(call.depths)}
        hidden = self._trunk(torch.from_numpy(call.ids), few, cache=cache, use_cache=True, **inputs)
        if not self._layout:
            self._layout = lay_out(call.block, cache)
            self._likes = [one[:, :0, :, :0].clone() for one in call.block.tensors]
        return hidden

    def step(self, seats: list[Seat], tokens: Sequence[int]) -> Float[Tensor, "texts d"] | None:
        """Run one token more of each of some texts and keep it, with less ado; return the last hidden states.

        None is returned, and nothing run, unless they are alone in a block, each whole, with room, and states finite.
        """
        if (block := seats[0].block) is None:
            return None
        if block.steady is None or block.steady.seats != seats:
            slots = {seat.slot for seat in seats if seat.block is block}
            alone = len(block.seats) == len(seats) == len(slots) and max(slots) < _FEW * len(slots)
            if not alone or not all(seat.length and seat.is_whole for seat in seats):
                return None
            block.change()
            block.steady = Steady(self._trunk, block, seats, self._layout, self._tree_masks)
        found: Tensor | None = block.steady.step(tokens)
        return found

    def read(
        self, rows: Sequence[tuple[Seat, Sequence[int]]], last: int | None = None
    ) -> Generator[Done, None, tuple[list[Float[Tensor, "t d"]], int]]:
        """Run new tokens of texts and keep them: all at once, or those of about equally many in one call, in pieces.

        The generator yields between calls, and before the first of several pieces; other texts may be run there.

        Args:
            rows: for each text (its seat; the ids that follow, at least one).
            last: as of :meth:`run`, at the end of each piece.

        Returns:
            (for each, the last hidden states at these tokens, (t, d), or at the last of them; the number of calls).
        """
        found, left, calls = defaultdict[int, list[Tensor]](list), dict(enumerate(rows)), 0
        total = sum(len(own) for _, own in rows)
        most = sys.maxsize if self._at_once else PIECE
        if any(len(own) > most for _, own in rows):
            yield 0, total
        while left:
            counts = {k: min(len(own), most) for k, (_, own) in left.items()}
            groups = defaultdict[int, list[int]](list)
            ragged = len({*counts.values()}) > 1 and self.reads_trees
            for k, count in counts.items():
                # Beside one of less than twice as many tokens, no text is padded to more than twice its length.
                groups[0 if self._at_once else count.bit_length() if ragged else count].append(k)
            for own in groups.values():
                pieces = [left[k][1][:most] for k in own]
                ran = self.run([left[k][0] for k in own], pieces, last)
                calls += 1
                for k, piece, (columns, states) in zip(own, pieces, ran, strict=True):
                    seat, tokens = left.pop(k)
                    self.keep(seat, columns)
                    found[k].append(states)
                    if rest := tokens[len(piece) :]:
                        left[k] = seat, rest
            if left:
                yield total - sum(len(own) for _, own in left.values()), total
        parts = [found[k] for k in range(len(rows))]
        return [own[0] if len(own) == 1 else torch.cat(own) for own in parts], calls

    def keep(self, seat: Seat, columns: Path) -> None:
        """Put the columns of tokens that were run behind a seat's path."""
        seat.path = np.concatenate((seat.path, columns))

    def crop(self, seat: Seat, length: int) -> None:
        """Take back the tokens behind the first ``length``; in a block of its own, their columns can be used again."""
        seat.path = seat.path[:length]
        if (block := seat.block) is not None and len(block.seats) == 1:
            block.end = int(seat.path[-1]) + 1 if length else 0

    @torch.inference_mode()
    def drop(self, seat: Seat, columns: Path) -> None:
        """Clear what a text does not get of a call, since what was computed there is no number: 0 · NaN would be NaN.

        Args:
            seat: the text's.
            columns: those of its new tokens; all others in its slot that no text has are cleared, too.
        """
        if (block := seat.block) is None or not len(columns):
            return
        others = [other.path for other in block.seats if other.slot == seat.slot and other is not seat]
        kept = union([*others, seat.path[: -len(columns)]])
        every = torch.from_numpy(np.setdiff1d(np.arange(block.end), kept))
        for one in block.tensors:
            one[:, seat.slot, :, every.to(one.device)] = 0

    def _together(self, seats: Sequence[Seat]) -> Block:
        """Bring the seats that are to be run together into one block, that in which most of them are.

        Texts that share a slot with one of them come along.
        """
        for seat in seats:
            if not seat.length:  # it may have a slot in a block that the model has never been run on
                self._out(seat)
        blocks = [seat.block for seat in seats if seat.block is not None]
        places = {(seat.block, seat.slot) for seat in seats if seat.block}
        texts = len(places) + len(seats) - len(blocks)
        texts = texts if texts == len(seats) or self.reads_trees else len(seats)
        target = Counter(blocks).most_common(1)[0][0] if blocks else self._new(texts, 0, 0)
        if groups := self._newcomers(seats, target):
            self._adopt(target, groups)
        return target

    def _newcomers(self, seats: Sequence[Seat], target: Block) -> list[list[Seat]]:
        """Return the groups of seats that have to come into slots of a block before some seats are run there."""
        groups, seen = list[list[Seat]](), set[Any]()
        for seat in seats:
            place = seat.block, seat.slot
            if seat.block is None or (place in seen and not self.reads_trees):
                groups.append([seat])
            elif seat.block is not target and place not in seen:
                groups.append([one for one in seat.block.seats if one.slot == seat.slot])
            seen.add(place)
        return groups

    def _adopt(self, target: Block, groups: Sequence[Sequence[Seat]]) -> None:
        """Bring groups of seats, each of one slot, into free slots of a block."""
        longest = max(len(union([seat.path for seat in own])) for own in groups)
        free = sorted({*range(target.slots)} - {seat.slot for seat in target.seats})
        if len(free) < len(groups) or longest > target.end:
            taken = len(self._groups(target))
            self._rebuild(target, 1 << (taken + len(groups) - 1).bit_length(), longest, 0)
            free = list(range(taken, target.slots))
        for slot, own in zip(free, groups, strict=False):
            columns = union([seat.path for seat in own])
            for one in target.tensors:
                one[:, slot] = 0
            if (source := own[0].block) is not None:
                copy_path(source, own[0].slot, columns, target, slot)
            for seat in own:
                path = target.end - len(columns) + np.searchsorted(columns, seat.path)
                self._out(seat)
                seat.block, seat.slot, seat.path = target, slot, path
                target.seats.append(seat)

    def _groups(self, block: Block) -> list[list[Seat]]:
        """Return the seats of a block in groups, each of which may have one slot."""
        groups = [[block.seats[k] for k in own] for own in by_slot(block.seats).values()]
        if len(groups) < len(block.seats) and not self.reads_trees:
            return [[seat] for seat in block.seats]
        return [part for group in groups for part in parted(group)]

    @torch.inference_mode()
    def _rebuild(self, block: Block, slots: int, end: int, new: int) -> None:
        """Make a block anew, without what no seat needs, with so many slots, and room for more columns.

        Args:
            block: the block.
            slots: at least so many slots.
            end: at least so many columns in use.
            new: the number of columns for which there has to be room.
        """
        groups = self._groups(block)
        needed = [union([seat.path for seat in group]) for group in groups]
        end = max([end, *map(len, needed)])
        made = self._new(max(slots, len(groups), 1), end, new)
        for slot, (group, columns) in enumerate(zip(groups, needed, strict=True)):
            copy_path(block, group[0].slot, columns, made, slot)
            for seat in group:
                seat.slot, seat.path = slot, end - len(columns) + np.searchsorted(columns, seat.path)
        block.change()
        block.tensors, block.slots, block.columns, block.end = made.tensors, made.slots, made.columns, made.end
        block.ids, block.in_place = made.ids, None
        self._blocks.remove(made)

    def _new(self, slots: int, end: int, new: int, *, room: bool = True) -> Block:
        """Make a block of zeros, with room for new columns."""
        columns = end + new + room * max(_ROOM, end // _SHARE)
        tensors = [like.new_zeros(like.shape[0], slots, like.shape[2], columns, like.shape[4]) for like in self._likes]
        block = Block(tensors, slots, columns, end)
        self._blocks.append(block)
        return block


@torch.inference_mode()
def require_trees(model: PreTrainedModel) -> None:
    """Check that a model reads each path of a tree of tokens as it reads that path by itself, on a few tokens.

    A tree is several texts that begin alike, whose common tokens are run once. Models whose attention counts columns
    (ALiBi) instead of positions do not read them so, nor those with recurrent layers, nor those with windows of which
    :class:`~softmeet.readers.blocks.Masks` does not know.

    Raises:
        InvalidInputError: if it does not.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())}
    said = f"it has layers of {', '.join(sorted(unknown))}" if (unknown := kinds - _KINDS) else ""
    trunk, other, chain = ([1 + token % (config.vocab_size - 1) for token in ids] for ids in (_TRUNK, _OTHER, _CHAIN))
    try:
        kv, seat = KeysAndValues(require_cache(model), at_once=True), Seat()
        finished(kv.read([(seat, trunk)]))
        fork = kv.fork(seat)
        fork.path = fork.path[:-1]
        _, (_, found) = kv.run([seat, fork], [other, chain])
        alone = last_hidden(model, torch.tensor([trunk[:-1] + chain]), use_cache=False)[0, -len(chain) :].float()
        near = max(_NEAR, 8 * torch.finfo(next(model.parameters()).dtype).eps)
        if not (found.float() - alone).norm() <= near * alone.norm():
            said = said or "what it reads depends on the order in which tokens were run"
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        said = said or f"{type(error).__name__}: {error}"
    if said:
        raise InvalidInputError(
            f"{type(model).__name__} cannot be read by bytes, since several tokenizations are read at once ({said}): "
            "combine it over tokens, with members that share its tokenizer"
        )
