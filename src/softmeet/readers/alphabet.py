"""What the symbols of a reader are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from softmeet.members.spelling import Spelling


@runtime_checkable
class Alphabet(Protocol):
    """The symbols of a reader: how many there are, how texts are made of them, and which of them end a text."""

    @property
    def size(self) -> int:
        """The number v of symbols, which are 0 to v - 1."""

    @property
    def ends(self) -> frozenset[int]:
        """The symbols that end a text."""

    @property
    def spelling(self) -> Spelling | None:
        """How the tokens are spelled that :meth:`count` counts; None where symbols are tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the symbols of a text."""

    def decode(self, symbols: Sequence[int]) -> bytes:
        """Return the bytes that symbols stand for, none for those that end a text, whole characters or not."""

    def count(self, symbols: Sequence[int]) -> int:
        """Return how many tokens symbols are, as limits and prices count them."""

    def may_follow(self, symbols: Sequence[int]) -> Tensor | None:
        """Return which symbols can follow, (v,) bool; None if all can.

        What it returns depends on the last few symbols alone, as of characters that are written by several bytes.
        """
