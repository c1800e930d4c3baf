"""All pairs of rows of an evaluation, with p-values that hold for all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from softmeet.evaluation.intervals import Clusters, paired
from softmeet.evaluation.scores import Scores


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's method: rejecting those of at most α errs anywhere with probability α at most.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics, 1979.

    Args:
        p: p-values; NaN, of a comparison that could not be made, stays and counts as none.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    known = sorted((k for k in range(len(p)) if not math.isnan(p[k])), key=p.__getitem__)
    found, least = list(p), 0.0
    for place, k in enumerate(known):
        least = max(least, min(1.0, (len(known) - place) * p[k]))
        found[k] = least
    return found


def all_pairs(rows: Mapping[str, Scores], within: Clusters) -> list[dict[str, Any]]:
    """Compare every two rows: the first one's mean loss minus the second's, in nats per token or byte.

    Returns:
        for each pair ``first``, ``second``, ``delta``, its interval ``ci95``, its p-value ``p`` and ``p_holm``, that of
        all pairs together.
    """
    pairs = list(combinations(rows, 2))
    differences = [paired(rows[one].nats, rows[other].nats, within) for one, other in pairs]
    adjusted = holm([own.p for own in differences])
    return [
        {"first": one, "second": other, **own.figures(), "p": own.p, "p_holm": p}
        for (one, other), own, p in zip(pairs, differences, adjusted, strict=True)
    ]
