"""How long an answer is that is written symbol by symbol: in tokens, as an alphabet counts them.

Where symbols are tokens, that is their number. Over bytes it is the number that the first member's tokenizer makes of
the answer alone. There a further character may join the tokens before it, so that a text has as many tokens as it had
at most behind any of its characters. An answer ends before the first character with which these would be more than it
may have and, if that character goes on with a word, before the word, unless nothing else was written or the word began
more than sixteen tokens before the limit. Bytes that are no character count as the tokenizer cuts them, and a symbol
256 that does not end the text as a token.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from functools import lru_cache

from softmeet.members.spelling import Spelling
from softmeet.readers.reader import Alphabet

# Up to so many bytes before its end, a text may be cut otherwise once more is written.
_REACH = 64
# A space behind something else, where most tokenizers cut every text.
_CUT = re.compile(rb"(?<=\S) ")
# The bytes of a character at most.
_CHARACTER = 4
# A word that begins so many tokens before the limit, or fewer, is kept as a whole or not at all.
_NEAR = 16


class AnswerLength:
    """The length of an answer that is written symbol by symbol, and whether it may go on.

    Args:
        alphabet: that of the symbols, by which tokens are counted.
        most: the most tokens, at least 0; None for any number.
        most_symbols: the most symbols, at least 0; None for any number.

    Attributes:
        kept: how many symbols belong to the answer for certain: all but a character that has not ended, or with which
            the answer would be too long, and near the limit a word that has not ended.
        is_over: whether the answer has come to a limit.
        longest: the most symbols that are written, those of a character too many included; None for any number.

    Example:
        >>> from softmeet.readers.token_alphabet import TokenAlphabet
        >>> length = AnswerLength(TokenAlphabet(None, 100, frozenset()), most=2)
        >>> length.push(7), length.push(8), length.kept
        (True, False, 2)
    """

    def __init__(self, alphabet: Alphabet, most: int | None, most_symbols: int | None = None) -> None:
        self._alphabet, self._spelling = alphabet, alphabet.spelling
        self._symbols, self._decoder = list[int](), codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.kept, self.is_over = 0, 0 in (most, most_symbols)
        # How many symbols the newest word, with the space before it, stands behind; how many whole characters have; and
        # how many tokens were left behind how many symbols.
        self._word = self._whole = 0
        self._left = (most or 0, 0)
        in_tokens, self._most, self._fitting = most, None, 0
        if self._spelling is not None and most is not None:
            # Bytes that no token spells make no tokens.
            in_tokens = most * self._spelling.longest + _CHARACTER * (most > 0)
            # A token has a byte or more: up to so many symbols cannot be too many tokens.
            self._most, self._fitting = most, most - len(self._spelling.dummy)
        self.longest = min((limit for limit in (in_tokens, most_symbols) if limit is not None), default=None)

    @property
    def count(self) -> int:
        """The number of symbols so far."""
        return len(self._symbols)

    def push(self, symbol: int) -> bool:
        """Take note of the next symbol, and return whether another one may follow."""
        self._symbols.append(symbol)
        written = "" if self._spelling is None else self._decoder.decode(self._alphabet.decode([symbol]))
        if not self._decoder.getstate()[0]:
            self.is_over = self._exceeds(written)
            self.kept = self._certain(written[-1:])
        if not self.is_over and self.longest is not None and self.count >= self.longest:
            self.kept, self.is_over = self.count, True
        return not self.is_over

    def _certain(self, character: str) -> int:
        """Return how many symbols belong to the answer for certain, now that it goes on or ends with a character."""
        in_word = self._most is not None and (character == " " or _is_of_word(character))
        begins = character == " " or not in_word
        if self.is_over:
            is_kept_back = not begins and 0 < self._word == self.kept
            return self.kept if is_kept_back else self._whole
        self._whole, self._word = self.count, self.count - (character == " ") if begins else self._word
        left, behind = self._left
        is_near = left - (self.count - behind) <= _NEAR
        return self._word if in_word and is_near and self.kept <= self._word else self.count

    def _exceeds(self, written: str) -> bool:
        """Return whether the answer has too many tokens, now that it ends with these characters.

        It is cut into tokens, as a whole, only where that may be.
        """
        if self._most is None or (self.count <= self._fitting and not any(map(_is_odd, written))):
            return False
        left, text = self._most - self._alphabet.count(self._symbols), self._alphabet.decode(self._symbols)
        self._left = left, self.count
        cuts = [found.start() for found in _CUT.finditer(text, max(1, len(text) - _REACH))]
        behind = len(text) - cuts[-1] if cuts and self._spelling is not None and _cuts(self._spelling) else _REACH
        self._fitting = self.count + left - behind
        return left < 0


def _is_of_word(character: str) -> bool:
    """Return whether a character may stand within a word that is written with spaces around it."""
    return character.isascii() and (character.isalnum() or character in ("'", "_"))


@lru_cache(maxsize=16)
def _cuts(spelling: Spelling) -> bool:
    """Return whether no token has a space behind something else, so that every text is cut there."""
    return not any(map(_CUT.search, spelling.words))


def _is_odd(character: str) -> bool:
    """Return whether a character is no letter, mark, number or punctuation, so that a tokenizer may change it.

    The whole text is then cut in another way.
    """
    return not character.isascii() and unicodedata.category(character)[0] in "SC"
