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
    half; 0.5 is chance. The interval is DeLong's, on the scale of logits, of (U + ½) / (m n + 1).

    Source: DeLong, DeLong and Clarke-Pearson, Comparing the areas under two or more correlated receiver operating
    characteristic curves, Biometrics 44, 1988.

    Returns:
        None if fewer than ten answers are wrong, or right, of which an interval would say too much.

    Example:
        >>> round(auroc([*range(10), *range(5, 15)], [False] * 10 + [True] * 10).mean, 3)
        0.875
    """
    own, bad = np.asarray(doubts, float), np.asarray(wrong, bool)
    m, n = int(bad.sum()), int((~bad).sum())
    if min(m, n) < _FEWEST:
        return None
    apart = own[bad][:, None] - own[~bad]
    above = (apart > 0) + 0.5 * (apart == 0)
    area = above.mean()
    variance = above.mean(1).var(ddof=1) / m + above.mean(0).var(ddof=1) / n
    inner = (above.sum() + 0.5) / (m * n + 1)
    middle, half = math.log(inner / (1 - inner)), _Z * math.sqrt(variance) / (inner * (1 - inner))
    low, high = (1 / (1 + math.exp(-x)) for x in (middle - half, middle + half))
    return Rate(float(area), min(low, area), max(high, area))


def _apart(ours: Sequence[float], theirs: Sequence[float]) -> tuple[int, int]:
    """Return how many questions only the first answers rightly, and how many only the second."""
    pairs = list(zip(ours, theirs, strict=True))
    return sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
