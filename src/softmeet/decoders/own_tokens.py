"""Members that write in tokens of their own, and the base class of decoders that have them do so."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from softmeet.decoders.base import Decoder, Texts, refuse_given
from softmeet.errors import InvalidInputError
from softmeet.rules.gates import that_closes
from softmeet.rules.pools import LogitMean
from softmeet.rules.settings import Settings


@dataclass(frozen=True, eq=False)
class OwnTokens:
    """The tokens of one member: how they are spelled, and which of them end a text.

    A token's *number* is its index among the ordinary tokens, sorted by what they spell, not its id.

    Attributes:
        words: m byte strings of a byte or more, sorted: what each ordinary token spells; two may spell the same.
        ids: (m,), the id of each.
        ends: the ids that end a text, in order; none of them is an ordinary token.
        cut: cuts bytes into ordinary tokens as the member's tokenizer does, and returns their ids.
    """

    words: Sequence[bytes]
    ids: Int[np.ndarray, " m"]
    ends: tuple[int, ...]
    cut: Callable[[bytes], list[int]]

    @classmethod
    def of(
        cls, pairs: Iterable[tuple[bytes, int]], ends: Iterable[int], cut: Callable[[bytes], list[int]]
    ) -> OwnTokens:
        """Return the tokens of (what it spells, id) pairs, of which those that end a text are left out."""
        last = tuple(sorted(ends))
        kept = sorted(pair for pair in pairs if pair[1] not in last)
        return cls([word for word, _ in kept], np.array([token for _, token in kept], dtype=np.int64), last, cut)

    @cached_property
    def spelling(self) -> Mapping[int, bytes]:
        """What each ordinary token spells, by its id."""
        return dict(zip(self.ids.tolist(), self.words, strict=True))

    @cached_property
    def by_word(self) -> Mapping[bytes, Sequence[int]]:
        """The ids of the ordinary tokens that spell a byte string."""
        found = defaultdict[bytes, list[int]](list)
        for word, token in zip(self.words, self.ids.tolist(), strict=True):
            found[word].append(token)
        return dict(found)

    @cached_property
    def longest(self) -> int:
        """The number of bytes of the longest word."""
        return max(map(len, self.words))

    @cached_property
    def beginnings(self) -> Int[np.ndarray, " m"]:
        """How each word begins: 257 a for a word of one byte a, 257 a + b + 1 for one that begins with a and b."""
        return np.array([257 * word[0] + (word[1] + 1 if len(word) > 1 else 0) for word in self.words])

    def longer(self, beginning: bytes) -> slice:
        """Return the numbers of the words that begin with some bytes and are longer."""
        low = bisect_right(self.words, beginning)
        return slice(low, bisect_left(self.words, True, low, key=lambda word: not word.startswith(beginning)))

    def spelled(self, tokens: Sequence[int]) -> bytes:
        """Return what tokens spell; those that end a text spell nothing."""
        return b"".join(self.spelling.get(token, b"") for token in tokens)


@dataclass(frozen=True, eq=False)
class OwnTexts:
    """A member by itself: texts in its own tokens.

    Attributes:
        texts: the texts, whose symbols are the ids of the member's tokens; what it predicts of them is (1, k, v).
        tokens: these tokens.
    """

    texts: Texts
    tokens: OwnTokens


class OwnTokensDecoder(Decoder):
    """A decoder by which each member writes in tokens of its own, and what they write is compared as bytes.

    It is for members over tokens or over a union of tokens, and weighs log-probabilities, as the rule ``logit-mean``
    does. Its ``decode`` is given :class:`OwnTexts`, one for each member, and the ends of the first member's tokens.
    """

    own_tokens: ClassVar[bool] = True

    def require(self, settings: Settings) -> None:
        """Check that the rule is the weighted mean of log-probabilities, and that nothing changes or replaces it.

        Raises:
            InvalidInputError: if not.
        """
        if not isinstance(settings.rule, LogitMean):
            raise InvalidInputError(
                f"the decoder {self.name} weighs log-probabilities, which {settings.rule} does not: choose the rule "
                "logit-mean"
            )
        weights: Any = settings.weights if isinstance(settings.weights, tuple) else ()
        refuse_given(
            self,
            {
                f"the gate {settings.gate}": that_closes(settings.gate) is not None,
                "rule_temperature": settings.rule_temperature != 1,
                "plausibility": settings.rule.plausibility > 0,
                "weights below 0": min(weights, default=0.0) < 0,
            },
        )
