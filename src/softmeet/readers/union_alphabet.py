"""The union of several tokenizers' tokens, as byte strings: the symbols of members that are combined over it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

from transformers import PreTrainedTokenizerFast

from softmeet.members.spelling import Spelling
from softmeet.readers.reader import Alphabet
from softmeet.readers.union_tokenizer import union_tokenizer


class Union(Alphabet, Protocol):
    """The symbols of a union of tokens, of which one is the end.

    Attributes:
        end: the symbol that ends a text, or begins one.
    """

    @property
    def end(self) -> int:
        """The symbol that ends a text, or begins one."""

    @property
    def words(self) -> Sequence[bytes]:
        """What each symbol but the last, the end, spells; two may spell the same."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer that turns the symbols into text."""


@dataclass(frozen=True, eq=False)
class UnionAlphabet:
    """The byte strings that any of several tokenizers has a token for, and one symbol for the end of a text.

    A text can be written in many ways; :meth:`encode` cuts it as the first tokenizer does.

    Attributes:
        words: the byte strings, in order, each once. Symbol k is ``words[k]``, and the last symbol the end.
        first: how the first tokenizer's tokens are spelled.

    Example:
        >>> from softmeet import Ensemble
        >>> from softmeet.members.spelling import spelling_of
        >>> tokenizer = Ensemble.from_pretrained("wide").tokenizer
        >>> alphabet = UnionAlphabet.of([spelling_of("it", tokenizer)])
        >>> alphabet.decode(alphabet.encode("In the beginning"))
        b'In the beginning'
    """

    words: Sequence[bytes]
    first: Spelling
    spelling: ClassVar[None] = None

    @classmethod
    def of(cls, spellings: Sequence[Spelling]) -> UnionAlphabet:
        """Return the union of some tokenizers' tokens."""
        return cls(sorted({word for one in spellings for word in one.words}), spellings[0])

    @property
    def size(self) -> int:
        """The number of symbols, the end included."""
        return len(self.words) + 1

    @property
    def end(self) -> int:
        """The symbol that ends a text, or begins one."""
        return len(self.words)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The symbols that end a text: the last one alone."""
        return frozenset({self.end})

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer of the symbols (:func:`softmeet.readers.union_tokenizer.union_tokenizer`)."""
        return union_tokenizer(self.words)

    def symbol(self, word: bytes) -> int:
        """Return the symbol of a byte string that is one.

        Raises:
            KeyError: if it is none.
        """
        found = bisect_left(self.words, word)
        if found == len(self.words) or self.words[found] != word:
            raise KeyError(word)
        return found

    def encode(self, text: str) -> list[int]:
        """Return the symbols of a text, cut as the first tokenizer cuts it."""
        tokens = self.first.cut_writable(text.encode())
        return [self.symbol(self.first.spelled([token])) for token in tokens]

    def decode(self, symbols: Sequence[int]) -> bytes:
        """Return the bytes of symbols, none for the end."""
        return b"".join(self.words[k] for k in symbols if k != self.end)

    def count(self, symbols: Sequence[int]) -> int:
        """Return the number of symbols, by which texts are limited."""
        return len(symbols)

    def may_follow(self, symbols: Sequence[int]) -> None:
        """Return None: any symbol can follow."""
        return
