"""The keys and values of earlier texts, kept for texts that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import takewhile
from operator import eq

from softmeet.members.partial_cache import KeysValues


class PrefixCache:
    """One member's keys and values of earlier prompts, for reuse by prompts with the same beginning.

    Args:
        limit: the most tokens kept, summed over prompts; beyond it the least recently used prompts are dropped.

    Attributes:
        tokens: the number of tokens kept, summed over prompts.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.tokens = limit, 0
        self._kept: OrderedDict[tuple[int, ...], tuple[KeysValues, ...]] = OrderedDict()

    def longest(self, tokens: list[int] | tuple[int, ...]) -> tuple[int, tuple[KeysValues, ...]]:
        """Find the kept prompt that shares the most leading tokens with a new one; it then counts as used just now.

        Args:
            tokens: the new prompt's ids, at least one.

        Returns:
            (the number of shared leading tokens, at most ``len(tokens)`` - 1, so that one remains to be run; each
            layer's keys and values of the kept prompt, which may cover more tokens). (0, ()) if none is shared.
        """

        def shared(known: tuple[int, ...]) -> int:
            return min(sum(1 for _ in takewhile(bool, map(eq, known, tokens))), len(tokens) - 1)

        begun = (known for known in self._kept if known[0] == tokens[0])
        best = max(begun, key=shared, default=())
        if not shared(best):
            return 0, ()
        self._kept.move_to_end(best)
        return shared(best), self._kept[best]

    @property
    def bytes(self) -> int:
        """The number of bytes of all keys and values kept."""
        return sum(bytes_of(states) for states in list(self._kept.values()))

    def keep(self, tokens: list[int] | tuple[int, ...], states: tuple[KeysValues, ...]) -> None:
        """Store a prompt's keys and values, unless the prompt is stored already or is longer than ``limit``.

        Least recently used prompts are dropped until all stored ones together have at most ``limit`` tokens.

        Args:
            tokens: the prompt's ids.
            states: each layer's keys and values of these tokens, each (1, heads, t, width).
        """
        key = tuple(tokens)
        if len(key) <= self.limit and key not in self._kept:
            self._kept[key] = states
            self.tokens += len(key)
            while self.tokens > self.limit:
                self.tokens -= len(self._kept.popitem(last=False)[0])


def bytes_of(states: Iterable[KeysValues]) -> int:
    """Return the number of bytes of the keys and values of layers."""
    return sum(part.numel() * part.element_size() for pair in states for part in pair)
