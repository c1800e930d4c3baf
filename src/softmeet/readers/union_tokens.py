"""What the symbols of a union of tokens are among the tokens of one member."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from softmeet.members.spelling import Spelling
from softmeet.readers.union_alphabet import UnionAlphabet


class TokensOfSymbols(Protocol):
    """What the symbols of a union are among a member's tokens.

    Attributes:
        ids: of each symbol that the member has, the ids of the tokens for which it stands.
        start: the ids that the member reads before every text.
    """

    ids: Mapping[int, tuple[int, ...]]
    start: tuple[int, ...]

    def read_as(self, symbol: int) -> tuple[int, ...]:
        """Return the ids as which the member reads a symbol."""


class SpelledTokens:
    """The tokens of a member over the byte strings of all members' tokens.

    A byte string stands for all tokens that spell it, the end for all that end a text; tokens that spell nothing, such
    as those of chats, have no symbol. A byte string is read as the tokens into which its tokenizer cuts it; where these
    are several, and one would do, as the last of those that spell it, which is the one that stands for no single byte.

    Args:
        spelling: how the tokens are spelled.
        alphabet: the union.
        ends: the ids of tokens that end a text.
    """

    def __init__(self, spelling: Spelling, alphabet: UnionAlphabet, ends: Iterable[int]) -> None:
        self.start = tuple(spelling.start)
        self._spelling, self._alphabet = spelling, alphabet
        own_ends = sorted({*ends} | (set() if spelling.end is None else {spelling.end}))
        self._end = tuple(own_ends[:1]) if spelling.end is None else (spelling.end,)
        ids = defaultdict[int, list[int]](list)
        symbol = 0
        for word, token in zip(spelling.words, spelling.tokens.tolist(), strict=True):
            while alphabet.words[symbol] != word:
                symbol += 1
            if token not in own_ends:
                ids[symbol].append(token)
        ids[alphabet.end] = own_ends
        self.ids: Mapping[int, tuple[int, ...]] = {symbol: tuple(own) for symbol, own in ids.items() if own}
        self._cut = dict[int, tuple[int, ...]]()

    def read_as(self, symbol: int) -> tuple[int, ...]:
        """Return the ids as which the member reads a symbol."""
        if symbol == self._alphabet.end:
            return self._end
        if symbol not in self._cut:
            cut = tuple(self._spelling.cut_writable(self._alphabet.words[symbol]))
            self._cut[symbol] = cut if len(cut) == 1 or symbol not in self.ids else self.ids[symbol][-1:]
        return self._cut[symbol]


def stand_in(spelling: Spelling, alphabet: UnionAlphabet) -> Callable[[int], int | None]:
    """Return a function from a symbol to the one that stands for it where a member lacks it.

    That is the symbol of the first token into which its tokenizer cuts it; None if the member has a token that spells
    it, or none at all for it.
    """

    @lru_cache(maxsize=1 << 16)
    def stand(symbol: int) -> int | None:
        if symbol == alphabet.end:
            return None
        word = alphabet.words[symbol]
        first, longer, _ = spelling.among(word)
        cut = spelling.cut_writable(word) if first == longer else ()
        return alphabet.symbol(spelling.spelled(cut[:1])) if len(cut) else None

    return stand


def crossing(words: Sequence[bytes], spellings: Sequence[Spelling]) -> Callable[[int, int], bool]:
    """Return a function of two symbols: whether a member's tokenizer writes both by a token of which both have a part.

    Args:
        words: what the symbols spell; a symbol behind the last of them spells nothing.
        spellings: how the tokens of each member are spelled.
    """

    @lru_cache(maxsize=1 << 16)
    def crossed(before: int, after: int) -> bool:
        first, second = (words[k] if k < len(words) else b"" for k in (before, after))
        for one in spellings:
            left, right = (word.translate(None, one.unwritable) for word in (first, second))
            if left and right and len(left) not in one.bounds(one.cut(left + right)):
                return True
        return False

    return crossed
