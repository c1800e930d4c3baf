"""Likely next tokens of a text: they are run before their bytes have come, in a call for tokens that are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from softmeet.members.spelling import Spelling
from softmeet.readers.bytes.nodes import Chain
from softmeet.readers.bytes.own_path import way
from softmeet.readers.bytes.reading import Guess, Reading

# A token is run before it is needed if its probability is at least _LIKELY, at most _GUESSES at once. Beside a single
# open cover they are run only if their probabilities sum to _WORTH: on a CPU, a product with one vector takes half the
# time of one with several.
_LIKELY, _GUESSES, _WORTH = 0.04, 5, 0.6


class LikelyToken(NamedTuple):
    """A likely next token of a text, and how the model gets behind it.

    Attributes:
        place: the number of the text's bytes with those of the token.
        word: the bytes that it spells.
        chain: the tokenizer's own tokens of all these bytes.
    """

    place: int
    word: bytes
    chain: Chain


def likely(reading: Reading, spelling: Spelling, limit: int, asking: int) -> list[LikelyToken]:
    """Choose the tokens to run ahead of need, none that was guessed already.

    Args:
        reading: the text so far.
        spelling: the member's.
        limit: the number of tokens in the member's context.
        asking: the number of open covers that the model is run on in the same call.
    """
    known = {(guess.place, guess.word) for guess in reading.guesses}
    written, places = spelling.written(reading.text), [(one.path, one.place) for one in reading.covers.places]
    found, together = list[LikelyToken](), 0.0
    for probs, k, share in reading.covers.likely(spelling, _LIKELY, _GUESSES):
        word = spelling.words[k]
        if (probs.place + len(word), word) in known:
            continue
        chain = way(spelling, written[: probs.place] + word, places)
        if chain.length <= limit:
            found.append(LikelyToken(probs.place + len(word), word, chain))
            together += share
    return [] if asking == 1 and together < _WORTH else found


def possible(guesses: Sequence[Guess], written: bytes) -> tuple[Guess, ...]:
    """Return the guesses whose token begins with the bytes that have come since, and is longer.

    Args:
        guesses: those of a text.
        written: the bytes that its tokens spell, as :meth:`Spelling.written` makes them.
    """
    return tuple(
        one for one in guesses if len(written) < one.place and one.word.startswith(written[one.place - len(one.word) :])
    )
