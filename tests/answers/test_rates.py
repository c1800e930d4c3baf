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


def test_the_area_is_mann_whitneys_and_its_interval_holds_it_as_often_as_it_says():
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        wrong = draw.random(120) < 0.4
        doubts = np.round(draw.normal(size=120) + wrong, 1)
        found = auroc(doubts, wrong)
        u = mannwhitneyu(doubts[wrong], doubts[~wrong]).statistic
        assert found.mean == pytest.approx(u / (wrong.sum() * (~wrong).sum()))
        held += found.low <= norm.cdf(1 / math.sqrt(2)) <= found.high
    assert 0.92 <= held / 400 <= 0.98
    assert auroc([*range(19)], [True] * 10 + [False] * 9) is None
    whole = auroc([*range(10, 20), *range(10)], [True] * 10 + [False] * 10)
    assert whole.mean == 1
    assert 0 < whole.low < 1


def test_other_questions_fall_where_they_are_predicted():
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(500):
        share = draw.random()
        low, high = predicted(draw.random(50) < share)
        held += low <= (draw.random(50) < share).mean() <= high
    assert 0.93 <= held / 500 <= 0.99
