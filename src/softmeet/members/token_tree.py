"""A text under several tokenizations at once: a tree of tokens, of which a model runs any number in one call.

Every token attends to its ancestors alone (a 4-D attention mask) and stands at the position that its depth gives it.
What the model keeps of each token, its keys and values, is a column of one cache, in the order in which tokens came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softmeet.members.huggingface import last_hidden
from softmeet.members.placement import home

# Columns of a node's ancestors and of itself, from the first token on.
Path = np.ndarray[Any, np.dtype[np.int64]]
_SPARE = 64


@dataclass(frozen=True, eq=False)
class TokenTree:
    """What a model keeps of the tokens that it has run: for each layer keys and values, (1, heads, columns, width)."""

    states: tuple[tuple[Tensor, Tensor], ...] = field(default=())

    @property
    def columns(self) -> int:
        """How many tokens have been run."""
        return self.states[0][0].shape[2] if self.states else 0

    def kept(self, paths: Sequence[Path]) -> tuple[TokenTree, list[Path]]:
        """The same for some nodes alone, whose paths are given; as it is while little would be saved."""
        used = np.unique(np.concatenate(paths)) if paths else np.empty(0, np.int64)
        if self.columns - len(used) < max(_SPARE, self.columns // 4):
            return self, list(paths)
        where = torch.from_numpy(used)
        states = tuple((k[:, :, where.to(k.device)], v[:, :, where.to(v.device)]) for k, v in self.states)
        return TokenTree(states), [np.searchsorted(used, path) for path in paths]


@dataclass(frozen=True, eq=False)
class Growth:
    """Tokens to run in a tree: the path of each one's parent, and how many are a chain behind it."""

    tree: TokenTree
    paths: list[Path]
    tokens: list[list[int]]


def run(model: PreTrainedModel, growths: Sequence[Growth]) -> list[tuple[TokenTree, list[Float[Tensor, "t d"]]]]:
    """Run chains of tokens, each behind a node of its tree, for several trees in one call of the model.

    Returns:
        for each tree: itself with the new columns, chain after chain, and the last hidden states of every chain.
    """
    before = max(growth.tree.columns for growth in growths)
    new = max(sum(map(len, growth.tokens)) for growth in growths)
    ids = torch.zeros(len(growths), new, dtype=torch.int64)
    positions = torch.zeros(len(growths), new, dtype=torch.int64)
    allowed = np.zeros((len(growths), new, before + new), bool)
    # What is there to fill a batch attends to itself, since a softmax of nothing is NaN.
    allowed[:, np.arange(new), before + np.arange(new)] = True
    for row, growth in enumerate(growths):
        at, shift = 0, before - growth.tree.columns
        for path, tokens in zip(growth.paths, growth.tokens, strict=True):
            chain = slice(at, at + len(tokens))
            ids[row, chain] = torch.tensor(tokens)
            positions[row, chain] = torch.arange(len(path), len(path) + len(tokens))
            allowed[row, chain, path + shift] = True
            allowed[row, chain, before + at : before + at + len(tokens)] = np.tri(len(tokens), dtype=bool)
            at += len(tokens)
    cache = _joined([growth.tree for growth in growths], before, model)
    plain = len(growths) == 1 and len(growths[0].tokens) == 1 and len(growths[0].paths[0]) == before
    # Without any mask transformers warns of padding, which a text behind such a token is not.
    mask = torch.ones(1, before + new) if plain else _mask(model, allowed, positions, growths, before)
    hidden = last_hidden(model, ids, cache=cache, use_cache=True, attention_mask=mask, position_ids=positions)
    found = []
    for row, growth in enumerate(growths):
        count, first = sum(map(len, growth.tokens)), before - growth.tree.columns
        columns = slice(first, before + count)
        whole = len(growths) == 1
        states = tuple(
            (layer.keys, layer.values)
            if whole
            else (layer.keys[row : row + 1, :, columns].clone(), layer.values[row : row + 1, :, columns].clone())
            for layer in cache.layers
        )
        found.append((TokenTree(states), list(hidden[row, :count].split([len(tokens) for tokens in growth.tokens]))))
    return found


def _joined(trees: Sequence[TokenTree], length: int, model: PreTrainedModel) -> Cache:
    """One cache of all trees' columns, each tree's last ones at the end."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    cache = Cache(layers=[DynamicLayer() for _ in range(depth)])
    if not length:
        return cache
    like = next(tree.states for tree in trees if tree.states)
    for index, (layer, pair) in enumerate(zip(cache.layers, like, strict=True)):
        joined = []
        for part, one in enumerate(pair):
            if len(trees) == 1:
                joined.append(one)
                continue
            whole = one.new_zeros(len(trees), one.shape[1], length, one.shape[3])
            for row, tree in enumerate(trees):
                if tree.states:
                    whole[row, :, length - tree.columns :] = tree.states[index][part][0]
            joined.append(whole)
        layer.update(*joined)
    return cache


def _mask(
    model: PreTrainedModel,
    allowed: Bool[np.ndarray, "B q k"],
    positions: Tensor,
    growths: Sequence[Growth],
    before: int,
) -> Any:
    """What transformers takes as a mask that is made: additive; one for each kind of layer where windows matter."""
    config = model.config.get_text_config(decoder=True)
    place, dtype = home(model), next(model.parameters()).dtype
    full = _additive(torch.from_numpy(allowed), dtype).to(place)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is None or int(positions.max()) < window:
        return full
    depth = np.zeros((len(growths), allowed.shape[2]), np.int64)
    depth[:, before:] = positions.numpy()
    for row, growth in enumerate(growths):
        for path in growth.paths:
            depth[row, path + before - growth.tree.columns] = np.arange(len(path))
    near = positions.numpy()[:, :, None] - depth[:, None, :] < window
    narrow = _additive(torch.from_numpy(allowed & near), dtype).to(place)
    kinds = getattr(config, "layer_types", None)
    return narrow if kinds is None else {"full_attention": full, "sliding_attention": narrow}


def _additive(allowed: Bool[Tensor, "B q k"], dtype: torch.dtype) -> Float[Tensor, "B 1 q k"]:
    forbidden = ~allowed[:, None]
    return torch.zeros(forbidden.shape, dtype=dtype).masked_fill(forbidden, torch.finfo(dtype).min)
