"""A text under several tokenizations at once: a tree of tokens, of which a model runs any number in one call.

Every token attends to its ancestors alone (a 4-D attention mask) and stands at the position that its depth gives it.
What the model keeps of each token, its keys and values, is a column of one cache, in the order in which tokens came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.members.huggingface import last_hidden
from softmeet.members.partial_cache import KeysValues, cut, side_by_side
from softmeet.members.placement import home

# Columns of a node's ancestors and of itself, from the first token on.
Path = np.ndarray[Any, np.dtype[np.int64]]
_SPARE = 64


@dataclass(frozen=True, eq=False)
class TokenTree:
    """What a model keeps of the tokens that it has run.

    Attributes:
        states: each layer's keys and values, a column for each token; empty before the first one.
    """

    states: tuple[KeysValues, ...] = ()

    @property
    def columns(self) -> int:
        """The number of tokens that have been run."""
        return self.states[0][0].shape[2] if self.states else 0

    def kept(self, paths: Sequence[Path]) -> tuple[TokenTree, list[Path]]:
        """Drop all nodes but those on some paths, and renumber these paths; do nothing while little would be saved."""
        used = np.unique(np.concatenate(paths)) if paths else np.empty(0, np.int64)
        if self.columns - len(used) < max(_SPARE, self.columns // 4):
            return self, list(paths)
        where = torch.from_numpy(used)
        states = tuple((k[:, :, where.to(k.device)], v[:, :, where.to(v.device)]) for k, v in self.states)
        return TokenTree(states), [np.searchsorted(used, path) for path in paths]


@dataclass(frozen=True, eq=False)
class Growth:
    """Chains of tokens to run in a tree.

    Attributes:
        tree: what has been run.
        paths: for each chain, the path of the node that it stands behind.
        tokens: of each chain.
    """

    tree: TokenTree
    paths: list[Path]
    tokens: list[list[int]]


def run(model: PreTrainedModel, growths: Sequence[Growth]) -> list[tuple[TokenTree, list[Float[Tensor, "t d"]]]]:
    """Run chains of tokens, each behind a node of its tree, for several trees in one call of the model.

    Returns:
        for each tree: (itself with the new columns, chain after chain; the last hidden states of every chain).
    """
    before = max(growth.tree.columns for growth in growths)
    new = max(sum(map(len, growth.tokens)) for growth in growths)
    ids = torch.zeros(len(growths), new, dtype=torch.int64)
    depths = np.zeros((len(growths), before + new), np.int64)
    allowed = np.zeros((len(growths), new, before + new), bool)
    # What is there to fill a batch attends to itself, since a softmax of nothing is NaN.
    allowed[:, np.arange(new), before + np.arange(new)] = True
    for row, growth in enumerate(growths):
        at, shift = 0, before - growth.tree.columns
        for path, tokens in zip(growth.paths, growth.tokens, strict=True):
            chain, columns = slice(at, at + len(tokens)), slice(before + at, before + at + len(tokens))
            ids[row, chain] = torch.tensor(tokens)
            depths[row, path + shift] = np.arange(len(path))
            depths[row, columns] = np.arange(len(path), len(path) + len(tokens))
            allowed[row, chain, path + shift] = True
            allowed[row, chain, columns] = np.tri(len(tokens), dtype=bool)
            at += len(tokens)
    cache = side_by_side([growth.tree.states for growth in growths], model)
    positions = torch.from_numpy(depths[:, before:])
    plain = len(growths) == 1 and len(growths[0].tokens) == 1 and len(growths[0].paths[0]) == before
    # Without any mask transformers warns of padding, which a text behind such a token is not.
    mask = torch.ones(1, before + new) if plain else _mask(model, allowed, depths)
    hidden = last_hidden(model, ids, cache=cache, use_cache=True, attention_mask=mask, position_ids=positions)
    found = []
    for row, growth in enumerate(growths):
        lengths = list(map(len, growth.tokens))
        tree = TokenTree(cut(cache, row, before - growth.tree.columns, before + sum(lengths)))
        found.append((tree, list(hidden[row, : sum(lengths)].split(lengths))))
    return found


def _mask(model: PreTrainedModel, allowed: Bool[np.ndarray, "B q k"], depths: Int[np.ndarray, "B k"]) -> Any:
    """Make additive masks, as transformers takes them: one, or one for each kind of layer where windows matter."""
    config = model.config.get_text_config(decoder=True)
    place, dtype = home(model), next(model.parameters()).dtype
    full = _additive(torch.from_numpy(allowed), dtype).to(place)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    new = depths[:, -allowed.shape[1] :]
    if window is None or new.max() < window:
        return full
    near = new[:, :, None] - depths[:, None, :] < window
    narrow = _additive(torch.from_numpy(allowed & near), dtype).to(place)
    kinds = getattr(config, "layer_types", None)
    return narrow if kinds is None else {"full_attention": full, "sliding_attention": narrow}


def _additive(allowed: Bool[Tensor, "B q k"], dtype: torch.dtype) -> Float[Tensor, "B 1 q k"]:
    forbidden = ~allowed[:, None]
    return torch.zeros(forbidden.shape, dtype=dtype).masked_fill(forbidden, torch.finfo(dtype).min)
