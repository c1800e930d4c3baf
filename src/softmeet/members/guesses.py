"""Likely next tokens of a text: they are run before their bytes have come, in a call for tokens that are needed."""

from __future__ import annotations

from softmeet.members.covers import NextTokenProbs
from softmeet.members.reading import Guess, Reading
from softmeet.members.spelling import Spelling

# A token is run before it is needed if its probability is at least _LIKELY, at most _GUESSES at once. Beside a single
# open cover they are run only if their probabilities sum to _WORTH: on a CPU, a product with one vector takes half the
# time of one with several.
_LIKELY, _GUESSES, _WORTH = 0.04, 5, 0.6


def likely(reading: Reading, spelling: Spelling, limit: int, asking: int) -> list[tuple[NextTokenProbs, int]]:
    """Choose the tokens to run ahead of need, none that was guessed already.

    Args:
        reading: the text so far.
        spelling: the member's.
        limit: the number of tokens in the member's context.
        asking: the number of open covers that the model is run on in the same call.

    Returns:
        (the probabilities at the token's place, its id) for each.
    """
    known = {(id(guess.behind), guess.token) for guess in reading.guesses}
    found, together = list[tuple[NextTokenProbs, int]](), 0.0
    for probs, k, share in reading.covers.likely(spelling, _LIKELY, _GUESSES):
        token = int(spelling.tokens[k])
        if len(probs.path) < limit and (id(probs), token) not in known:
            found.append((probs, token))
            together += share
    return [] if asking == 1 and together < _WORTH else found


def possible(reading: Reading, spelling: Spelling) -> tuple[Guess, ...]:
    """Return the guesses that may still be used: their token begins with the bytes read since, and is longer."""
    if not reading.guesses:
        return ()
    rests = {id(cover.probs): cover.rest for cover in reading.covers.closed}
    found = []
    for guess in reading.guesses:
        rest, word = rests.get(id(guess.behind)), spelling.spelled([guess.token])
        if rest is not None and len(word) > len(rest) and word.startswith(rest):
            found.append(guess)
    return tuple(found)
