"""Attention masks under which a model reads texts that begin alike in one row of a call, and a check that it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softmeet.errors import InvalidInputError
from softmeet.members.placement import home
from softmeet.members.trunk import last_hidden, require_cache

Depths = Int[np.ndarray, "B k"]
Allowed = Bool[np.ndarray, "B q k"]
# Kinds of layers, by their names in configurations, that read a tree by :class:`Masks`.
_KINDS = {"full_attention", "sliding_attention", "global"}
# What a model is checked on: a trunk, and after it a chain beside another; and the relative error of rounding at most.
_TRUNK, _OTHER, _CHAIN, _NEAR = range(3), range(3, 11), (11, 12), 1e-3


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


@torch.inference_mode()
def require_trees(model: PreTrainedModel) -> None:
    """Check that a model reads each path of a tree of tokens as it reads that path by itself, on a few tokens.

    A tree is several texts that begin alike, whose common tokens are run once. Models whose attention counts columns
    (ALiBi) instead of positions do not read them so, nor those with recurrent layers, nor those with windows of which
    :class:`Masks` does not know.

    Raises:
        InvalidInputError: if it does not.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())}
    said = f"it has layers of {', '.join(sorted(unknown))}" if (unknown := kinds - _KINDS) else ""
    trunk, other, chain = ([1 + token % (config.vocab_size - 1) for token in ids] for ids in (_TRUNK, _OTHER, _CHAIN))
    try:
        require_cache(model)
        found = _behind(model, trunk, other, chain)
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


def _behind(model: PreTrainedModel, trunk: list[int], other: list[int], chain: list[int]) -> Float[Tensor, "t d"]:
    """Return the last hidden states at a chain behind all but the last token of a trunk, beside another behind all."""
    first, beside, new = len(trunk), len(other), len(other) + len(chain)
    depths = np.concatenate([np.arange(first + beside), first - 1 + np.arange(len(chain))])[None]
    allowed = np.zeros((1, new, first + new), bool)
    allowed[0, :, first:] = np.tri(new, dtype=bool)
    allowed[0, :beside, :first] = True
    allowed[0, beside:, : first - 1] = True
    allowed[0, beside:, first : first + beside] = False
    cache, ones = empty_cache(model), torch.ones(1, first)
    begun = {"attention_mask": ones, "position_ids": torch.arange(first)[None]}
    last_hidden(model, torch.tensor([trunk]), cache=cache, use_cache=True, **begun)
    return last_hidden(
        model, torch.tensor([other + chain]), cache=cache, use_cache=True,
        attention_mask=Masks(model).of(allowed, depths), position_ids=torch.from_numpy(depths[:, first:]),
    )[0, beside:]  # fmt: skip
