"""Shares of right answers with their intervals, and how two of them at the same questions differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The quantile of the normal distribution for 95 %.
_Z = 1.959964


@dataclass(frozen=True)
class Rate:
    """A share, or a difference of shares, with its 95 % interval.

    Attributes:
        mean: the share.
        low, high: the ends of the interval.
    """

    mean: float
    low: float
    high: float


def rate(right: Sequence[float]) -> Rate:
    """Return the share of questions that were answered rightly, with Wilson's interval.

    Args:
        right: for each question 1 if it was, else 0.

    Example:
        >>> found = rate([True, True, False, True])
        >>> found.mean, round(found.low, 4), round(found.high, 4)
        (0.75, 0.3006, 0.9544)
    """
    from scipy.stats import binomtest

    found = binomtest(int(sum(right)), len(right))
    interval = found.proportion_ci(0.95, "wilson")
    return Rate(float(found.statistic), float(interval.low), float(interval.high))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Rate:
    """Return the share of ``ours`` minus that of ``theirs`` at the same questions, with Bonett's and Price's interval.

    It stays open where both answer alike. Source: Bonett and Price, Adjusted Wald confidence interval for a difference
    of binomial proportions based on paired data, Journal of Educational and Behavioral Statistics 37, 2012.
    """
    n = len(ours)
    more, fewer = _apart(ours, theirs)
    p, q = (more + 1) / (n + 2), (fewer + 1) / (n + 2)
    half = _Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Rate((more - fewer) / n, max(-1.0, p - q - half), min(1.0, p - q + half))


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the two-sided exact p-value of McNemar's test that both answer as many questions rightly.

    Example:
        >>> mcnemar([True] * 6 + [False], [False] * 6 + [False])
        0.03125
    """
    from scipy.stats import binomtest

    more, fewer = _apart(ours, theirs)
    return float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0


def _apart(ours: Sequence[float], theirs: Sequence[float]) -> tuple[int, int]:
    """Return how many questions only the first answers rightly, and how many only the second."""
    pairs = list(zip(ours, theirs, strict=True))
    return sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
