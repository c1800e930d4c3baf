"""What an ensemble over a union of tokens is made of, for each form of the union."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from softmeet.engine.combine import Combiner
from softmeet.engine.top_union import TopUnion
from softmeet.members.opaque import NoHead
from softmeet.members.spelling import Spelling
from softmeet.published.gac import GacUnion
from softmeet.published.unite import UniteUnion
from softmeet.readers.reader import Reader
from softmeet.readers.union_alphabet import Union, UnionAlphabet
from softmeet.readers.union_form import UnionForm
from softmeet.readers.union_reader import UnionReader
from softmeet.readers.union_tokens import SpelledTokens, stand_in


class UnionSpace(Protocol):
    """A form of the union of some members' tokens."""

    @property
    def alphabet(self) -> Union:
        """The symbols that members share, and what each of them spells."""

    @property
    def spellings(self) -> Sequence[Spelling]:
        """How the tokens of each member are spelled."""

    def key_of(self, i: int) -> Any:
        """Return what members of one model share if one reader reads for both."""

    def prompted_as(self, i: int) -> int:
        """Return the number of the member whose prompt member i reads."""

    def reader(self, i: int, below: Reader) -> Reader:
        """Return a reader over the union of member i, which ``below`` reads over its own tokens."""

    def combiner(self, names: Sequence[str]) -> Combiner:
        """Return what combines the members of these names."""

    def part(self, chosen: Sequence[int]) -> UnionSpace:
        """Return the same union of the members numbered ``chosen`` alone."""


@dataclass(frozen=True, eq=False)
class SpelledUnion:
    """The union of tokens as byte strings.

    Attributes:
        spellings: how the tokens of each member are spelled.
        alphabet: the union.
        k: of each member so many of its likeliest strings can follow at a step; None for all.
    """

    spellings: Sequence[Spelling]
    alphabet: UnionAlphabet
    k: int | None = None

    @classmethod
    def of(cls, spellings: Sequence[Spelling], k: int | None) -> SpelledUnion:
        """Return the union of members' tokens, which are spelled so."""
        return cls(spellings, UnionAlphabet.of(spellings), k)

    def key_of(self, i: int) -> Spelling:
        """Return how the member's tokens are spelled."""
        return self.spellings[i]

    def prompted_as(self, i: int) -> int:
        """Return i: every member reads prompts as its own tokenizer cuts them."""
        return i

    def reader(self, i: int, below: Reader) -> UnionReader:
        """Return a reader over the union of member i, which ``below`` reads over its own tokens."""
        return UnionReader(below, SpelledTokens(self.spellings[i], self.alphabet, below.alphabet.ends), self.alphabet)

    def combiner(self, names: Sequence[str]) -> Combiner:
        """Return what combines the members of these names."""
        heads = [NoHead(self.alphabet.size) for _ in names]
        if self.k is None:
            return Combiner(names, heads)
        return TopUnion(names, heads, self.k, [stand_in(own, self.alphabet) for own in self.spellings])

    def part(self, chosen: Sequence[int]) -> SpelledUnion:
        """Return the same union of the members numbered ``chosen`` alone."""
        return SpelledUnion([self.spellings[i] for i in chosen], self.alphabet, self.k)


def union_space(
    form: UnionForm, spellings: Sequence[Spelling], tokenizers: Sequence[PreTrainedTokenizerBase]
) -> UnionSpace:
    """Make the union of members' tokens that a form says.

    Args:
        form: the form.
        spellings: how the tokens of each member are spelled.
        tokenizers: those of the members.

    Raises:
        InvalidInputError: if the code that a form follows cannot take a tokenizer.
    """
    if form.published == "gac":
        return GacUnion.of(spellings, tokenizers)
    if form.published == "unite" and form.k is not None:
        return UniteUnion.of(spellings, tokenizers, form.k)
    return SpelledUnion.of(spellings, form.k)
