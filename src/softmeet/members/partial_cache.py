"""Partial KV caches: sequences whose newest tokens a member has not run, and catching up in one chunk.

Each sequence keeps its own keys and values, without padding, so that sequences may be behind by any number of tokens,
be copied as beams are, and be cut. To catch up, the states of several sequences are put side by side so that each ends
where its new tokens begin: padding is left of the states and right of the tokens, and no query that counts sees it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from softmeet.errors import InvalidInputError
from softmeet.members.huggingface import last_hidden

# Keys and values of one layer, each (1, heads, t, width).
KeysValues = tuple[Float[Tensor, "1 h t w"], Float[Tensor, "1 h t w"]]
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


def layers_of_keys_and_values(name: str, config: PreTrainedConfig, what: str) -> int:
    """Count the layers of a member's cache.

    Args:
        name, config: of the member.
        what: cannot be done, for the message.

    Raises:
        InvalidInputError: the cache holds something else than keys and values.
    """
    layers = DynamicCache(config=config).layers
    if other := sorted({type(one).__name__ for one in layers if type(one) not in _KEYS_AND_VALUES}):
        raise InvalidInputError(
            f"expected members whose cache holds keys and values, but {name} has {', '.join(other)}: {what}"
        )
    return len(layers)


@dataclass(frozen=True)
class PartialCache:
    """One sequence as one member knows it.

    Attributes:
        states: each layer's keys and values of the tokens that the member has run; empty before the first one.
        pending: the tokens behind them that it has not run.
    """

    states: tuple[KeysValues, ...] = ()
    pending: tuple[int, ...] = ()

    @property
    def run(self) -> int:
        """The number of tokens that have been run."""
        return self.states[0][0].shape[2] if self.states else 0

    @property
    def length(self) -> int:
        """The number of tokens, run or not."""
        return self.run + len(self.pending)

    def longer(self, tokens: Sequence[int]) -> PartialCache:
        """Add tokens that have not been run."""
        return replace(self, pending=(*self.pending, *tokens))

    def shorter(self, by: int) -> PartialCache:
        """Take the last tokens away, run or not."""
        if by <= len(self.pending):
            return replace(self, pending=self.pending[: len(self.pending) - by])
        kept = self.run - (by - len(self.pending))
        return PartialCache(tuple((keys[:, :, :kept], values[:, :, :kept]) for keys, values in self.states if kept > 0))


def catch_up(
    model: PreTrainedModel, caches: Sequence[PartialCache]
) -> tuple[list[PartialCache], list[Float[Tensor, "t d"]]]:
    """Run what each sequence has pending, each in one chunk; all of about the same length in one batch.

    Args:
        model: the member, in evaluation mode, whose cache holds keys and values.
        caches: at least one token of each is pending.

    Returns:
        (the sequences with nothing pending; the last hidden states at the tokens that were pending).
    """
    # Batched with one that is less than twice as long, no sequence is padded to more than twice its length.
    batches: dict[int, list[int]] = defaultdict(list)
    for k, one in enumerate(caches):
        batches[len(one.pending).bit_length()].append(k)
    found: dict[int, tuple[PartialCache, Float[Tensor, "t d"]]] = {}
    for rows in batches.values():
        found |= zip(rows, _run([caches[k] for k in rows], model), strict=True)
    return [found[k][0] for k in range(len(caches))], [found[k][1] for k in range(len(caches))]


def _run(caches: Sequence[PartialCache], model: PreTrainedModel) -> list[tuple[PartialCache, Float[Tensor, "t d"]]]:
    before = max(one.run for one in caches)
    new = max(len(one.pending) for one in caches)
    ids = torch.tensor([[*one.pending, *[one.pending[-1]] * (new - len(one.pending))] for one in caches])
    columns = torch.arange(before + new)
    runs = torch.tensor([[one.run] for one in caches])
    counts = torch.tensor([[len(one.pending)] for one in caches])
    mask = (columns >= before - runs) & (columns < before + counts)
    # A position past the last one might not exist.
    positions = (runs + torch.minimum(torch.arange(new), counts - 1)).clamp_min(0)
    cache = side_by_side([one.states for one in caches], model)
    hidden = last_hidden(model, ids, cache=cache, use_cache=True, attention_mask=mask.long(), position_ids=positions)
    return [
        (PartialCache(cut(cache, k, before - one.run, before + len(one.pending))), hidden[k, : len(one.pending)])
        for k, one in enumerate(caches)
    ]


def side_by_side(sequences: Sequence[tuple[KeysValues, ...]], model: PreTrainedModel) -> Cache:
    """Make one cache of several sequences' keys and values, each ending at the last column, with zeros before it."""
    cache = Cache(layers=[DynamicLayer() for _ in DynamicCache(config=model.config).layers])
    known = next((states for states in sequences if states), ())
    length = max(states[0][0].shape[2] if states else 0 for states in sequences)
    pair: tuple[Tensor, ...]
    for index, (layer, pair) in enumerate(zip(cache.layers, known, strict=False)):
        if len(sequences) > 1:
            pair = tuple(one.new_zeros(len(sequences), one.shape[1], length, one.shape[3]) for one in pair)
            for row, states in enumerate(sequences):
                for whole, own in zip(pair, states[index] if states else (), strict=False):
                    whole[row, :, length - own.shape[2] :] = own[0]
        layer.update(*pair)
    return cache


def cut(cache: Cache, row: int, start: int, stop: int) -> tuple[KeysValues, ...]:
    """Return one sequence's keys and values: all there is, or a copy, as a view would keep the whole batch's memory."""
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    if len(pairs[0][0]) == 1:
        return tuple(pairs)
    part = slice(row, row + 1), slice(None), slice(start, stop)
    return tuple((keys[part].clone(), values[part].clone()) for keys, values in pairs)
