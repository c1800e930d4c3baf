"""The union of several tokenizers' tokens, as byte strings: the symbols of members that are combined over it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from softmeet.members.spelling import Spelling
from softmeet.readers.reader import Alphabet

# No word is written so: of a word's letters none is a space.
_END = "<|end of text|>"
# What stands before the number of a word that another spells, too: no letter that stands for a byte.
_AGAIN = "\ue000"


def union_tokenizer(words: Sequence[bytes]) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose id k is the byte string ``words[k]``, and whose last id is the end, which also pads.

    It turns symbols into text. Text becomes symbols in some way, whole words where these are symbols and else bytes:
    members read texts as their own tokenizers cut them. Where words are equal, text becomes the first of them.

    Example:
        >>> union_tokenizer([b"a", b"b c"]).decode([1, 0, 2], skip_special_tokens=True)
        'b ca'
    """
    letters = bytes_to_unicode()
    vocabulary = dict[str, int]()
    for k, word in enumerate(words):
        name = "".join(letters[byte] for byte in word)
        vocabulary[name if name and name not in vocabulary else f"{name}{_AGAIN}{k}"] = k
    core = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if len(set(words) - {b""}) < len(words):
        core.decoder = decoders.Sequence([decoders.Replace(Regex(f"{_AGAIN}[0-9]+"), ""), decoders.ByteLevel()])
    core.add_special_tokens([AddedToken(_END, special=True)])
    assert core.token_to_id(_END) == len(words)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=_END, eos_token=_END, pad_token=_END, padding_side="left",
        split_special_tokens=True, clean_up_tokenization_spaces=False,
    )  # fmt: skip


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
        """A tokenizer of the symbols (:func:`softmeet.readers.union_alphabet.union_tokenizer`)."""
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
