"""Paired differences with intervals that know that neighbouring tokens are not independent.

Positions come in clusters: documents where there are at least ten, else contiguous blocks, about twenty in all, none of
which crosses a document. A difference per token is a ratio of sums over clusters; its error is the linearised one over
clusters with Student's t (Cochran, *Sampling Techniques*, 1977, §6.3), on one degree of freedom fewer than clusters.
An interval from blocks of one text speaks of texts like that one, not of others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.errors import InvalidInputError

ENOUGH_DOCUMENTS = 10
BLOCKS = 20


@dataclass(frozen=True)
class Difference:
    """A paired difference in nats per token, with its 95 % interval by cluster."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is known at 95 %."""
        return self.low > 0 or self.high < 0

    def figures(self) -> dict[str, Any]:
        """Give the difference in nats and its 95 % interval, under the names that reports have."""
        return {"delta": self.mean, "ci95": [self.low, self.high]}

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which cluster each position is in, (N,), numbered from 0 in order; ``kind`` is ``documents`` or ``blocks``."""

    of: Int[Tensor, " N"]
    kind: str

    @property
    def count(self) -> int:
        """How many clusters the interval is taken over."""
        return int(self.of.max()) + 1

    def sums(self, values: Float[Tensor, " N"]) -> Float[Tensor, " C"]:
        """Sums over each cluster, fp64."""
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.of, values.double())

    def take(self, rows: Tensor) -> Clusters:
        """Those of some positions, numbered anew."""
        return Clusters(self.of[rows].unique(return_inverse=True)[1], self.kind)


def clusters(document: Int[Tensor, " N"]) -> Clusters:
    """Documents if there are ten, else blocks, from the document of each position.

    Raises:
        InvalidInputError: there are fewer than two positions.
    """
    if len(document) < 2:
        raise InvalidInputError(f"expected at least two positions for an interval, got {len(document)}")
    ids, place, sizes = document.unique(return_inverse=True, return_counts=True)
    if len(ids) >= ENOUGH_DOCUMENTS:
        return Clusters(place, "documents")
    found, start = torch.empty_like(document), 0
    for k, size in enumerate(sizes.tolist()):
        parts = max(1, min(size, round(BLOCKS * size / len(document))))
        own = torch.arange(size) * parts // size
        found[place == k] = own + start
        start += parts
    return Clusters(found, "blocks")


def paired(ours: Float[Tensor, " N"], theirs: Float[Tensor, " N"], within: Clusters) -> Difference:
    """Ours minus theirs, per token.

    Args:
        ours, theirs: nats at each position.
        within: the clusters; of one alone nothing follows, and the interval is infinite.
    """
    from scipy.stats import t as student_t

    sums, sizes = within.sums(ours.double() - theirs.double()), within.sums(torch.ones_like(ours))
    C, center = len(sizes), (sums.sum() / sizes.sum()).item()
    if C < 2:
        return Difference(center, -math.inf, math.inf)
    spread = ((sums - center * sizes) ** 2).sum().item() * C / (C - 1)
    half = float(student_t.ppf(0.975, C - 1)) * math.sqrt(spread) / sizes.sum().item()
    return Difference(center, center - half, center + half)
