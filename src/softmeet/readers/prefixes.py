"""The keys and values of earlier texts, kept for texts that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import takewhile
from operator import eq
from typing import Generic, TypeVar
from weakref import WeakMethod

T = TypeVar("T")


class PrefixCache(Generic[T]):
    """One member's keys and values of earlier prompts, for reuse by prompts with the same beginning.

    Args:
        limit: the most tokens kept, summed over prompts; beyond it the least recently used prompts are dropped.
        dropped: called with what was kept of a prompt that is dropped.

    Attributes:
        tokens: the number of tokens kept, summed over prompts.
    """

    def __init__(self, limit: int, dropped: Callable[[T], object] = lambda states: None) -> None:
        self.limit, self.tokens, self._dropped = limit, 0, dropped
        self._kept: OrderedDict[tuple[int, ...], T] = OrderedDict()

    def longest(self, tokens: list[int] | tuple[int, ...]) -> tuple[int, T | None]:
        """Find the kept prompt that shares the most leading tokens with a new one; it then counts as used just now.

        Args:
            tokens: the new prompt's ids, at least one.

        Returns:
            (the number of shared leading tokens, at most ``len(tokens)`` - 1, so that one remains to be run; what was
            kept of that prompt, which may have more tokens). (0, None) if none is shared.
        """

        def shared(known: tuple[int, ...]) -> int:
            return min(sum(1 for _ in takewhile(bool, map(eq, known, tokens))), len(tokens) - 1)

        begun = (known for known in self._kept if known[0] == tokens[0])
        best = max(begun, key=shared, default=())
        if not shared(best):
            return 0, None
        self._kept.move_to_end(best)
        return shared(best), self._kept[best]

    def drop_oldest(self) -> None:
        """Drop the prompt that was used the longest ago, if there is one."""
        if self._kept:
            old, found = self._kept.popitem(last=False)
            self.tokens -= len(old)
            self._dropped(found)

    def clear(self) -> None:
        """Drop what is kept of all prompts."""
        for states in self._kept.values():
            self._dropped(states)
        self._kept.clear()
        self.tokens = 0

    def wants(self, tokens: list[int] | tuple[int, ...]) -> bool:
        """Return whether a prompt would be stored: it is not stored already, and not longer than ``limit``."""
        return len(tokens) <= self.limit and tuple(tokens) not in self._kept

    def keep(self, tokens: list[int] | tuple[int, ...], states: T) -> None:
        """Store a prompt's keys and values, if it :meth:`wants` them.

        Least recently used prompts are dropped until all stored ones together have at most ``limit`` tokens.

        Args:
            tokens: the prompt's ids.
            states: its keys and values.
        """
        if self.wants(tokens):
            self._kept[tuple(tokens)] = states
            self.tokens += len(tokens)
            while self.tokens > self.limit:
                self.drop_oldest()


def weakly(method: Callable[[T], object]) -> Callable[[T], object]:
    """Return a method that does not keep its object, which would else live, with all weights, until a collection."""
    held = WeakMethod(method)

    def call(given: T) -> None:
        if (found := held()) is not None:
            found(given)

    return call
