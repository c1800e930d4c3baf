"""How much a batcher takes on at once, and for how long a rule may work on a token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from softmeet.readers.reader import Reader


@dataclass(frozen=True)
class Limits:
    """The limits on the work that a batcher accepts at once.

    Args:
        rows: the most sequences in the running batch, at least 1.
        waiting: the most sequences in the queue beside those for which the running batch has free rows, at least 0.
        kept_tokens: for each member, the most prompt tokens whose keys and values it keeps after use, so that a later
            prompt with the same beginning need not compute that beginning again.
        token_seconds: the seconds that the rule may take for each token, above 0; then the token is drawn from the best
            distribution found, with the status BUDGET. Time in which others are served does not count.
    """

    rows: int = 64
    waiting: int = 256
    kept_tokens: int = 16384
    token_seconds: float = 1.0

    def within(self, readers: Iterable[Reader]) -> Limits:
        """Return these limits, with no more sequences at once than each reader has rows for."""
        return replace(self, rows=min([self.rows, *(own.traits.rows for own in readers if own.traits.rows)]))
