"""Intervals and tests of shares, against outside formulas and exhaustive sums."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm

from softmeet.answers.rates import auroc, mcnemar, predicted, rate


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


@pytest.mark.parametrize(("m", "n", "area"), [(48, 72, 0.76), (10, 10, 0.98), (10, 300, 0.9), (10, 10, 0.05)])
def test_the_area_is_mann_whitneys_and_its_interval_holds_it_as_often_as_it_says(m, n, area):
    draw, held = np.random.default_rng(0), 0
    for _ in range(400):
        doubts = np.concatenate([draw.normal(math.sqrt(2) * norm.ppf(area), size=m), draw.normal(size=n)])
        found = auroc(doubts, [True] * m + [False] * n)
        assert found.mean == pytest.approx(mannwhitneyu(doubts[:m], doubts[m:]).statistic / (m * n))
        held += found.low <= area <= found.high
    assert 0.92 <= held / 400 <= 0.985


def test_areas_of_doubts_that_are_few_or_equal_or_have_no_end():
    wrong = [True] * 10 + [False] * 10
    assert auroc([*range(19)], wrong[:19]) is None
    assert auroc([*range(10, 20), *range(10)], wrong).low == pytest.approx(0.8, abs=0.01)
    assert auroc([math.inf] * 20, wrong).mean == auroc([1.0] * 20, wrong).mean == 0.5
    assert auroc([math.nan, *range(19)], wrong) is None
    assert auroc([math.nan, *range(10, 20), *range(10)], [True, *wrong]).mean == 1


def test_other_questions_fall_where_they_are_predicted():
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(500):
        share = draw.random()
        low, high = predicted(draw.random(50) < share)
        held += low <= (draw.random(50) < share).mean() <= high
    assert 0.93 <= held / 500 <= 0.99
