"""The span of words that a member proposes, which writes one token after another."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# The most tokens of a word.
MOST_TOKENS = 12
# Whitespace, if there is any, and what is none, up to the next whitespace.
_WORD = re.compile(rb"\s*\S*")


@dataclass
class Span:
    """Words as one member writes them, token by token.

    Args:
        margin: the least margin at which the member goes on to a next word.
        words: the most words.

    Attributes:
        text: their bytes; once they are complete, without what was written behind the last word.
        ended: whether the text ends behind them.
        complete: whether nothing follows.

    Example:
        >>> span = Span(margin=0.5, words=2)
        >>> for word, margin in ((b" the", 0.9), (b" kin", 0.4), (b"g", 0.9), (b" said", 0.9)):
        ...     span.add(word, margin)
        >>> span.text, span.complete
        (b' the king', True)
    """

    margin: float
    words: int
    text: bytes = b""
    ended: bool = False
    complete: bool = False
    _tokens: int = 0
    # Where the word begins that is being written.
    _start: int = 0
    # Of which token each byte is, and that token's margin.
    _of: list[tuple[int, float]] = field(default_factory=list)

    def add(self, word: bytes | None, margin: float) -> None:
        """Add a token.

        Args:
            word: what it spells; None for the end of the text.
            margin: by how much it was more probable than any other token.
        """
        self._of += [(self._tokens, margin)] * len(word or b"")
        self.text, self.ended, self._tokens = self.text + (word or b""), word is None, self._tokens + 1
        while not self.complete and (end := self._word_end()) < len(self.text):
            _, own = self._of[self._start]
            self._start, self.words = end, self.words - 1
            if not self.words or own < self.margin:
                self.text, self.ended, self.complete = self.text[:end], False, True
        self.complete |= self.ended or self._tokens - self._first() >= MOST_TOKENS

    def _word_end(self) -> int:
        found = _WORD.match(self.text, self._start)
        assert found is not None, "it matches any bytes"
        return found.end()

    def _first(self) -> int:
        """Return the number of the token with which the word begins that is written."""
        return self._of[self._start][0] if self._start < len(self._of) else self._tokens
