"""``EnsembleCache``: texts that members have read, which transformers uses as the cache of one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from softmeet.engine.continuation import Dropped
from softmeet.readers.reader import Reader


class EnsembleCache(Cache):
    """The texts of a batch, each with a row in every member's reader.

    Transformers' loops treat it as the cache of one model: they reorder it for beams, cut drafts off, and repeat it for
    several sequences of a prompt.

    Args:
        readers: those who read.

    Attributes:
        texts: for each sequence of the batch what members have read; empty before the first token.
    """

    def __init__(self, readers: Sequence[Reader] = ()) -> None:
        self._texts = _Texts(all(reader.traits.can_crop for reader in readers))
        super().__init__(layers=[self._texts])

    @property
    def texts(self) -> list[Dropped]:
        """The sequences of the batch."""
        return self._texts.texts

    @property
    def columns(self) -> int:
        """How many columns the sequences fill, with padding at the left."""
        return self._texts.columns

    @columns.setter
    def columns(self, count: int) -> None:
        self._texts.columns = count

    def begin(self, texts: Sequence[Dropped], columns: int) -> None:
        """Begin with texts of which nothing was read; they fill the last of so many columns."""
        self._texts.texts, self._texts.columns = list(texts), columns

    def add(self, tokens: Sequence[Sequence[int]], columns: int) -> None:
        """Add new tokens to every text, which members have not read; they fill the last of so many columns."""
        for one, new in zip(self.texts, tokens, strict=True):
            one.tokens += new
        self._texts.columns += columns

    def take_back(self, columns: int, lengths: Sequence[int]) -> None:
        """Go back to where a call began that has failed; members read anew what they had read.

        Args:
            columns: how many columns there were.
            lengths: how many tokens each sequence had; none if nothing had begun.
        """
        for one, length in zip(self.texts, lengths, strict=False):
            one.forget()
            del one.tokens[length:]
        self._texts.texts, self._texts.columns = self.texts[: len(lengths)], columns


class _Texts(CacheLayerMixin):
    """The one layer of an ensemble's cache.

    Attributes:
        is_croppable: whether all members can take tokens back.
        texts: those of :class:`EnsembleCache`.
        columns: how many columns they fill, with padding at the left.
    """

    supports_early_init = False

    def __init__(self, is_croppable: bool) -> None:
        super().__init__()
        self.is_croppable = is_croppable
        self.texts, self.columns = list[Dropped](), 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: members' readers hold keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise TypeError: members' readers hold keys and values, and no model writes into this layer."""
        raise TypeError("an ensemble's cache is for the ensemble: pass it to its forward or generate")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (the number of columns that a mask covers, with ``query_length`` new ones; its offset, 0)."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Count the columns so far."""
        return self.columns

    def get_max_length(self) -> int:
        """Return -1, by which transformers' caches say that the layer sets no limit to a sequence's length."""
        return -1

    def reset(self) -> None:
        """Forget all sequences: the layer is then as before the first token."""
        self.texts, self.columns = [], 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |``tokens_to_remove``| columns; transformers passes a negative number."""
        for one in self.texts:
            del one.tokens[max(0, len(one.tokens) - abs(tokens_to_remove)) :]
            for i in range(len(one.rows)):
                one.crop(i, len(one.tokens))
        self.columns = max(0, self.columns - abs(tokens_to_remove))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times, its copies side by side."""
        self._select([k for k in range(len(self.texts)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Int[Tensor, " B"] | Bool[Tensor, " B"]) -> None:
        """Keep the sequences at ``indices``, numbers or a mask, in that order; a number may come more than once."""
        if self.texts:
            self._select(torch.arange(len(self.texts))[indices.cpu()].tolist())

    reorder_cache = batch_select_indices

    def _select(self, chosen: Sequence[int]) -> None:
        found, used = list[Dropped](), set[int]()
        for k in chosen:
            found.append(self.texts[k].fork() if k in used else self.texts[k])
            used.add(k)
        self.texts = found
