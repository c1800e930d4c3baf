"""The rule ``power-mean``: its formula, its limits, the optimum that it is, and what zeros and extremes make of it."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from instances import outputs, random_heads
from scipy.optimize import minimize

import softmeet
from softmeet import Ensemble, Status
from softmeet.errors import DisjointSupportError
from softmeet.rules.pools import PowerMean
from softmeet.simplex import log_power_means, logit_mean, power_mean, prob_mean

pytestmark = pytest.mark.checked

HEADS = random_heads(20, (3, 4, 2), seed=0)
LOG_P = outputs(HEADS, 3, seed=0)
WEIGHTS = [0.2, 0.5, 0.3]
ORDERS = (0.0, 0.1, 0.5, 0.9, 1.0)


def combined(order, log_p=LOG_P, heads=HEADS, **options):
    return softmeet.combine(log_p, heads, PowerMean(order=order), **options)


def divergence(p, q, order):
    """Amari's, of two distributions in floats."""
    if order in (0, 1):
        p, q = (p, q) if order else (q, p)
        return (p * np.log(p / q)).sum()
    return (1 - (p**order * q ** (1 - order)).sum()) / (order * (1 - order))


@pytest.mark.parametrize("given", [None, WEIGHTS, [1.0, 0.0, 0.0]])
@pytest.mark.parametrize("near", [0.0, 1e-12, 1e-15, 1e-100, 1e-300, 5e-324])
def test_order_1_is_prob_mean_and_order_0_logit_mean_and_nearly_so_beside_them(near, given):
    for order, name in ((1 - near, "prob-mean"), (near, "logit-mean")):
        ours, theirs = combined(order, weights=given), softmeet.combine(LOG_P, HEADS, name, weights=given)
        assert torch.allclose(ours.log_probs, theirs.log_probs, rtol=0, atol=1e-10)
        assert torch.allclose(ours.objective, theirs.objective, rtol=0, atol=1e-10)
        if not near:
            assert torch.equal(ours.log_probs, theirs.log_probs)
            assert torch.allclose(ours.objective, theirs.objective, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("order", [1e-100, 1e-16, 1e-9, 1e-4, 0.00999, 0.01, 0.5, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("light", [1.0, 1e-12, 1e-300])
def test_no_order_loses_digits(order, scale, light):
    """Against 400 digits, with members that differ by thousands of nats and one of next to no weight."""
    log_p = (scale * LOG_P[:, 0, :8]).log_softmax(-1)
    weights = torch.tensor([light, 1.0, 1.0], dtype=torch.float64)
    with mpmath.workdps(400):
        a, w = mpmath.mpf(order), [mpmath.mpf(x) for x in weights.tolist()]
        for found, column in zip(log_power_means(log_p, weights, order).tolist(), log_p.T.tolist(), strict=True):
            mean = mpmath.fsum(x * mpmath.exp(a * mpmath.mpf(y)) for x, y in zip(w, column, strict=True))
            exact = mpmath.log(mean / mpmath.fsum(w)) / a
            assert abs(found - exact) <= 1e-14 * (1 + abs(exact))


@pytest.mark.parametrize("order", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_it_minimises_the_mean_of_amaris_divergences(order):
    """Against SciPy, from another start, and with Amari's own α; the objective is the optimum's value."""
    members = LOG_P[:, 0, :6].log_softmax(-1)
    ours = combined(order, members, [W[:6] for W in HEADS], weights=WEIGHTS)
    own = members.exp().numpy()

    def value(z):
        q = np.exp(z - z.max())
        q /= q.sum()
        return sum(w * divergence(p, q, order) for w, p in zip(WEIGHTS, own, strict=True))

    best = minimize(value, np.zeros(6), method="BFGS", options={"gtol": 1e-10})
    q = np.exp(best.x - best.x.max())
    assert ours.log_probs.exp().tolist() == pytest.approx((q / q.sum()).tolist(), abs=1e-6)
    assert ours.objective.item() == pytest.approx(best.fun, rel=1e-9)
    if 0 < order < 1:
        alpha = 1 - 2 * order  # D_α of Amari: 4 / (1 - α²) (1 - Σ p^((1 - α) / 2) q^((1 + α) / 2))
        p, q = own[:2]
        amari = 4 / (1 - alpha**2) * (1 - (p ** ((1 - alpha) / 2) * q ** ((1 + alpha) / 2)).sum())
        assert divergence(p, q, order) == pytest.approx(amari)


@pytest.mark.parametrize(("order", "tokens"), [(0.3, 20), (0.3, 15), (1 - 1e-6, 20), (1 - 1e-6, 15), (1 - 1e-9, 20)])
def test_the_objective_has_its_value_on_a_support_and_near_order_1(order, tokens):
    support = torch.arange(20) < tokens
    ours = combined(order, weights=WEIGHTS, support=support)
    conditional = power_mean(LOG_P, torch.tensor(WEIGHTS, dtype=torch.float64), order)[:, support].log_softmax(-1)
    assert torch.allclose(ours.log_probs[:, support], conditional, rtol=0, atol=1e-13)
    assert ours.log_probs[:, ~support].isneginf().all()
    with mpmath.workdps(60):
        a = mpmath.mpf(order)
        for row in range(3):
            q = ours.log_probs[row].exp().tolist()
            expected = mpmath.mpf(0)
            for w, own in zip(WEIGHTS, LOG_P[:, row].exp().tolist(), strict=True):
                shared = mpmath.fsum(mpmath.mpf(x) ** a * mpmath.mpf(y) ** (1 - a) for x, y in zip(own, q, strict=True))
                expected += w * (1 - shared) / (a * (1 - a))
            assert ours.objective[row].item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_what_changes_nothing(order):
    """A member twice with its weight shared, one without weight, the units of weights, the rest of a batch."""
    ours = combined(order, weights=WEIGHTS)
    split = combined(order, LOG_P[[0, 1, 2, 1]], [*HEADS, HEADS[1]], weights=[0.2, 0.2, 0.3, 0.3])
    idle = combined(order, LOG_P[[0, 1, 2, 0]], [*HEADS, HEADS[0]], weights=[*WEIGHTS, 0.0])
    scaled = combined(order, weights=[20 * w for w in WEIGHTS], free_weights=True)
    alone = [combined(order, LOG_P[:, k], weights=WEIGHTS) for k in range(3)]
    for other in (split, idle, scaled):
        assert torch.allclose(other.log_probs, ours.log_probs, rtol=0, atol=1e-13)
        assert torch.allclose(other.objective, ours.objective, rtol=0, atol=1e-13)
    assert torch.equal(torch.stack([one.log_probs for one in alone]), ours.log_probs)
    assert torch.equal(torch.stack([one.objective for one in alone]), ours.objective)


@pytest.mark.parametrize("order", [*ORDERS, 1e-3, 1e-12])
def test_members_that_agree_are_the_answer(order):
    same = combined(order, LOG_P[[0, 0, 0]], HEADS, weights=WEIGHTS)
    assert torch.allclose(same.log_probs, LOG_P[0], rtol=0, atol=1e-13)
    assert same.objective.abs().max() < 1e-14
    one = combined(order, LOG_P[:1], HEADS[:1])
    assert torch.allclose(one.log_probs, LOG_P[0], rtol=0, atol=1e-13)


def test_a_member_that_excludes_a_token_adds_nothing_to_its_mean():
    p = torch.tensor([[[0.5, 0.5, 0.0, 0.0]], [[0.5, 0.0, 0.5, 0.0]]], dtype=torch.float64)
    heads = [torch.eye(4)[:, :2]] * 2
    for order in (0.5, 1e-3, 1.0):
        half = 0.5 ** (1 / order) * 0.5
        expected = torch.tensor([[0.5, half, half, 0.0]], dtype=torch.float64) / (0.5 + 2 * half)
        ours = combined(order, p.log(), heads)
        assert torch.allclose(ours.log_probs.exp(), expected, rtol=1e-12)
        assert ours.log_probs[0, 3].isneginf()
        assert ours.objective.isfinite().all()
        assert ours.verify(heads, p.log()).status == Status.OPTIMAL
    for order in (0.0, 1e-12, 1e-200):
        assert torch.allclose(combined(order, p.log(), heads).log_probs.exp(), torch.eye(4)[:1].double(), atol=1e-15)
    assert combined(0.0, p.log(), heads).log_probs[0, 1:].isneginf().all()
    left = combined(0.0, p.log(), heads, weights=[1.0, 0.0])
    assert torch.allclose(left.log_probs.exp(), p[0])
    assert not PowerMean().can_assign_zeros


@pytest.mark.parametrize("order", [0.5, 1.0, 1e-3])
def test_members_without_a_common_token_are_a_mixture_but_at_order_0(order):
    apart = torch.tensor([[[0.5, 0.5, 0.0]], [[0.0, 0.0, 1.0]]], dtype=torch.float64).log()
    heads = [torch.eye(3)[:, :1]] * 2
    ours = combined(order, apart, heads, weights=[0.75, 0.25])
    light = 3 ** (-1 / order)
    assert ours.log_probs.exp()[0].tolist() == pytest.approx(
        [0.5 / (1 + light), 0.5 / (1 + light), light / (1 + light)]
    )
    with pytest.raises(DisjointSupportError, match="found none in rows"):
        combined(0, apart, heads)


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, -1e-300, -1.0, -50.0, -800.0, -1e6, -1e30, -math.inf]), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.sampled_from([0.0, 5e-324, 1e-300, 1e-12, 0.3, 1.0, 1e300]), min_size=4, max_size=4),
    st.one_of(st.floats(0, 1), st.sampled_from([5e-324, 1e-154, 1e-150, 1e-20, 0.01, 1 - 2**-53])),
)
@example([[0.0, -1e30, -math.inf], [-math.inf, -1e30, 0.0]], [1e-300, 1.0, 0.0, 0.0], 1e-150)
def test_hostile_members_weights_and_orders_give_a_distribution(scores, weights, order):
    """Between the least and the largest member of weight at every token, before it is normalised; never NaN."""
    log_p = torch.tensor(scores, dtype=torch.float64)
    log_p = torch.where(log_p.isneginf().all(-1, keepdim=True), 0.0, log_p).log_softmax(-1)
    w = torch.tensor(weights[: len(scores)], dtype=torch.float64)
    w = torch.ones_like(w) if w.sum() == 0 else w / w.max()
    w = w / w.sum()
    means = log_power_means(log_p, w, order)
    assert not means.isnan().any()
    weighed = log_p[w > 0]
    slack = 1e-12 * means.abs().nan_to_num(0.0, neginf=0.0) + 1e-12
    assert (means <= weighed.amax(0) + slack).all()
    assert (means >= weighed.amin(0) - slack).all()
    if not means.isneginf().all():
        assert power_mean(log_p, w, order).logsumexp(-1).abs() < 1e-12


def test_single_precision():
    log_p, weights = LOG_P.float(), torch.tensor(WEIGHTS)
    for order in (0.0, 1e-30, 1e-15, 1e-6, 0.5, 1.0):
        exact = power_mean(log_p.double(), weights.double(), order)
        assert torch.allclose(power_mean(log_p, weights, order).double(), exact, rtol=0, atol=2e-5)
    assert torch.equal(power_mean(log_p, weights, 0.0), logit_mean(log_p, weights))
    assert torch.equal(power_mean(log_p, weights, 1.0), prob_mean(log_p, weights))


@pytest.mark.parametrize(("family", "vocabulary"), [("wide", "tokens"), ("mixed", "bytes")])
def test_ensembles_write_by_order_1_what_they_write_by_prob_mean(family, vocabulary):
    ours, texts = Ensemble.from_pretrained(family), []
    assert ours.model.config.vocabulary == vocabulary
    for rule in ("power-mean:order=1", "prob-mean"):
        ours.model.config.rule = rule
        texts.append(ours.generate("And the king", max_new_tokens=6, do_sample=True, seed=1))
    assert texts[0] == texts[1]
