"""Which members ran: where one deferred to the others, or was drawn to answer alone."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass
class Deferral:
    """The positions at which, by the gate ``unsure``, the first member defers to the others, so that all members run.

    It defers where its largest next-token probability is below the gate's threshold.

    Attributes:
        rows: (B,) bool, True at positions at which all members ran, False at those at which the first answers alone.
        logits: (B, v), the first member's logits at all B positions; None if they were too large to keep.
        seconds: the time in seconds that running the other members took.
    """

    rows: Bool[Tensor, " B"]
    logits: Float[Tensor, "B v"] | None = None
    seconds: float = 0.0

    def take(self, rows: slice) -> Deferral:
        """Return the deferral at the positions in the slice ``rows``, with ``seconds`` 0."""
        return Deferral(self.rows[rows], None if self.logits is None else self.logits[rows])
