"""A text under several tokenizations at once: a tree of tokens, any number of which a model runs in one call.

Each token attends to its ancestors alone (a 4-D attention mask), and its position is its depth in the tree. The keys
and values of each token are one column of the tree's, in the order in which tokens were run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.members.huggingface import last_hidden, require_cache
from softmeet.members.placement import gives_logits, home
from softmeet.members.tree_cache import Columns, Layout, SideBySide, Store

# The columns of a token's ancestors and of itself, first to last.
Path = np.ndarray[Any, np.dtype[np.int64]]
Ids = Int[np.ndarray, "B t"]
Depths = Int[np.ndarray, "B k"]
Allowed = Bool[np.ndarray, "B q k"]
_SPARE = 64
# Kinds of layers, by their names in configurations, that read a tree by the masks of :func:`attention_mask`.
_KINDS = {"full_attention", "sliding_attention", "global"}
# What a model is checked on: a trunk, and after it a chain beside another; and the relative error of rounding at most.
_TRUNK, _OTHER, _CHAIN, _NEAR = range(3), range(3, 11), (11, 12), 1e-3


@dataclass(frozen=True, eq=False)
class TokenTree:
    """The keys and values of all tokens that a model has run for a text under several tokenizations.

    A node of the tree is a token after the tokens before it. Each node has a column of keys and values, in the order in
    which tokens were run; its *path*, (tokens,) int64, lists the columns of its ancestors, first to last, and its own.

    Attributes:
        ids: (columns,), the tokens that have been run.
        store: where their keys and values are: its first ``columns`` columns; None before the first token.
        layout: which parts of the store's tensors are which layer's.
    """

    ids: Path = field(default_factory=lambda: np.empty(0, np.int64))
    store: Store | None = None
    layout: Layout = ()

    @property
    def columns(self) -> int:
        """The number of tokens that have been run."""
        return len(self.ids)

    @property
    def bytes(self) -> int:
        """The number of bytes of all keys and values, with the room for more."""
        return sum(part.nbytes for part in self.store.tensors) if self.store else 0

    def may_shrink(self, used: Path) -> bool:
        """Return whether 64 columns or more, and a quarter of all or more, remain without those that are used."""
        return self.columns - len(used) >= max(_SPARE, self.columns // 4)

    def kept(self, paths: Sequence[Path]) -> tuple[TokenTree, list[Path]]:
        """Drop all tokens that are on none of the given paths, and renumber the columns.

        The tree is returned unchanged if fewer than 64 columns, or less than a quarter of them, would be dropped.

        Args:
            paths: columns of each node's ancestors and of itself, (tokens,) int64 each.

        Returns:
            (the smaller tree, the same paths with the new columns).
        """
        if not self.may_shrink(max(paths, key=len, default=np.empty(0, np.int64))):
            return self, list(paths)
        used = np.unique(np.concatenate(paths)) if paths else np.empty(0, np.int64)
        if not self.may_shrink(used):
            return self, list(paths)
        assert self.store is not None
        where = torch.from_numpy(used)
        states = tuple(part.index_select(2, where.to(part.device)) for part in self.store.tensors)
        return TokenTree(self.ids[used], Store(states), self.layout), [np.searchsorted(used, path) for path in paths]


@dataclass(frozen=True, eq=False)
class Growth:
    """Chains of tokens to run in one tree, each after a node of it.

    Attributes:
        tree: the tokens that have been run.
        paths: for each chain, the columns in ``tree`` of the tokens before it, first to last, (tokens,) int64.
        tokens: for each chain, its token ids, at least one.
        last: of a single chain, at how many of its last tokens states are wanted; None for all.
    """

    tree: TokenTree
    paths: list[Path]
    tokens: list[list[int]]
    last: int | None = None

    @property
    def grown(self) -> list[Path]:
        """For each chain, the columns of the tokens before it and of its own, in the tree that :func:`run` returns."""
        ends = self.tree.columns + np.cumsum([len(own) for own in self.tokens])
        return [
            np.append(path, np.arange(end - len(own), end))
            for path, own, end in zip(self.paths, self.tokens, ends, strict=True)
        ]


def run(model: PreTrainedModel, growths: Sequence[Growth]) -> list[tuple[TokenTree, list[Float[Tensor, "t d"]]]]:
    """Run chains of tokens, each after a node of its tree, for several trees in one call of the model.

    Args:
        model: a causal LM, in evaluation mode, whose cache holds keys and values.
        growths: for each tree, the chains to add; at least one growth. The trees given are not changed.

    Returns:
        For each tree, (the tree with the new columns, chain after chain; for each chain of t tokens, the last hidden
        states at them, (t, d), or, of a model whose logits stand in for them, perhaps at the wanted ones alone).
    """
    rows = _rows(growths)
    before = max(row.length for row in rows)
    new = max(row.new for row in rows)
    alike = all(len(row.chains) == 1 and len(row.chains[0][0]) == row.length for row in rows)
    ids, depths, allowed = (_chains if alike else _trees)(rows, before, new)
    layout = next((growth.tree.layout for growth in growths if growth.tree.layout), ())
    together = SideBySide([(row.growth.tree.store, row.columns) for row in rows], layout, new, model)
    positions = torch.from_numpy(depths[:, before:])
    # Without any mask transformers warns of padding if a token equals the padding token, as a text's first one may.
    mask = torch.ones(1, before + new) if alike and len(rows) == 1 else attention_mask(model, allowed, depths)
    # A row of logits is long, so none is computed that no tree wants.
    spared = min(row.new - row.wanted for row in rows) if gives_logits(model) else 0
    hidden = last_hidden(
        model, torch.from_numpy(ids), slice(spared - new, None), cache=together.cache, use_cache=True,
        attention_mask=mask, position_ids=positions,
    )  # fmt: skip
    found = dict[int, tuple[TokenTree, list[Tensor]]]()
    for k, row in enumerate(rows):
        tree, states = found.get(id(row.growth), (row.growth.tree, []))
        lengths = [row.new - spared] if spared else [len(tokens) for _, tokens in row.chains]
        own = together.new(k, row.new)
        store = tree.store.followed(tree.columns, own) if tree.store else Store(tuple(one.clone() for one in own))
        ran = [token for _, tokens in row.chains for token in tokens]
        tree = TokenTree(np.append(tree.ids, np.asarray(ran, np.int64)), store, together.layout)
        found[id(row.growth)] = tree, [*states, *hidden[k, : row.new - spared].split(lengths)]
    return [found[id(growth)] for growth in growths]


class _Row(NamedTuple):
    """One row of a batch: chains of new tokens behind some columns of a tree.

    Attributes:
        growth: the tree, and all chains that are added to it.
        columns: those of the tree that the row has.
        chains: for each of the row's chains, (the places of the tokens before it among these columns; its tokens).
    """

    growth: Growth
    columns: Columns
    chains: list[tuple[Path, list[int]]]

    @property
    def length(self) -> int:
        """The number of the tree's columns that the row has."""
        return self.columns if isinstance(self.columns, int) else len(self.columns)

    @property
    def new(self) -> int:
        """The number of tokens of all its chains."""
        return sum(len(tokens) for _, tokens in self.chains)

    @property
    def wanted(self) -> int:
        """The number of its last new tokens at which states are wanted."""
        return self.new if self.growth.last is None else self.growth.last


def _rows(growths: Sequence[Growth]) -> list[_Row]:
    """Make the rows of a batch: each chain by itself behind its own path, or a whole tree with all of its chains.

    Rows of one chain each are fewer tokens, as no tree waits for one of more chains. They are made for several trees,
    unless the columns of their paths would be more than those of the trees.
    """
    pairs = [(growth, path, own) for growth in growths for path, own in zip(growth.paths, growth.tokens, strict=True)]
    if len(growths) > 1 and sum(len(path) for _, path, _ in pairs) <= sum(growth.tree.columns for growth in growths):
        return [_Row(growth, path, [(np.arange(len(path)), own)]) for growth, path, own in pairs]
    return [_Row(one, one.tree.columns, list(zip(one.paths, one.tokens, strict=True))) for one in growths]


def _chains(rows: Sequence[_Row], before: int, new: int) -> tuple[Ids, Depths, Allowed]:
    """Lay out rows of one chain each, behind all of the row's columns.

    Args:
        rows: B of them.
        before, new: the numbers of columns before the new tokens, and of these.

    Returns:
        (the new tokens' ids, (B, new); the depth of each column, (B, before + new); which columns each new token
        attends to, (B, new, before + new)).
    """
    ids = np.zeros((len(rows), new), np.int64)
    for k, row in enumerate(rows):
        ids[k, : row.new] = row.chains[0][1]
    begin = before - np.array([row.length for row in rows])[:, None]
    places, last = np.arange(before + new), before + np.arange(new)[:, None]
    return ids, np.maximum(places - begin, 0), (places >= begin)[:, None] & (places <= last)


def _trees(rows: Sequence[_Row], before: int, new: int) -> tuple[Ids, Depths, Allowed]:
    """Lay out rows of any chains, as :func:`_chains` does."""
    ids = np.zeros((len(rows), new), np.int64)
    depths = np.zeros((len(rows), before + new), np.int64)
    allowed = np.zeros((len(rows), new, before + new), bool)
    # Every token attends to itself; those that only fill the batch too, since a softmax over nothing is NaN.
    allowed[:, np.arange(new), before + np.arange(new)] = True
    for k, row in enumerate(rows):
        at, shift = 0, before - row.length
        for path, tokens in row.chains:
            chain, columns = slice(at, at + len(tokens)), slice(before + at, before + at + len(tokens))
            ids[k, chain] = tokens
            depths[k, path + shift] = np.arange(len(path))
            depths[k, columns] = np.arange(len(path), len(path) + len(tokens))
            allowed[k, chain, path + shift] = True
            if len(tokens) > 1:
                allowed[k, chain, columns] = np.tri(len(tokens), dtype=bool)
            at += len(tokens)
    return ids, depths, allowed


@torch.inference_mode()
def require_trees(model: PreTrainedModel) -> None:
    """Check that a model reads each path of a tree of tokens as it reads that path by itself, on a few tokens.

    Models whose attention counts columns (ALiBi) instead of positions do not, nor those with recurrent layers, nor
    those with windows of which :func:`run` does not know.

    Raises:
        InvalidInputError: if it does not.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())}
    said = f"it has layers of {', '.join(sorted(unknown))}" if (unknown := kinds - _KINDS) else ""
    trunk, other, chain = ([1 + token % (config.vocab_size - 1) for token in ids] for ids in (_TRUNK, _OTHER, _CHAIN))
    try:
        require_cache(model)
        ((tree, _),) = run(model, [Growth(TokenTree(), [np.empty(0, np.int64)], [trunk])])
        paths = [np.arange(len(trunk)), np.arange(len(trunk) - 1)]
        ((_, (_, found)),) = run(model, [Growth(tree, paths, [other, chain])])
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


def attention_mask(model: PreTrainedModel, allowed: Allowed, depths: Depths) -> Any:
    """Make the additive attention mask, (B, 1, queries, keys); a dict of one by kind of layer if windows matter."""
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
