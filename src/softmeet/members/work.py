"""What bytes cost a member."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a text has cost one member: calls of its model, tokens run in them, and mass estimated, summed over bytes.

    A call that serves several texts counts for each of them, and one that reads a prefix, which is kept, for none.
    """

    calls: int = 0
    tokens: int = 0
    dropped: float = 0.0

    def and_(self, calls: int = 0, tokens: int = 0, dropped: float = 0.0) -> Work:
        """Give this work with so many more calls, tokens and so much more estimated mass."""
        return Work(self.calls + calls, self.tokens + tokens, self.dropped + dropped)
