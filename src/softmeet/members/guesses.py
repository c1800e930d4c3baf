"""Likely next tokens of a text: they are run before their bytes have come, in a call for tokens that are needed."""

from __future__ import annotations

from collections.abc import Sequence

from softmeet.members.covers import NextTokenProbs
from softmeet.members.own_path import way
from softmeet.members.reading import Guess, Reading
from softmeet.members.spelling import Spelling

# A token is run before it is needed if its probability is at least _LIKELY, at most _GUESSES at once. Beside a single
# open cover they are run only if their probabilities sum to _WORTH: on a CPU, a product with one vector takes half the
# time of one with several.
_LIKELY, _GUESSES, _WORTH = 0.04, 5, 0.6


def likely(reading: Reading, spelling: Spelling, limit: int, asking: int) -> list[tuple[NextTokenProbs, int]]:
    """Choose the tokens to run ahead of need: none that was guessed already or would not be the tokenizer's own.

    Args:
        reading: the text so far.
        spelling: the member's.
        limit: the number of tokens in the member's context.
        asking: the number of open covers that the model is run on in the same call.

    Returns:
        (the probabilities at the token's place, its id) for each.
    """
    known = {(guess.place, guess.word) for guess in reading.guesses}
    written = spelling.written(reading.text)
    found, together = list[tuple[NextTokenProbs, int]](), 0.0
    for probs, k, share in reading.covers.likely(spelling, _LIKELY, _GUESSES):
        token, word = int(spelling.tokens[k]), spelling.words[k]
        if len(probs.path) >= limit or (probs.place + len(word), word) in known:
            continue
        path, tokens = way(spelling, reading.tree, written[: probs.place] + word, [(probs.path, probs.place)])
        if tokens == [token] and len(path) == len(probs.path):
            found.append((probs, token))
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
