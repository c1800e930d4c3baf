"""``Repeats``: drafts from a text itself, by what followed its last tokens where they stood before.

Saxena's prompt lookup (2023) drafts so, as does suffix decoding (Oliaro et al., 2024), which looks for the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

# How many tokens are looked for, the most first.
LENGTHS = (16, 8, 4, 2)


class Repeats:
    """The tokens of a text, by those before them.

    Example:
        >>> Repeats().next([5, 6, 7, 8, 5, 6])
        (7, 3)
    """

    def __init__(self) -> None:
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in LENGTHS]
        self._known = 0

    def next(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> tuple[int, int] | None:
        """Return what followed the last time, behind as many tokens as possible.

        Args:
            tokens: the text; what an earlier call was given is its beginning.
            drafts: what may follow it.

        Returns:
            (the token, the number of the length in ``LENGTHS`` at which its tokens stood before); None if none did.
        """
        for place in range(self._known, len(tokens)):
            for places, length in zip(self._places, LENGTHS, strict=True):
                if place >= length:
                    places[tuple(tokens[place - length : place])] = place
        self._known = len(tokens)
        text = [*tokens[-LENGTHS[0] :], *drafts][-LENGTHS[0] :]
        for level, length in enumerate(LENGTHS):
            found = self._places[level].get(tuple(text[-length:]))
            if found is not None:
                return tokens[found], level
        return None
