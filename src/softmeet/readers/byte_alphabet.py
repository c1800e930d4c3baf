"""The symbols of a text's bytes: 0 to 255, and 256, the end of a text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool
from torch import Tensor

from softmeet.members.spelling import Spelling
from softmeet.readers.bytes.next_tokens import END, SYMBOLS


@dataclass(frozen=True, eq=False)
class ByteAlphabet:
    """The bytes and the end of a text, as the symbols of a reader.

    Attributes:
        spelling: of the tokenizer by which a text's tokens are counted.
        size, ends: 257, and the symbol 256.
    """

    spelling: Spelling
    size: int = SYMBOLS
    ends: frozenset[int] = frozenset({END})

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text in UTF-8."""
        return list(text.encode())

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the bytes of several texts."""
        return list(map(self.encode, texts))

    @property
    def identity(self) -> str:
        """The name of how texts are cut into bytes, which is the same for all."""
        return "bytes"

    def decode(self, symbols: Sequence[int]) -> bytes:
        """Return the bytes that symbols are, without those that end a text."""
        return bytes([symbol for symbol in symbols if symbol != END])

    def count(self, symbols: Sequence[int]) -> int:
        """Return how many tokens the tokenizer makes of the bytes, and one for each end of a text."""
        text = self.decode(symbols)
        return len(symbols) - len(text) + (len(self.spelling.encode(text)) if text else 0)

    def may_follow(self, symbols: Sequence[int]) -> Bool[Tensor, " v"]:
        """Return which symbols go on as UTF-8, and that no text ends within a character."""
        return continuing(begun(symbols[-3:]))


def begun(last: Sequence[int]) -> bytes:
    """Return the bytes of the character that the ``last`` symbols, at most three, have begun in UTF-8; mostly none."""
    if not last or last[-1] < 0x80 or last[-1] == END:
        return b""
    text = bytes(symbol % END for symbol in last)  # after the end a text begins, as after any whole character
    return text[codecs.utf_8_decode(text, "replace", False)[1] :]


@lru_cache(maxsize=4096)
def continuing(character: bytes) -> Bool[Tensor, " v"]:
    """Return a mask, (257,) bool, of the symbols that may follow the bytes of a character that has begun."""

    def fits(byte: int) -> bool:
        try:
            codecs.utf_8_decode(character + bytes([byte]), "strict", False)
        except UnicodeDecodeError:
            return False
        # Whether a character is a surrogate the decoder tells by its third byte, too late.
        return character != b"\xed" or byte < 0xA0

    return torch.tensor([*map(fits, range(END)), not character])


def shown_byte(symbol: int) -> str:
    r"""Return a symbol as text: an ASCII byte as its character, another as ``\xNN``, 256 (the end) as ``<|end|>``.

    Example:
        >>> shown_byte(65), shown_byte(200), shown_byte(256)
        ('A', '\\xC8', '<|end|>')
    """
    if symbol == END:
        return "<|end|>"
    return chr(symbol) if symbol < 0x80 else f"\\x{symbol:02X}"
