"""Members that are behind: sequences whose newest tokens a member has not run, and catching up in one chunk.

Each sequence keeps its own keys and values, without padding, so that sequences may be behind by any number of tokens,
be copied as beams are, and be cut. To catch up, the states of several sequences are put side by side so that each ends
where its new tokens begin: padding is left of the states and right of the tokens, and no query that counts sees it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from softmeet.errors import InvalidInputError
from softmeet.members.huggingface import last_hidden

# Keys and values of one layer, each (1, heads, t, width).
Prefix = tuple[Float[Tensor, "1 h t w"], Float[Tensor, "1 h t w"]]
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


def layers_of_keys_and_values(name: str, config: PreTrainedConfig, what: str) -> int:
    """How many layers a member's cache has.

    Args:
        name, config: of the member.
        what: cannot be done, for the message.

    Raises:
        InvalidInputError: the cache holds something else than keys and values.
    """
    layers = DynamicCache(config=config).layers
    if other := sorted({type(layer).__name__ for layer in layers if type(layer) not in _KEYS_AND_VALUES}):
        raise InvalidInputError(
            f"expected members whose cache holds keys and values, but {name} has {', '.join(other)}: {what}"
        )
    return len(layers)


@dataclass(frozen=True)
class Trail:
    """One sequence as one member knows it: the states of what it has run, and the tokens that it has not."""

    states: tuple[Prefix, ...] = field(default=())
    pending: tuple[int, ...] = ()

    @property
    def run(self) -> int:
        """How many tokens the states are of."""
        return self.states[0][0].shape[2] if self.states else 0

    @property
    def length(self) -> int:
        """How many tokens there are, run or not."""
        return self.run + len(self.pending)

    def longer(self, tokens: Sequence[int]) -> Trail:
        """With more tokens that have not been run."""
        return replace(self, pending=(*self.pending, *tokens))

    def shorter(self, by: int) -> Trail:
        """Without the last tokens, run or not."""
        if by <= len(self.pending):
            return replace(self, pending=self.pending[: len(self.pending) - by])
        kept = self.run - (by - len(self.pending))
        return Trail(tuple((keys[:, :, :kept], values[:, :, :kept]) for keys, values in self.states if kept > 0))


def catch_up(model: PreTrainedModel, trails: Sequence[Trail]) -> tuple[list[Trail], list[Float[Tensor, "t d"]]]:
    """Run what each sequence has pending, each in one chunk; all of about the same length in one batch.

    Args:
        model: the member, in evaluation mode, whose cache holds keys and values.
        trails: at least one token of each is pending.

    Returns:
        (the sequences with nothing pending; the last hidden states at the tokens that were pending).
    """
    # Batched with one that is less than twice as long, no sequence is padded to more than twice its length.
    batches: dict[int, list[int]] = defaultdict(list)
    for k, trail in enumerate(trails):
        batches[len(trail.pending).bit_length()].append(k)
    found: dict[int, tuple[Trail, Float[Tensor, "t d"]]] = {}
    for rows in batches.values():
        found |= zip(rows, _run([trails[k] for k in rows], model), strict=True)
    return [found[k][0] for k in range(len(trails))], [found[k][1] for k in range(len(trails))]


def _run(trails: Sequence[Trail], model: PreTrainedModel) -> list[tuple[Trail, Float[Tensor, "t d"]]]:
    before = max(trail.run for trail in trails)
    new = max(len(trail.pending) for trail in trails)
    ids = torch.tensor([[*t.pending, *[t.pending[-1]] * (new - len(t.pending))] for t in trails])
    columns = torch.arange(before + new)
    runs = torch.tensor([[t.run] for t in trails])
    counts = torch.tensor([[len(t.pending)] for t in trails])
    mask = (columns >= before - runs) & (columns < before + counts)
    # A position past the last one might not exist.
    positions = runs + torch.minimum(torch.arange(new), counts - 1)
    cache = _joined(trails, before, len(DynamicCache(config=model.config).layers))
    hidden = last_hidden(
        model, ids, cache=cache, use_cache=True, attention_mask=mask.long(), position_ids=positions.clamp_min(0)
    )
    return [
        (Trail(_cut(cache, k, before - trail.run, before + len(trail.pending))), hidden[k, : len(trail.pending)])
        for k, trail in enumerate(trails)
    ]


def _joined(trails: Sequence[Trail], length: int, depth: int) -> Cache:
    """A cache of all sequences' states, each ending at the last column."""
    cache = Cache(layers=[DynamicLayer() for _ in range(depth)])
    if not length:
        return cache
    like = next(trail.states for trail in trails if trail.states)
    for index, (layer, (keys, values)) in enumerate(zip(cache.layers, like, strict=True)):
        pair = []
        for part, one in enumerate((keys, values)):
            joined = one.new_zeros(len(trails), one.shape[1], length, one.shape[3])
            for k, trail in enumerate(trails):
                if trail.states:
                    joined[k, :, length - trail.run :] = trail.states[index][part][0]
            pair.append(joined)
        layer.update(*pair)
    return cache


def _cut(cache: Cache, row: int, start: int, stop: int) -> tuple[Prefix, ...]:
    """One sequence's states, as a copy of its own: a view would keep the whole batch's memory."""
    part = slice(row, row + 1)
    return tuple(
        (layer.keys[part, :, start:stop].clone(), layer.values[part, :, start:stop].clone()) for layer in cache.layers
    )
