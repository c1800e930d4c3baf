"""Paired differences of losses, with intervals that allow for dependence between nearby tokens; and parts of a text.

Positions are clustered: by document if there are at least ten documents, else in contiguous blocks, about twenty in
all, none of which crosses a document's end. A difference per token is a ratio of sums over clusters; its error is the
linearised one over clusters (Cochran, *Sampling Techniques*, 1977, §6.3), with Student's t on one degree of freedom
fewer than there are clusters. An interval from blocks of one text holds for texts like that one, not for others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.evaluation.positions import Positions

_ENOUGH_DOCUMENTS = 10
_BLOCKS = 20
PARTS = ("fit", "select", "test")
# The fewest clusters of a text that can be split: three for each part.
_FEWEST = 3 * len(PARTS)


@dataclass(frozen=True)
class Difference:
    """The mean loss of one minus that of another at the same positions, in nats per token, with its 95 % interval.

    Attributes:
        mean: the difference; negative if the one that is named first is better.
        low, high: the ends of the interval, from differences by cluster (document or block of text).
        p: the two-sided p-value of no difference, by Student's t like the interval; NaN if it is unknown.
    """

    mean: float
    low: float
    high: float
    p: float = math.nan

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95 % interval excludes zero."""
        return self.low > 0 or self.high < 0

    def figures(self) -> dict[str, Any]:
        """Return the difference in nats as ``delta`` and its 95 % interval as ``ci95``, the names that reports use.

        >>> Difference(-0.5, -0.75, -0.25).figures()
        {'delta': -0.5, 'ci95': [-0.75, -0.25]}
        """
        return {"delta": self.mean, "ci95": [self.low, self.high]}

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True, eq=False)
class Clusters:
    """The clusters of N positions, within which errors may depend on each other.

    Attributes:
        of: the cluster of each position, (N,), int64, numbered from 0 without gaps.
        kind: the kind of cluster, ``"documents"`` or ``"blocks"``.
    """

    of: Int[Tensor, " N"]
    kind: str

    @property
    def count(self) -> int:
        """The number C of different clusters among the N positions."""
        return int(self.of.max()) + 1

    def sums(self, values: Float[Tensor, " N"]) -> Float[Tensor, " C"]:
        """Return the sum of ``values``, one a position, over each cluster: entry c is that of cluster c, (C,), fp64."""
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.of, values.double())

    def take(self, rows: Tensor) -> Clusters:
        """Return the clusters of the positions at ``rows`` (indices or a mask), in that order, numbered anew."""
        return Clusters(self.of[rows].unique(return_inverse=True)[1], self.kind)


def clusters(document: Int[Tensor, " N"]) -> Clusters:
    """Cluster positions by document if there are at least ten documents, else by contiguous blocks within documents.

    There are about twenty blocks in all, at least one for each document.

    Args:
        document: the document of each position, as an integer.

    Raises:
        InvalidInputError: if there are fewer than two positions.

    >>> clusters(torch.arange(12) // 2 % 5).kind
    'blocks'
    """
    if len(document) < 2:
        raise InvalidInputError(f"expected at least two positions for an interval, got {len(document)}")
    ids, place, sizes = document.unique(return_inverse=True, return_counts=True)
    if len(ids) >= _ENOUGH_DOCUMENTS:
        return Clusters(place, "documents")
    found, start = torch.empty_like(document), 0
    for k, size in enumerate(sizes.tolist()):
        parts = max(1, min(size, round(_BLOCKS * size / len(document))))
        found[place == k] = torch.arange(size) * parts // size + start
        start += parts
    return Clusters(found, "blocks")


def paired(
    ours: Float[Tensor, " N"], theirs: Float[Tensor, " N"], within: Clusters, units: Tensor | None = None
) -> Difference:
    """Estimate the mean of ``ours`` minus ``theirs`` per token, or per other unit, with its 95 % interval.

    Args:
        ours: losses, in nats.
        theirs: losses at the same positions, in nats.
        within: the clusters of these positions; with a single one the interval is from -inf to inf.
        units: how many units each position has, such as the bytes of its token, (N,); None for one token each.

    >>> nothing = torch.zeros(4)
    >>> print(paired(torch.tensor([0.0, 1.0, 1.0, 2.0]), nothing, Clusters(torch.tensor([0, 0, 1, 1]), "documents")))
    +1.0000 [-5.3531, +7.3531]
    """
    from scipy.stats import t as student_t

    sums = within.sums(ours.double() - theirs.double())
    sizes = within.sums(torch.ones_like(ours) if units is None else units)
    C, center = len(sizes), (sums.sum() / sizes.sum()).item()
    if C < 2:
        return Difference(center, -math.inf, math.inf)
    spread = ((sums - center * sizes) ** 2).sum().item() * C / (C - 1)
    error = math.sqrt(spread) / sizes.sum().item()
    half = float(student_t.ppf(0.975, C - 1)) * error
    p = 2 * float(student_t.sf(abs(center) / error, C - 1)) if error else float(not center)
    return Difference(center, center - half, center + half, p)


@dataclass(frozen=True, eq=False)
class SplitPart:
    """One part of a text that is split by clusters.

    Attributes:
        positions: the part's positions.
        within: the clusters of these positions, numbered from 0.
    """

    positions: Positions
    within: Clusters

    def take(self, rows: Tensor) -> SplitPart:
        """Return the part's positions at ``rows`` (indices or a mask), in that order."""
        return SplitPart(self.positions.take(rows), self.within.take(rows))

    def spread_rows(self, count: int | None) -> Int[Tensor, " k"]:
        """Return the indices of at most ``count`` positions, evenly spread; of all if ``count`` is None."""
        whole = len(self.positions)
        return torch.arange(whole) if count is None or whole <= count else torch.arange(count) * whole // count

    def spread(self, count: int | None) -> SplitPart:
        """Return the part with at most ``count`` of its positions, evenly spread; all of it if ``count`` is None."""
        return self.take(self.spread_rows(count))


def split(positions: Positions) -> dict[str, SplitPart]:
    """Split positions into three parts: ``fit`` to fit on, ``select`` to choose by and ``test`` to judge by.

    Clusters (documents, or blocks of text) are dealt out in turn, so that each part has text from everywhere, and no
    cluster is in two parts.

    Args:
        positions: of a text, with or without hidden states.

    Returns:
        The parts by name, each with its positions in the order of the text.

    Raises:
        InvalidInputError: if there are fewer than nine clusters, three for each part.
    """
    within = clusters(positions.document)
    if within.count < _FEWEST:
        raise InvalidInputError(
            f"expected text enough for {_FEWEST} clusters, three for each of {', '.join(PARTS)}, got {within.count} "
            f"{within.kind}: give more text"
        )
    whole = SplitPart(positions, within)
    return {name: whole.take(within.of % len(PARTS) == k) for k, name in enumerate(PARTS)}
