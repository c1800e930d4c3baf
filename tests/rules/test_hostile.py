"""What a hostile reviewer found, kept from coming back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from instances import random_heads
from oracles import damped_newton

import softmeet
from softmeet import Status
from softmeet.errors import DisjointSupportError, InvalidInputError
from softmeet.heads import SoftmaxHead
from softmeet.simplex import kl, total_variation
from softmeet.solvers import tuning

pytestmark = pytest.mark.checked

HEADS = random_heads(60, (3, 5), seed=0)
LOG_P = torch.stack(
    [(W @ torch.randn(W.shape[1], 3, generator=torch.Generator().manual_seed(1)).double() * 0.4).T for W in HEADS]
).log_softmax(-1)
DISJOINT = torch.full((2, 2, 60), -math.inf, dtype=torch.float64)
DISJOINT[0, :, 0] = DISJOINT[1, :, 1] = 0.0


@pytest.mark.parametrize("rule", ["meet", "max-entropy"])
@pytest.mark.parametrize("spread", [2, 3, 5])
def test_the_units_of_columns_do_not_decide(rule, spread):
    scaled = [W * torch.logspace(-spread, spread, W.shape[1]).double() for W in HEADS]
    ours = softmeet.combine(LOG_P, scaled, rule, trust=1.0, tol=1e-9)
    plain = softmeet.combine(LOG_P, HEADS, rule, trust=1.0, tol=1e-9)
    assert torch.equal(ours.status, plain.status)
    assert total_variation(ours.log_probs, plain.log_probs).max() < 1e-4
    assert torch.allclose(ours.residual, plain.residual, atol=1e-4)


@pytest.mark.parametrize("offset", [10.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("rule", ["meet", "max-entropy"])
def test_a_common_offset_does_not_spoil_the_certificate(rule, offset):
    moved = [(W + offset).float() for W in HEADS]
    log_p = LOG_P.float()
    ours = softmeet.combine(log_p, moved, rule, trust=1.0)
    exact = softmeet.combine(log_p.double(), moved, rule, trust=1.0, tol=1e-12)
    sure = ours.gap_is_certified & ~ours.fallback
    assert (exact.objective - ours.objective)[sure].max() <= ours.gap[sure].max() + 1e-6
    assert (ours.status != Status.NOT_CONVERGED).all()


def test_a_pool_on_one_token_is_proved_infeasible():
    half = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0]], dtype=torch.float64).log()
    heads = [torch.eye(4)[:, :3], torch.randn(4, 2, generator=torch.Generator().manual_seed(0))]
    for rule, trust in (("max-entropy", None), ("meet", (math.inf, 0.0))):
        solution = softmeet.combine(half, heads, rule, trust=trust)
        assert solution.status == Status.INFEASIBLE
        assert solution.fallback
        assert solution.log_probs.exp()[0] == pytest.approx(1.0)


@pytest.mark.parametrize("rule", ["meet", "logit-mean", "prob-mean", "power-mean", "one-hot"])
def test_an_empty_support_is_an_error(rule):
    with pytest.raises(DisjointSupportError, match="support="):
        softmeet.combine(LOG_P, HEADS, rule, support=torch.zeros(60, dtype=torch.bool))


def test_a_member_without_weight_or_mass_brings_no_nan():
    ours = softmeet.combine(DISJOINT, HEADS, "prob-mean", weights=[1.0, 0.0])
    assert ours.objective.tolist() == [0.0, 0.0]
    tiny = torch.tensor([0.0, -800.0]).double().log_softmax(-1)
    assert kl(tiny, torch.tensor([0.0, -math.inf]).double()).item() == 0.0


def test_numpy_numbers_are_numbers():
    ours = softmeet.combine(LOG_P, HEADS, trust=np.float32(0.5), weights=np.array([0.5, 0.5]), tol=np.float32(1e-4))
    assert torch.equal(ours.log_probs, softmeet.combine(LOG_P, HEADS, trust=0.5, tol=float(np.float32(1e-4))).log_probs)


def test_an_impossible_token_under_a_soft_cap():
    logits = (LOG_P + 3).clamp(-8.9, 8.9)
    logits[0, 1, 3] = -math.inf
    heads = [SoftmaxHead(HEADS[0], soft_cap=9.0), SoftmaxHead(HEADS[1])]
    solution = softmeet.combine(logits.log_softmax(-1), heads, trust=1.0, logits=logits)
    assert (solution.status == Status.OPTIMAL).all()
    assert solution.log_probs[1, 3] == -math.inf
    assert not solution.log_probs.isnan().any()


def test_verify_needs_what_was_combined():
    solution = softmeet.combine(LOG_P, HEADS, trust=1.0)
    with pytest.raises(InvalidInputError, match="expected what was combined"):
        solution.verify(HEADS[:1], LOG_P[:1])
    with pytest.raises(InvalidInputError, match="in the order combined"):
        solution.verify(HEADS[::-1], LOG_P)


def test_what_the_function_of_a_limit_raises_is_not_the_rules_fault():
    class OwnError(Exception):
        pass

    def fails():
        raise OwnError

    with pytest.raises(OwnError), softmeet.time_limit(fails):
        softmeet.combine(LOG_P, HEADS, trust=1.0, tol=1e-9)


@pytest.mark.parametrize("limit", [-1.0, math.nan, "1 s", None])
def test_a_limit_is_seconds_or_a_function(limit):
    with pytest.raises(InvalidInputError, match="limit in seconds, from 0, or a function"), softmeet.time_limit(limit):
        pass


@pytest.mark.parametrize("tol", [1e-300, 5e-324])
def test_a_tolerance_below_rounding_has_the_best_point_and_its_proved_gap(tol):
    ours = softmeet.combine(LOG_P, HEADS, trust=1.0, tol=tol)
    exact = softmeet.combine(LOG_P, HEADS, trust=1.0, tol=1e-12)
    assert (ours.status == Status.NOT_CONVERGED).all()
    assert ours.gap_is_certified.all()
    assert (ours.gap < 1e-9).all()
    assert total_variation(ours.log_probs, exact.log_probs).max() < 1e-6


@pytest.mark.parametrize("rule", ["max-entropy", "meet:trust=inf", "min-cross-entropy", "min-reverse-cross-entropy"])
@pytest.mark.parametrize("excluded", ["support", "member"])
def test_a_direction_that_is_constant_where_mass_may_be_proves_infeasibility(rule, excluded):
    """The Hessian is singular there: a step of 10¹⁶ proves that nothing is feasible, and leaves a distribution."""
    W = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    p = torch.tensor([[0.25, 0.25, 0.25, 0.15, 0.1], [0.25, 0.25, 0.25, 0.25, 0.0]]).double()[:, None].log()
    options = {} if excluded == "member" else {"support": torch.tensor([1, 1, 1, 1, 0]).bool()}
    members, heads = (p, [W, W[:, :1]]) if excluded == "member" else (p[:1], [W])
    if excluded == "support":
        # A row that has an answer, beside it.
        members = torch.cat([members, p[1:]], dim=1)
    found = softmeet.combine(members, heads, rule, **options)
    assert found.status[0] == Status.INFEASIBLE
    assert found.verify(heads, members).status[0] == Status.INFEASIBLE
    assert torch.allclose(found.log_probs.exp().sum(-1), torch.ones(members.shape[1]).double())
    with pytest.raises(softmeet.errors.InfeasibleError):
        softmeet.combine(members, heads, rule, on_infeasible="raise", **options)
    short = softmeet.combine(members, heads, rule, max_steps=1, **options)
    assert short.status[0] in (Status.INFEASIBLE, Status.NOT_CONVERGED)
    if excluded == "support":
        assert found.status[1] in (Status.OPTIMAL, Status.DEGENERATE)


@pytest.mark.parametrize("way", ["support", "a member's zeros"])
@pytest.mark.parametrize("live", [4, 10, 12, 49])
def test_rows_with_few_live_tokens_are_solved(way, live):
    """As many as a head has columns, or fewer: moments that rounding leaves different have to be made up there, too."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(50, 10, generator=generator).double() for _ in range(2)]
    logits = torch.randn(2, 8, 50, generator=generator).double()
    support = torch.arange(50) < live
    if way == "a member's zeros":
        logits[1, :, live:] = -math.inf
    given = {"support": support} if way == "support" else {}
    found = softmeet.combine(logits.log_softmax(-1), heads, trust=1.0, **given)
    assert (found.status == Status.OPTIMAL).all()
    assert found.gap_is_certified.all()
    assert (found.log_probs[:, ~support] == -math.inf).all()
    for k in range(0, 8, 4):
        log_p = logits[:, k].log_softmax(-1).clamp_min(-1e6).numpy()
        log_q = found.problem.log_pool[k].clamp_min(-1e6).numpy()
        p, least, _ = damped_newton(log_q, log_p, [W.numpy() for W in heads], (1.0, 1.0))
        assert found.objective[k].item() == pytest.approx(-least, abs=1e-3)
        assert total_variation(found.log_probs[k], torch.from_numpy(p).log()) < math.sqrt(1e-3 / 2)


def test_dense_steps_solve_rows_with_few_live_tokens(monkeypatch):
    for name in ("HESSIAN", "HESSIAN_WHERE_FINE", "HESSIAN_AS_RESCUE"):
        monkeypatch.setattr(tuning, name, 0)
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(1000, 64, generator=generator) / 8 for _ in range(2)]
    states = [1.5 * torch.randn(6, 64, generator=generator) for _ in heads]
    log_p = torch.stack([(h @ W.T).log_softmax(-1) for h, W in zip(states, heads, strict=True)])
    found = softmeet.combine(log_p, heads, trust=1.0, support=torch.arange(1000) < 16)
    assert (found.status == Status.OPTIMAL).all()
    assert found.gap_is_certified.all()
