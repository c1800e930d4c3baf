"""Three parts of a text: to fit on, to choose by, and to judge by.

Clusters (documents, or contiguous blocks) are dealt out in turn, so that each part holds text from everywhere and no
cluster is in two parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.evaluation.intervals import Clusters, clusters
from softmeet.evaluation.positions import Positions

PARTS = ("fit", "select", "test")
_FEWEST = 3 * 3


@dataclass(frozen=True, eq=False)
class Part:
    """Some positions and their clusters."""

    positions: Positions
    within: Clusters

    def subset(self, count: int) -> Positions:
        """At most ``count`` positions, evenly spread."""
        return self.spread(count).positions

    def spread(self, count: int) -> Part:
        """The same with at most ``count`` positions, evenly spread."""
        if len(self.positions) <= count:
            return self
        rows: Int[Tensor, " k"] = torch.arange(count) * len(self.positions) // count
        return Part(self.positions.take(rows), self.within.take(rows))


def split(positions: Positions) -> dict[str, Part]:
    """The parts under their names.

    Raises:
        InvalidInputError: the text gives fewer than nine clusters, three a part.
    """
    within = clusters(positions.document)
    if within.count < _FEWEST:
        raise InvalidInputError(
            f"expected text enough for {_FEWEST} clusters, three for each of {', '.join(PARTS)}, got {within.count} "
            f"{within.kind}: give more text"
        )
    found = {}
    for k, name in enumerate(PARTS):
        rows = (within.of % len(PARTS) == k).nonzero().squeeze(-1)
        found[name] = Part(positions.take(rows), within.take(rows))
    return found
