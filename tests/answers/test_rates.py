"""Intervals and tests of shares, against outside formulas and exhaustive sums."""

from __future__ import annotations

import math
from itertools import product

import pytest
from scipy.stats import norm

from softmeet.answers.rates import mcnemar, rate


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (3, 10), (57, 200)])
def test_wilsons_interval(right, count):
    found, z, p = rate([True] * right + [False] * (count - right)), norm.ppf(0.975), right / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    assert found.mean == p
    assert [found.low, found.high] == pytest.approx([max(0, centre - half), min(1, centre + half)])


@pytest.mark.parametrize(("more", "fewer"), [(0, 0), (1, 0), (6, 0), (5, 2), (3, 3), (1, 9)])
def test_mcnemars_p_value_sums_all_outcomes_as_unlikely(more, fewer):
    n = more + fewer
    ours = [True] * more + [False] * fewer + [True, False]
    theirs = [False] * more + [True] * fewer + [True, False]
    every = [sum(outcome) for outcome in product((0, 1), repeat=n)]
    likely = every.count(more)
    expected = sum(1 for one in every if every.count(one) <= likely) / len(every)
    assert mcnemar(ours, theirs) == pytest.approx(expected)
