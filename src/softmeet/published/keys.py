"""The symbols of a union of tokens by keys: what others' code writes for a token, which need not be its bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from softmeet.members.spelling import Spelling
from softmeet.readers.union_tokenizer import union_tokenizer


@dataclass(frozen=True, eq=False)
class KeyAlphabet:
    """Symbols of which each is a key, and one symbol more, which ends a text.

    Attributes:
        words: what each symbol but the last spells: the bytes of the tokens as which the first member reads it. Two may
            spell the same.
        ends: the symbols that end a text, the last one among them.
        first: how the first member's tokens are spelled.
        of_token: the symbol of each of the first member's tokens.
    """

    words: Sequence[bytes]
    ends: frozenset[int]
    first: Spelling
    of_token: Mapping[int, int]
    spelling: None = None

    @property
    def size(self) -> int:
        """The number of symbols."""
        return len(self.words) + 1

    @property
    def end(self) -> int:
        """The last symbol, which ends a text, or begins one."""
        return len(self.words)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer of the symbols (:func:`softmeet.readers.union_tokenizer.union_tokenizer`)."""
        return union_tokenizer(self.words)

    def encode(self, text: str) -> list[int]:
        """Return the symbols of a text, cut as the first tokenizer cuts it."""
        return [self.of_token[token] for token in self.first.cut_writable(text.encode())]

    def decode(self, symbols: Sequence[int]) -> bytes:
        """Return the bytes of symbols, none for the last one."""
        return b"".join(self.words[k] for k in symbols if k != self.end)

    def count(self, symbols: Sequence[int]) -> int:
        """Return the number of symbols, by which texts are limited."""
        return len(symbols)

    def may_follow(self, symbols: Sequence[int]) -> None:
        """Return None: any symbol can follow."""
        return


def is_byte_level(vocabulary: Collection[str]) -> bool:
    """Return whether more tokens begin with Ġ than with ▁, which is how others' code tells kinds of tokenizers."""
    return sum(one.startswith("Ġ") for one in vocabulary) > sum(one.startswith("▁") for one in vocabulary)


def cut_each(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each of some texts, as they are cut in the middle of a text."""
    if not texts:
        return []
    cut: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return cut
