"""One cache per member, behind the interface of one."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import Cache, DynamicCache, PreTrainedConfig


class EnsembleCache(Cache):
    """The members' caches; its layers are theirs, so that reordering, cropping and resetting reach every member.

    Args:
        configs: the members' configurations, in order.
    """

    def __init__(self, configs: Sequence[PreTrainedConfig]) -> None:
        self.members = [DynamicCache(config=config) for config in configs]
        super().__init__(layers=[layer for member in self.members for layer in member.layers])
