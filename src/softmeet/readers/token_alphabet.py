"""The tokens of a tokenizer, as the symbols of a reader."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError


@dataclass(frozen=True, eq=False)
class TokenAlphabet:
    """The tokens of a tokenizer, as the symbols of a reader.

    Attributes:
        tokenizer: the tokenizer; None where no text is ever encoded or decoded.
        size: the number of ids, padding of the vocabulary included.
        ends: the ids that end a text.
        spelling: None, as symbols are tokens.
    """

    tokenizer: PreTrainedTokenizerBase | None
    size: int
    ends: frozenset[int]
    spelling: None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenAlphabet:
        """Return the tokens of a tokenizer, of which its end-of-text token ends a text."""
        return cls(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id} - {None}))

    @cached_property
    def _texts(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InvalidInputError("expected a reader with a tokenizer, to encode or decode a text: give it one")
        return self.tokenizer

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._texts.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without those that the tokenizer puts before every text."""
        return list(self._texts.encode(text, add_special_tokens=False))

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of several texts, as :meth:`encode` does, at the same time if the tokenizer can."""
        return list(map(list, self._texts(list(texts), add_special_tokens=False, verbose=False)["input_ids"]))

    @property
    def identity(self) -> str:
        """A hash of how texts are cut into tokens."""
        backend: Any = getattr(self._texts, "backend_tokenizer", None)
        said = repr(sorted(self._texts.get_vocab().items())) if backend is None else backend.to_str()
        return hashlib.sha256(said.encode()).hexdigest()

    def decode(self, symbols: Sequence[int]) -> bytes:
        """Return the bytes of tokens."""
        kept = [token for token in symbols if token not in self._special]
        return str(self._texts.decode(kept, clean_up_tokenization_spaces=False)).encode()

    def count(self, symbols: Sequence[int]) -> int:
        """Return the number of tokens."""
        return len(symbols)

    def may_follow(self, symbols: Sequence[int]) -> None:
        """Return None: any token can follow."""
        return
