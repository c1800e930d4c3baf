"""Texts that are read on together, each by one token more in every call of the model, as while they are written.

What a call needs, keys and values apart, is kept from one to the next: the mask of padding, positions, the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache

from softmeet.members.trunk import Trunk
from softmeet.readers.blocks import Block, InPlace, Place, Seat
from softmeet.readers.masks import Masks


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
