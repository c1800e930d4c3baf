"""The symbols of a union of tokens by keys: what others' code writes for a token, which need not be its bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from softmeet.readers.union_alphabet import UnionAlphabet


@dataclass(frozen=True, eq=False)
class KeyAlphabet(UnionAlphabet):
    """Symbols of which each is a key, and one symbol more, which ends a text.

    Attributes:
        words: what each symbol but the last spells: the bytes of the tokens as which the first member reads it. Two may
            spell the same.
        first: how the first member's tokens are spelled.
        ended_by: the symbols that end a text, the last one among them.
        of_token: the symbol of each of the first member's tokens.
    """

    ended_by: frozenset[int]
    of_token: Mapping[int, int]

    @cached_property
    def ends(self) -> frozenset[int]:
        """The symbols that end a text."""
        return self.ended_by

    def encode(self, text: str) -> list[int]:
        """Return the symbols of a text, cut as the first tokenizer cuts it."""
        return [self.of_token[token] for token in self.first.cut_writable(text.encode())]


def is_byte_level(vocabulary: Collection[str]) -> bool:
    """Return whether more tokens begin with Ġ than with ▁, which is how others' code tells kinds of tokenizers."""
    return sum(one.startswith("Ġ") for one in vocabulary) > sum(one.startswith("▁") for one in vocabulary)


def cut_each(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each of some texts, as they are cut in the middle of a text."""
    if not texts:
        return []
    cut: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return cut
