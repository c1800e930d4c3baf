"""``EnsembleCache``: one cache per member, which transformers uses as a single cache.

A *sequence* is a row of the batch that is generated: a prompt and its continuation so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from softmeet.hf.contexts import ContextRows
from softmeet.hf.rows import RowsLayer
from softmeet.members.partial_cache import PartialCache, catch_up, layers_of_keys_and_values


class Lagging(RowsLayer):
    """A layer with a partial KV cache of each sequence: tokens that the member has not run yet are kept as pending."""

    def follow(self, tokens: Sequence[Sequence[int]]) -> None:
        """Add new token ids to each sequence as pending, without running them; an empty layer begins the sequences.

        Args:
            tokens: for each sequence, in order, the ids of its new tokens, which may be an empty list.
        """
        rows = self.rows or [PartialCache()] * len(tokens)
        self.rows = [row.longer(new) for row, new in zip(rows, tokens, strict=True)]

    def run(
        self, model: PreTrainedModel, rows: Int[Tensor, " k"], *, newest: bool = False
    ) -> list[Float[Tensor, "t d"]]:
        """Run the pending tokens of some sequences, which then are pending no longer.

        Args:
            model: the member, in evaluation mode.
            rows: (k,), the numbers of the sequences, each with at least one pending token.
            newest: whether the states at the newest token are enough, as :func:`catch_up` has it.

        Returns:
            For each sequence, in the order of ``rows``, the last hidden states at its t pending tokens, (t, d).
        """
        chosen = rows.tolist()
        caught, hidden = catch_up(model, [self.rows[k] for k in chosen], newest=newest)
        for k, row in zip(chosen, caught, strict=True):
            self.rows[k] = row
        return hidden


class EnsembleCache(Cache):
    """The cache of an ensemble over tokens: its layers are the layers of all members' caches, in one list.

    So transformers' reordering, cropping and resetting reach every member.

    Args:
        configs: the members' configurations, in order.
        lagging: whether members after the first may have run fewer tokens than the first, as under the gate ``unsure``.
        first_lags: whether the first may have, too, as where each token is drawn from one member.
        batched: groups of members' numbers that are rows of one batch, as :meth:`Contexts.batched` gives them.

    Attributes:
        lagging, first_lags, batched: as given.
        members: each member's own cache: a ``DynamicCache``; with ``lagging`` a :class:`Lagging` layer for all but
            the first, with ``first_lags`` for all; else the :class:`ContextRows` of its group, if it is in one.

    Raises:
        InvalidInputError: if ``lagging`` and the cache of a member after the first holds anything but keys and values.
    """

    def __init__(
        self,
        configs: Sequence[PreTrainedConfig],
        *,
        lagging: bool = False,
        first_lags: bool = False,
        batched: Sequence[Sequence[int]] = (),
    ) -> None:
        self.lagging, self.first_lags, self.batched = lagging, first_lags, [list(group) for group in batched]
        self.members: list[Any] = []
        rows = {i: layer for group in batched for layer in [ContextRows(1 if lagging else len(group))] for i in group}
        for i, config in enumerate(configs):
            lags = first_lags or (lagging and i > 0)
            if lags:
                why = "one_member" if first_lags else "the gate 'unsure'"
                layers_of_keys_and_values(f"member {i}", config, f"it cannot catch up, so leave out {why}")
            own = Lagging() if lags else rows.get(i)
            self.members.append(DynamicCache(config=config) if own is None else own)
        found = {id(one): [one] if isinstance(one, RowsLayer) else one.layers for one in self.members}
        super().__init__(layers=[layer for own in found.values() for layer in own])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Count the tokens that the cache holds; 0 if all members are recurrent, whose states do not count them."""
        if not any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return 0
        return int(super().get_seq_length(layer_idx))
