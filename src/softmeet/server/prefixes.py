"""Prompts' keys and values, kept for prompts that begin alike; the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

from softmeet.members.partial_cache import KeysValues


class Prefixes:
    """What was computed for past prompts, up to ``limit`` tokens in all."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[tuple[int, ...], list[KeysValues]] = OrderedDict()
        self._size = 0

    def longest(self, tokens: Sequence[int]) -> tuple[int, list[KeysValues] | None]:
        """(how many leading tokens are known, their states or more); at least the last token is left to compute."""
        best, key = 0, None
        for known in (known for known in self._kept if known[0] == tokens[0]):
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, tokens, strict=False)))
            if min(shared, len(tokens) - 1) > best:
                best, key = min(shared, len(tokens) - 1), known
        if key is None:
            return 0, None
        self._kept.move_to_end(key)
        return best, self._kept[key]

    def keep(self, tokens: Sequence[int], states: list[KeysValues]) -> None:
        """Remember a prompt, unless it is longer than everything that may be kept."""
        key = tuple(tokens)
        if len(key) > self.limit or key in self._kept:
            return
        self._kept[key] = states
        self._size += len(key)
        while self._size > self.limit:
            gone, _ = self._kept.popitem(last=False)
            self._size -= len(gone)
