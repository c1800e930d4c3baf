"""Partial KV caches: the keys and values of single sequences, whose newest tokens a member may not have run yet.

Each sequence has its own keys and values, without padding, so that sequences may be behind by any number of tokens, be
copied as beams are, and be cut. To run the missing tokens, the states of several sequences are put side by side, each
ending at the column at which its new tokens begin: padding is left of the states and right of the new tokens, and no
real token attends to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from softmeet.errors import InvalidInputError
from softmeet.members.huggingface import last_hidden
from softmeet.members.placement import gives_logits

# Keys and values of one layer, each (1, heads, t, width).
KeysValues = tuple[Float[Tensor, "1 h t w"], Float[Tensor, "1 h t w"]]
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


def layers_of_keys_and_values(name: str, config: PreTrainedConfig, what: str) -> int:
    """Count the layers of a member's KV cache, and check that they hold nothing but keys and values.

    Args:
        name: the member's, for the message.
        config: the member's configuration.
        what: the end of the message, a clause that names the consequence or gives advice.

    Raises:
        InvalidInputError: if a layer of the cache holds something else, such as the state of a recurrent layer.
    """
    layers = DynamicCache(config=config).layers
    if other := sorted({type(one).__name__ for one in layers if type(one) not in _KEYS_AND_VALUES}):
        raise InvalidInputError(
            f"expected members whose cache holds keys and values, but {name} has {', '.join(other)}: {what}"
        )
    return len(layers)


@dataclass(frozen=True)
class PartialCache:
    """The KV cache of one sequence for one member, which may not have run the newest tokens yet.

    Attributes:
        states: for each layer, (keys, values) of the tokens that have been run, (1, heads, tokens, width) each; no
            layers before the first token.
        pending: the ids of the tokens after them, which have not been run.
    """

    states: tuple[KeysValues, ...] = ()
    pending: tuple[int, ...] = ()

    @property
    def run(self) -> int:
        """The number of tokens that have been run."""
        return self.states[0][0].shape[2] if self.states else 0

    @property
    def length(self) -> int:
        """The number of all tokens, run or pending."""
        return self.run + len(self.pending)

    def longer(self, tokens: Sequence[int]) -> PartialCache:
        """Return a copy with token ids added to ``pending``."""
        return replace(self, pending=(*self.pending, *tokens))

    def shorter(self, by: int) -> PartialCache:
        """Return a copy without the last ``by`` tokens, run or pending; ``by`` is from 0 to ``length``."""
        if by <= len(self.pending):
            return replace(self, pending=self.pending[: len(self.pending) - by])
        kept = self.run - (by - len(self.pending))
        return PartialCache(tuple((keys[:, :, :kept], values[:, :, :kept]) for keys, values in self.states if kept > 0))


def catch_up(
    model: PreTrainedModel,
    caches: Sequence[PartialCache],
    piece: int | None = None,
    between: Callable[[], None] = lambda: None,
    *,
    newest: bool = False,
) -> tuple[list[PartialCache], list[Float[Tensor, "t d"]]]:
    """Run the pending tokens of each sequence; sequences with about equally many of them share a call of the model.

    Args:
        model: the member, in evaluation mode, whose cache holds keys and values.
        caches: the sequences, which are not changed; each has at least one pending token.
        piece: the most tokens of a sequence in one call; one with more is run by itself, in pieces. None for no limit.
        between: called between two pieces.
        newest: whether the states at each sequence's newest token are enough. They are then all that is returned of a
            model whose logits stand in for its hidden states, at the end of each piece.

    Returns:
        (new caches of the sequences, with nothing pending; for each, the last hidden states at its t formerly pending
        tokens, (t, d)), both in the order of ``caches``.
    """
    # Batched with one that is less than twice as long, no sequence is padded to more than twice its length.
    batches: dict[int, list[int]] = defaultdict(list)
    for k, one in enumerate(caches):
        batches[len(one.pending).bit_length()].append(k)
    found: dict[int, tuple[PartialCache, Float[Tensor, "t d"]]] = {}
    for rows in batches.values():
        for k in [k for k in rows if piece is not None and len(caches[k].pending) > piece]:
            rows.remove(k)
            found[k] = _in_pieces(caches[k], model, piece or 1, between, newest)
        if rows:
            found |= zip(rows, _run([caches[k] for k in rows], model, newest), strict=True)
    return [found[k][0] for k in range(len(caches))], [found[k][1] for k in range(len(caches))]


def _in_pieces(
    one: PartialCache, model: PreTrainedModel, piece: int, between: Callable[[], None], newest: bool
) -> tuple[PartialCache, Float[Tensor, "t d"]]:
    """Run the pending tokens of one sequence in pieces; returns (sequence, last hidden states at all these tokens)."""
    done, hidden = replace(one, pending=()), list[Tensor]()
    for start in range(0, len(one.pending), piece):
        if start:
            between()
        done, states = _run([done.longer(one.pending[start : start + piece])], model, newest)[0]
        hidden.append(states)
    return done, torch.cat(hidden)


def _run(
    caches: Sequence[PartialCache], model: PreTrainedModel, newest: bool
) -> list[tuple[PartialCache, Float[Tensor, "t d"]]]:
    """Run the pending tokens of all sequences in one batch; returns (sequence, last hidden states) for each."""
    before = max(one.run for one in caches)
    new = max(len(one.pending) for one in caches)
    ids = torch.tensor([[*one.pending, *[one.pending[-1]] * (new - len(one.pending))] for one in caches])
    columns = torch.arange(before + new)
    runs = torch.tensor([[one.run] for one in caches])
    counts = torch.tensor([[len(one.pending)] for one in caches])
    mask = (columns >= before - runs) & (columns < before + counts)
    # Padding repeats the last position, since a later one might exceed the model's context.
    positions = (runs + torch.minimum(torch.arange(new), counts - 1)).clamp_min(0)
    cache = side_by_side([one.states for one in caches], model)
    shared = {"cache": cache, "use_cache": True, "attention_mask": mask.long(), "position_ids": positions}
    # A row of logits is long, so none is computed that is not asked for.
    kept = torch.unique(counts - 1) if newest and gives_logits(model) else torch.arange(new)
    hidden = last_hidden(model, ids, kept if len(kept) < new else slice(None), **shared)
    own = [kept == len(one.pending) - 1 if len(kept) < new else slice(len(one.pending)) for one in caches]
    return [
        (PartialCache(cut(cache, k, before - one.run, before + len(one.pending))), hidden[k, own[k]])
        for k, one in enumerate(caches)
    ]


def side_by_side(sequences: Sequence[tuple[KeysValues, ...]], model: PreTrainedModel) -> Cache:
    """Make one cache of B sequences' keys and values, (B, heads, t, width) for each layer, t tokens in the longest.

    Shorter sequences are aligned at the right, with zeros at the left.

    Args:
        sequences: for each sequence, (keys, values) of each layer, (1, heads, tokens, width) each; no layers if it is
            empty.
        model: the member, whose configuration gives the number of layers; its cache holds keys and values alone.
    """
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
    """Return one sequence's (keys, values) for each layer: columns ``start`` to ``stop - 1`` of its row in a cache.

    Both are (1, heads, ``stop - start``, width) copies, since a view would keep the whole batch in memory. From a cache
    of a single row all tokens are returned, uncopied, whatever ``start`` and ``stop`` are.
    """
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    if len(pairs[0][0]) == 1:
        return tuple(pairs)
    part = slice(row, row + 1), slice(None), slice(start, stop)
    return tuple((keys[part].clone(), values[part].clone()) for keys, values in pairs)
