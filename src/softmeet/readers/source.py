"""``Source``: where symbols of a text stand in files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where symbols of a text stand in files that a reader knows; of several places it is one.

    Attributes:
        start, end: which symbols of the text these are.
        path: the file.
        below: its path below the folder that was named, for those who need not know where that is.
        line: that of the first of them, from 1.
        changed: whether the file is gone, or holds something else than when it was read.
        before, after: of a stretch what stood around it when it was read: the rest of its lines, and two lines more,
            cut where they are long.
    """

    start: int
    end: int
    path: str
    below: str
    line: int
    changed: bool
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        """Return the file, the line and the number of symbols, as in ``a.py:12 (7)``."""
        return f"{self.path}:{self.line} ({self.end - self.start}{', changed since' if self.changed else ''})"
