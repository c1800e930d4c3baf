"""Attention masks under which a model reads texts that begin alike in one row of a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softmeet.members.placement import home

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
