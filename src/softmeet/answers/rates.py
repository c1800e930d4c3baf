"""Shares of right answers with their intervals, and how two of them at the same questions differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Of fewer wrong or right answers an area under the curve tells nothing.
_FEWEST = 10
# The quantile of the normal distribution for 95 %.
_Z = 1.959964
# An area so near is taken for another.
_NEAR = 1e-9


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


def predicted(right: Sequence[float]) -> tuple[float, float]:
    """Return between which shares that of as many other questions of the same kind lies, with a probability of 95 %.

    These are quantiles of the beta-binomial distribution that follows from Jeffreys' prior.

    Example:
        >>> predicted([True] * 60 + [False] * 40)
        (0.46, 0.73)
    """
    from scipy.stats import betabinom

    k, n = sum(right), len(right)
    low, high = betabinom(n, k + 0.5, n - k + 0.5).ppf([0.025, 0.975])
    return float(low / n), float(high / n)


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


def auroc(doubts: Sequence[float], wrong: Sequence[bool]) -> Rate | None:
    """Return how well doubts tell wrong answers from right ones: the area under the ROC curve, with its interval.

    That is the probability that of a wrong and a right answer the wrong one is doubted more, equal doubts counting
    half; 0.5 is chance. The interval is Newcombe's (his method 5), which holds near 0 and 1, too. NaN, a doubt that
    nobody knows, is left out.

    Source: Newcombe, Confidence intervals for an effect size measure based on the Mann-Whitney statistic. Part 2,
    Statistics in Medicine 25, 2006.

    Returns:
        None if fewer than ten answers are wrong, or right, of which an interval would say too much.

    Example:
        >>> round(auroc([*range(10), *range(5, 15)], [False] * 10 + [True] * 10).mean, 3)
        0.875
    """
    from scipy.optimize import brentq

    own, bad = np.asarray(doubts, float), np.asarray(wrong, bool)
    own, bad = own[~np.isnan(own)], bad[~np.isnan(own)]
    m, n = int(bad.sum()), int((~bad).sum())
    if min(m, n) < _FEWEST:
        return None
    doubted, trusted = own[bad][:, None], own[~bad]
    area = float(((doubted > trusted) + 0.5 * (doubted == trusted)).mean())

    def beyond(true: float, side: int) -> float:
        """How far the area is beyond what is likely at a true one; positive at 0, or at 1, if ``side`` is -1."""
        more = (m + n) / 2 - 1
        variance = true * (1 - true) * (1 + more * ((1 - true) / (2 - true) + true / (1 + true))) / (m * n)
        return side * (area - true) - _Z * math.sqrt(variance)

    # At the area itself, 0 or 1, the variance is 0 as well.
    low = float(brentq(beyond, 0.0, area - _NEAR, args=(1,))) if area > _NEAR else 0.0
    high = float(brentq(beyond, area + _NEAR, 1.0, args=(-1,))) if area < 1 - _NEAR else 1.0
    return Rate(area, low, high)


def _apart(ours: Sequence[float], theirs: Sequence[float]) -> tuple[int, int]:
    """Return how many questions only the first answers rightly, and how many only the second."""
    pairs = list(zip(ours, theirs, strict=True))
    return sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
