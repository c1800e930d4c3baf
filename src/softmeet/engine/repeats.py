"""``Repeats``: drafts from a text itself, by what followed its last tokens where they stood before.

Saxena's prompt lookup (2023) drafts so, as does suffix decoding (Oliaro et al., 2024), which looks for the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

from softmeet.engine.pace import Share

# How many tokens are looked for, the most first; and before anything is known, how often what followed them follows
# again, and what goes on as far behind as before where none of them stood before, with the weight of so many times.
LENGTHS, _SHARES, _TIMES = (16, 8, 4, 2), (0.9, 0.8, 0.6, 0.4, 0.3), 2.0


class Repeats:
    """The tokens of a text, by those before them, and how often they were what followed then.

    Example:
        >>> Repeats().next([5, 6, 7, 8, 5, 6])
        (7, 0.4)
    """

    def __init__(self) -> None:
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in LENGTHS]
        self._shares = [Share(_TIMES * share, _TIMES) for share in _SHARES]
        self._known = self._behind = 0

    def next(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> tuple[int, float]:
        """Return what followed the last time, behind as many tokens as possible.

        Behind a token that was replaced, as in an edited text, what is repeated goes on as far behind as before.

        Args:
            tokens: the text; what an earlier call was given is its beginning. What follows that beginning tells how
                often such a draft would have been right.
            drafts: what may follow it.

        Returns:
            (the token, how likely it is to be right); (0, 0.0) if nothing is repeated.
        """
        for place in range(self._known, len(tokens)):
            before = tokens[max(0, place - LENGTHS[0]) : place]
            if self._known and (found := self._find(before, place)) is not None:
                level, source = found
                self._shares[level].add(tokens[source] == tokens[place])
                self._behind = place - source
            for places, length in zip(self._places, LENGTHS, strict=True):
                if place >= length:
                    places[tuple(before[-length:])] = place
        self._known = len(tokens)
        found = self._find([*tokens[-LENGTHS[0] :], *drafts][-LENGTHS[0] :], len(tokens) + len(drafts))
        if found is None or found[1] >= len(tokens):
            return 0, 0.0
        return tokens[found[1]], self._shares[found[0]].value

    def _find(self, before: Sequence[int], place: int) -> tuple[int, int] | None:
        """Return what a place repeats behind some tokens: (the number of the length at which they match, where)."""
        for level, places in enumerate(self._places):
            if (source := places.get(tuple(before[-LENGTHS[level] :]))) is not None:
                return level, source
        return (len(LENGTHS), place - self._behind) if self._behind else None
