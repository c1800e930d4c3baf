"""The tokenizer's own tokens of a text as a model is given them, and which of them it still has to be run on.

The *path* of some bytes is a sequence of tokens that depends on these bytes alone, however they are read: all at once,
in pieces, or one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from softmeet.members.spelling import Spelling
from softmeet.readers.bytes.next_tokens import NextTokenProbs
from softmeet.readers.bytes.nodes import Chain, Node, Path

# A space between a byte that is none and a letter or digit: every pre-tokenizer begins anew there.
_BREAKS = re.compile(rb"[^\s](?= [0-9A-Za-z])")
_SPACES, _LETTER = re.compile(rb"\s\s\Z"), b"a"
# The bytes after which a text without such a space is cut.
_STRETCH = 256
# The bytes among which a place is looked for that no token spans.
_PARTING = 1024


def path_of(spelling: Spelling, written: bytes) -> list[int]:
    """Return the ids of the tokens that a model is given for the bytes ``written``.

    They are those of :meth:`Spelling.encode`, but for two things. A stretch of more than 256 bytes without a place that
    surely separates tokens is cut every 256 bytes, so that the tokens of a longer text are found by its end alone. And
    white space at the end is cut as it is before a letter: GPT-2's pre-tokenizer has a token of two line breaks only
    where no text follows, and a model expects none behind it.

    Args:
        spelling: the member's.
        written: the bytes that tokens spell, as :meth:`Spelling.written` makes them of a text.
    """
    breaks = (found.start() + 1 for found in _BREAKS.finditer(written))
    ends = [0, *(place for place in breaks if _separates(spelling, written, place)), len(written)]
    places = [0, *(place for start, end in pairwise(ends) for place in _forced(written, start, end)), len(written)]
    return [token for start, end in pairwise(places) for token in _cut(spelling, written[start:end])]


def _cut(spelling: Spelling, written: bytes) -> list[int]:
    """Return the tokenizer's own tokens, those of white space at the end as before a letter, if they end there."""
    if _SPACES.search(written):
        tokens = spelling.cut(written + _LETTER)
        if spelling.spelled(tokens[-1:]) == _LETTER:
            return tokens[:-1]
    return spelling.cut(written)


def anchor_of(spelling: Spelling, written: bytes) -> int:
    """Return the last place before the end of some bytes at which :func:`path_of` surely ends a token, 0 if none.

    The path of these bytes, and of all that begin with them, is the path up to the anchor, and behind it the path of
    the bytes behind it.
    """
    start = _break(spelling, written)
    return next(reversed(_forced(written, start, len(written))), start)


def parting(spelling: Spelling, written: bytes, latest: int) -> int:
    """Return the last place up to ``latest`` that no word which fits the bytes around it spans.

    If there is none in the 1,024 places before, the last is returned at which :func:`path_of` ends a token.
    """
    for place in range(latest, max(latest - _PARTING, 0), -1):
        if not _is_spanned(spelling, written, place):
            return place
    if latest < _PARTING:
        return 0
    ends = spelling.bounds(path_of(spelling, written))
    return int(ends[np.searchsorted(ends, latest, side="right") - 1])


def _is_spanned(spelling: Spelling, written: bytes, place: int) -> bool:
    """Return whether a word begins before a place and ends behind it in these bytes, or could behind their end."""
    for start in range(place - 1, max(-1, place - spelling.longest), -1):
        low, high = 0, len(spelling.words)
        for end in range(place + 1, min(len(written), start + spelling.longest) + 1):
            first, low, high = spelling.among(written[start:end], low, high)
            if first < low:
                return True
            if low == high:
                break
        else:
            return place < len(written)
    return False


def _separates(spelling: Spelling, written: bytes, space: int) -> bool:
    """Return whether no word of the vocabulary has the byte before a space and the space."""
    return written[space - 1 : space + 1] not in spelling.inner_spaces


def _break(spelling: Spelling, written: bytes) -> int:
    """Return the last place, two bytes or more before the end, at which a space surely begins a token; 0 if none."""
    end = len(written) - 1
    while (space := written.rfind(b" ", 1, max(1, end))) > 0:
        if _BREAKS.match(written, space - 1) and _separates(spelling, written, space):
            return space
        end = space
    return 0


def _forced(written: bytes, start: int, end: int) -> list[int]:
    """Return the places at which a stretch without breaks is cut: every 256 bytes, before a whole character."""
    found = list[int]()
    while end - start > _STRETCH:
        start += _STRETCH
        while start < end and written[start] & 0xC0 == 0x80:
            start += 1
        if start < end:
            found.append(start)
    return found


def way(spelling: Spelling, written: bytes, known: Iterable[tuple[Path, int]]) -> Chain:
    """Return how a model gets behind all tokens of the path of some bytes.

    Args:
        spelling: the member's.
        written: the bytes, at least one, as :meth:`Spelling.written` makes them.
        known: at least one path that has been run, (it, the number of bytes that its tokens spell); it begins with the
            tokens before the text, and follows the tokenizer's own tokens.

    Returns:
        Those tokens of it that have been run, with the others, at least one, behind the last of which a prediction is
        wanted.
    """
    candidates, anchor, tokens = list(known), len(written), list[int]()
    while True:
        start = anchor_of(spelling, written[:anchor])
        tokens = [*path_of(spelling, written[start:anchor]), *tokens]
        anchor = start
        paths = dict[int, tuple[Node, int]]()
        for path, place in candidates:
            if place >= anchor:
                _note(paths, spelling, path, place, anchor)
        ends = anchor + spelling.bounds(tokens)
        for count in range(len(tokens) - 1, -1, -1):
            found = paths.get(int(ends[count]))
            if found is not None and (path := Path(*found)).last(count) == tuple(tokens[:count]):
                return Chain(path, tokens[count:], [len(tokens) - count])


def _note(paths: dict[int, tuple[Node, int]], spelling: Spelling, path: Path, place: int, anchor: int) -> None:
    """Put the beginnings of a path into ``paths``, by the place at which they end, back to ``anchor``."""
    node, length = path
    while True:
        paths.setdefault(place, (node, length))
        if place <= anchor:
            return
        length -= 1
        place -= spelling.length(node.tokens[length])


def is_own(spelling: Spelling, written: bytes, probs: NextTokenProbs) -> bool:
    """Return whether ``probs`` are those behind the path of some bytes, if they are behind that to its anchor."""
    tokens = path_of(spelling, written[anchor_of(spelling, written) :])
    return probs.place == len(written) and probs.path.last(len(tokens)) == tuple(tokens)
