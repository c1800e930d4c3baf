"""Laws of the mathematics (design §2, §3), on drawn instances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import best_outputs, outputs, random_heads, zipf

import softmeet
from softmeet import Status
from softmeet.simplex import kl, total_variation

pytestmark = pytest.mark.checked

# The first law is checked, shapes and all; the others call the same functions some hundred times each.
unchecked = pytest.mark.unchecked
# Enough where no rule is drawn as well.
fewer = settings(max_examples=6)
some = settings(max_examples=15)
V = 30
seeds = st.integers(0, 10_000)
trusts = st.tuples(*[st.floats(0.05, 20.0)] * 2)
rules = st.sampled_from(["meet", "max-entropy", "logit-mean", "prob-mean", "power-mean", "one-hot"])
OPTIONS = {"tol": 1e-11, "max_steps": 200}


def draw(seed, widths=(3, 4), batch=2):
    heads = random_heads(V, widths, seed)
    return outputs(heads, batch, seed), heads


def close(a, b, atol=1e-5):
    return total_variation(a.log_probs, b.log_probs).max() < atol


@some
@given(seeds, rules, trusts)
def test_on_the_simplex(seed, rule, trust):
    log_p, heads = draw(seed)
    solution = softmeet.combine(log_p, heads, rule, trust=trust, **OPTIONS)
    assert solution.log_probs.logsumexp(-1).abs().max() < 1e-12
    assert (solution.disagreement >= 0).all()
    if rule == "meet":
        assert solution.log_probs.isfinite().all()


@unchecked
@fewer
@given(seeds, trusts)
def test_invariant_to_changes_of_basis_and_added_constants(seed, trust):
    log_p, heads = draw(seed)
    generator = torch.Generator().manual_seed(seed)
    other = []
    for W in heads:
        M = torch.randn(W.shape[1], W.shape[1], generator=generator, dtype=torch.float64) + 3 * torch.eye(W.shape[1])
        other.append(W @ M + torch.randn(W.shape[1], generator=generator, dtype=torch.float64))
    ours = softmeet.combine(log_p, heads, trust=trust, **OPTIONS)
    moved = softmeet.combine(log_p, other, trust=trust, **OPTIONS)
    assert close(ours, moved)
    assert torch.allclose(ours.residual, moved.residual, atol=1e-6)
    assert torch.allclose(ours.disagreement, moved.disagreement, atol=1e-6)


@unchecked
@some
@given(seeds, rules, trusts)
def test_equivariant_to_the_order_of_tokens_and_members(seed, rule, trust):
    log_p, heads = draw(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(V, generator=generator)
    weights = [0.3, 0.7]
    ours = softmeet.combine(log_p, heads, rule, trust=trust, weights=weights, **OPTIONS)
    shuffled = softmeet.combine(
        log_p[..., order], [W[order] for W in heads], rule, trust=trust, weights=weights, **OPTIONS
    )
    assert total_variation(ours.log_probs[:, order], shuffled.log_probs).max() < 1e-5
    swapped = softmeet.combine(log_p.flip(0), heads[::-1], rule, trust=trust[::-1], weights=weights[::-1], **OPTIONS)
    assert close(ours, swapped)
    assert torch.allclose(ours.disagreement.flip(0), swapped.disagreement, atol=1e-6)


@unchecked
@some
@given(seeds, rules, trusts)
def test_batched_equals_looped(seed, rule, trust):
    log_p, heads = draw(seed, batch=4)
    together = softmeet.combine(log_p.unflatten(1, (2, 2)), heads, rule, trust=trust, **OPTIONS)
    assert together.log_probs.shape == (2, 2, V)
    assert together.disagreement.shape == together.residual.shape == (2, 2, 2)
    for k in range(4):
        alone = softmeet.combine(log_p[:, k], heads, rule, trust=trust, **OPTIONS)
        assert total_variation(alone.log_probs, together.log_probs.flatten(0, 1)[k]) < 1e-6
        assert alone.status == together.status.flatten()[k]


@unchecked
@fewer
@given(seeds, st.floats(0.05, 20.0))
def test_shared_column_spaces_make_meet_logit_averaging(seed, scale):
    """With biases that agree but for what columns make up for."""
    (W,), generator = random_heads(V, (4,), seed), torch.Generator().manual_seed(seed)
    mix, bias, shift = (torch.randn(*size, generator=generator).double() for size in ((4, 4), (V,), (4,)))
    heads = [softmeet.SoftmaxHead(W, bias), softmeet.SoftmaxHead(W @ mix, bias + W @ shift)]
    states = torch.randn(2, 2, 4, generator=generator).double()
    log_p, weights = torch.stack([h.log_probs(x) for h, x in zip(heads, states, strict=True)]), [0.25, 0.75]
    meet = softmeet.combine(log_p, heads, trust=[scale * w for w in weights], weights=weights, **OPTIONS)
    assert close(meet, softmeet.combine(log_p, heads, "logit-mean", weights=weights))


@unchecked
@fewer
@given(seeds, trusts, st.sampled_from(["logit-mean", "prob-mean"]))
def test_the_guarantee_is_an_identity(seed, trust, pool):
    """KL(p*‖p_λ) + Σρ KL(proj_i(p*)‖r_i) = KL(p*‖q) + Σρ D_i(p*) + f(λ), for every truth."""
    log_p, heads = draw(seed)
    truth = zipf(2, V, seed)
    solution = softmeet.combine(log_p, heads, trust=trust, pool=pool, **OPTIONS)
    q = softmeet.combine(log_p, heads, pool).log_probs
    projected = best_outputs(heads, truth)
    rho = torch.tensor(trust)[:, None]
    in_family = (rho * torch.stack([kl(a, b) for a, b in zip(projected, log_p, strict=True)])).sum(0)
    corrected = []
    for W, lam, own, t in zip(heads, solution._answer.dual, log_p, trust, strict=True):
        corrected.append((own - lam @ W.T / t).log_softmax(-1))
    left = kl(truth.log(), solution.log_probs)
    left = left + (rho * torch.stack([kl(a, b) for a, b in zip(projected, corrected, strict=True)])).sum(0)
    right = kl(truth.log(), q) + in_family - solution.objective
    assert torch.allclose(left, right, atol=1e-6)


@unchecked
@fewer
@given(seeds, trusts)
def test_the_value_is_concave_and_its_slope_is_the_disagreement(seed, trust):
    log_p, heads = draw(seed)

    def value(t):
        return softmeet.combine(log_p, heads, trust=t, **OPTIONS)

    step = 1e-4
    here, there = value(trust), value((trust[0] * (1 + step), trust[1]))
    assert (there.objective >= here.objective - 1e-10).all()
    slope = (there.objective - here.objective) / (step * trust[0])
    assert torch.allclose(slope, 0.5 * (here.disagreement[0] + there.disagreement[0]), atol=1e-5)
    assert (value((2 * trust[0], trust[1])).disagreement[0] <= here.disagreement[0] + 1e-7).all()
    middle = value((1.5 * trust[0], trust[1])).objective
    assert (middle >= 0.5 * (here.objective + value((2 * trust[0], trust[1])).objective) - 1e-9).all()


@unchecked
@fewer
@given(seeds)
def test_trust_to_zero_is_the_pool(seed):
    log_p, heads = draw(seed)
    pool = softmeet.combine(log_p, heads, "logit-mean")
    distances = [
        total_variation(softmeet.combine(log_p, heads, trust=t, **OPTIONS).log_probs, pool.log_probs).max()
        for t in (1e-1, 1e-3, 1e-5)
    ]
    assert distances[1] < 0.1 * distances[0] + 1e-9
    assert distances[2] < 1e-3


@unchecked
@fewer
@given(seeds)
def test_trust_to_infinity_is_max_entropy_when_the_premise_holds(seed):
    heads = random_heads(V, (3, 4), seed)
    log_p = best_outputs(heads, zipf(2, V, seed))
    exact = softmeet.combine(log_p, heads, "max-entropy", tol=1e-9, max_steps=200)
    assert (exact.status == Status.OPTIMAL).all()
    assert close(softmeet.combine(log_p, heads, trust=1e5, tol=1e-9, max_steps=200), exact, atol=1e-3)
    assert close(softmeet.combine(log_p, heads, trust=math.inf, tol=1e-9, max_steps=200), exact, atol=1e-4)


@unchecked
@fewer
@given(seeds, st.floats(0.1, 10.0))
def test_no_worse_than_its_pool_by_at_least_v_under_the_premise(seed, trust):
    heads = random_heads(V, (3, 4), seed)
    truth = zipf(2, V, seed)
    log_p = best_outputs(heads, truth)
    meet = softmeet.combine(log_p, heads, trust=trust, **OPTIONS)
    pool = softmeet.combine(log_p, heads, "logit-mean")
    gain = kl(truth.log(), pool.log_probs) - kl(truth.log(), meet.log_probs)
    assert (gain >= meet.objective - 1e-7).all()
