"""Which members ran: where one deferred to the others, or was drawn to answer alone."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class Deferral:
    """The positions at which, by the gate ``unsure``, the first member defers to the others, so that all members run.

    It defers where its largest next-token probability is below the gate's threshold.

    Attributes:
        rows: (B,) bool, True at positions at which all members ran, False at those at which the first answers alone.
        logits: (B, v), the first member's logits at all B positions; None if they were too large to keep.
    """

    rows: Bool[Tensor, " B"]
    logits: Float[Tensor, "B v"] | None = None

    def take(self, rows: slice | Int[Tensor, " r"]) -> Deferral:
        """Return the deferral at some of the positions."""
        return Deferral(self.rows[rows], None if self.logits is None else self.logits[rows])
