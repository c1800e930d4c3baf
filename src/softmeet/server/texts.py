"""How clients are shown single tokens: the bytes of each, a text that tells it from all others, and where it begins."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import Any

from softmeet.engine.text import REPLACEMENT, Pieces
from softmeet.members.spelling import Spelling, token_bytes

# Symbols below are bytes; those between these two are characters that are seen.
_BYTES, _SPACE, _ASCII = 256, 32, 127


def shown_bytes(own: bytes) -> str:
    r"""Return bytes as text; those that are no text in OpenAI's form, ``bytes:\xf0\x9f``."""
    try:
        return own.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


def cut(symbols: Sequence[int], spelling: Spelling) -> list[int]:
    """Cut symbols over bytes where a tokenizer cuts their text, and return the lengths of the parts.

    An end of a text is a part of its own, and so is each byte of what the tokenizer cannot spell.

    Args:
        symbols: bytes, 0 to 255, and ends.
        spelling: of the tokenizer.
    """
    found = list[int]()
    for is_text, group in groupby(symbols, lambda symbol: symbol < _BYTES):
        own = list(group)
        lengths = [spelling.length(token) for token in spelling.encode(bytes(own))] if is_text else []
        if lengths:
            lengths[0] -= len(spelling.dummy)
        whole = sum(lengths) == len(own) and min(lengths, default=0) >= 0
        found += [length for length in lengths if length] if whole else [1] * len(own)
    return found


class Cutting:
    """Cuts symbols over bytes into a tokenizer's tokens while they come, as :func:`cut` does once all are known.

    What stands behind the newest space between two words may still be cut otherwise, and waits.

    Args:
        spelling: of the tokenizer.
    """

    def __init__(self, spelling: Spelling) -> None:
        self._spelling, self._symbols, self._given = spelling, list[int](), 0

    def push(self, symbols: Sequence[int], *, last: bool) -> list[list[int]]:
        """Add symbols, and return the places, from 0, of those in each token that has become certain.

        Args:
            symbols: bytes, 0 to 255, and ends.
            last: whether no others follow, so that nothing waits.
        """
        self._symbols += symbols
        certain, before = len(self._symbols) if last else self._newest_space(), self._given
        ends = accumulate(cut(self._symbols[:certain], self._spelling)) if certain > before else []
        new = [end for end in ends if end > before]
        self._given = new[-1] if new else before
        return [[*range(start, end)] for start, end in pairwise([before, *new])]

    def _newest_space(self) -> int:
        """Return the place of the newest space at which the text is cut whatever follows, 0 if there is none."""
        each = ((k, self._symbols[k - 1]) for k in range(len(self._symbols) - 1, self._given, -1))
        return next((k for k, before in each if self._symbols[k] == _SPACE and self._is_cut_behind(before)), 0)

    def _is_cut_behind(self, symbol: int) -> bool:
        is_seen = _SPACE < symbol < _ASCII
        return is_seen and bytes([symbol, _SPACE]) not in self._spelling.inner_spaces


class TokenTexts:
    """The tokens of one tokenizer, as bytes and as texts; :func:`token_texts` keeps one for each.

    Args:
        tokenizer: a fast tokenizer of transformers. Where its tokens cannot be read as bytes (a WordPiece vocabulary,
            say), a token's bytes are those of its text, decoded alone.

    Attributes:
        longest: the length in bytes of the longest token; 0 if tokens cannot be read as bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._bytes = tokenizer, token_bytes(tokenizer)
        self.longest = max(map(len, self._bytes.values()), default=0)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token id stands for; of a special token, those of its name."""
        found = self._bytes.get(token)
        return str(self._tokenizer.decode([token])).encode() if found is None else found

    def text_of(self, token: int) -> str:
        r"""Return a token's text; of one that is no text by itself, its bytes in OpenAI's form, ``bytes:\xf0\x9f``."""
        return shown_bytes(self.bytes_of(token))


@lru_cache(maxsize=64)
def token_texts(tokenizer: Any) -> TokenTexts:
    """Return the texts of a tokenizer's tokens; the first call reads its whole vocabulary, which takes a second."""
    return TokenTexts(tokenizer)


class Places:
    """Where tokens begin in their text, told as they come.

    A token that goes on within a character begins at that character.

    Args:
        tokenizer: a fast tokenizer of transformers.
        start: the characters before the first token.
        special: whether special tokens are part of the text.
    """

    def __init__(self, tokenizer: Any, start: int = 0, *, special: bool) -> None:
        self._pieces, self._texts = Pieces(tokenizer, special=special), token_texts(tokenizer)
        self._skipped = frozenset[int]() if special else frozenset(tokenizer.all_special_ids)
        # Characters that are certain, bytes whose text is not, and how many characters are complete in these.
        self._certain, self._held, self._ahead = start, b"", 0

    def push(self, token: int) -> int:
        """Add a token, and return the number of complete characters before it."""
        at = self._certain + self._ahead
        if piece := self._pieces.push(token):
            self._certain += len(piece)
            self._held, self._ahead = b"", 0
        elif token not in self._skipped:
            self._hold(self._texts.bytes_of(token))
        return at

    def _hold(self, more: bytes) -> None:
        """Add bytes that have no text yet, and count the characters in them, without one that may go on."""
        held = self._held + more
        text = getincrementaldecoder("utf-8")("replace").decode(held)
        # What is held back is at fault, or ends like it; other bytes are left out, as a space before a text is.
        if text.encode() == held and not text.endswith(REPLACEMENT):
            held, text = b"", ""
        self._held, self._ahead = held, len(text)
