"""``meet`` and ``max-entropy`` against outside oracles, and their certificates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_instances import boundary
from instances import INSTANCES, zipf
from oracles import by_cvxpy, plain_newton

import softmeet
from softmeet import Status
from softmeet.errors import InfeasibleError, InvalidInputError, NotConvergedError
from softmeet.essay.max_entropy import MaxEntropy
from softmeet.heads import SoftmaxHead
from softmeet.rules.meet import Meet
from softmeet.simplex import entropy, kl, total_variation
from softmeet.solvers.linalg import solve_ridged

pytestmark = pytest.mark.checked

INF = math.inf
TRUSTS = {
    "0.3": (0.3, 0.3, 0.3),
    "1": (1.0, 1.0, 1.0),
    "20": (20.0, 20.0, 20.0),
    "unequal": (0.2, 5.0, 1.0),
    "one zero": (0.0, 1.0, 2.0),
    "tiny and large": (1e-3, 300.0, 1.0),
}
POOLS = ("logit-mean", "prob-mean")


def in_turn(names, others):
    """Every instance with every other trust, and the others in turn: each comes with every instance and every trust."""
    pairs = [(name, trust, k + j) for k, name in enumerate(names) for j, trust in enumerate(TRUSTS)]
    return [(name, trust, others[turn // 2 % len(others)]) for name, trust, turn in pairs if turn % 2 == 0]


def solve(name, trust, pool="logit-mean", **options):
    log_p, heads = INSTANCES[name]()
    trust = TRUSTS[trust][: len(heads)]
    solution = softmeet.combine(log_p, heads, trust=trust, pool=pool, tol=1e-13, max_steps=200, **options)
    return log_p, heads, trust, solution


def pool_of(log_p, heads, pool):
    return softmeet.combine(log_p, heads, pool).log_probs


@pytest.mark.parametrize(
    ("name", "trust", "pool"), in_turn([name for name in INSTANCES if name != "near_one_hot"], POOLS)
)
def test_meet_equals_a_plain_newton(name, trust, pool):
    log_p, heads, trust, solution = solve(name, trust, pool)
    assert (solution.status == Status.OPTIMAL).all()
    assert solution.gap_is_certified.all()
    used = [i for i, rho in enumerate(trust) if rho > 0]
    log_q = pool_of(log_p, heads, pool)
    for k in range(0, log_p.shape[1], 2):
        p, value = plain_newton(
            log_q[k].numpy(), log_p[used, k].numpy(), [heads[i].numpy() for i in used], [trust[i] for i in used]
        )
        assert np.abs(solution.log_probs[k].exp().numpy() - p).max() < 1e-6
        true_gap = -value - solution.objective[k].item()
        assert true_gap <= solution.gap[k].item() + 1e-11 * max(1.0, max(trust))


@pytest.mark.parametrize(
    ("name", "trust", "pool"), in_turn(["generic", "sharp", "rank_deficient", "duplicate_heads"], POOLS)
)
def test_meet_equals_cvxpy(name, trust, pool):
    log_p, heads, trust, solution = solve(name, trust, pool)
    log_q = pool_of(log_p, heads, pool)
    p, value = by_cvxpy(log_q[0].numpy(), log_p[:, 0].numpy(), [W.numpy() for W in heads], trust)
    assert solution.objective[0].item() == pytest.approx(value, abs=1e-6)
    slack = max(value - solution.objective[0].item(), 0) + 1e-8
    assert 0.5 * np.abs(p - solution.log_probs[0].exp().numpy()).sum() <= math.sqrt(slack / 2) + 1e-6


@pytest.mark.parametrize("pool", ["logit-mean", "prob-mean"])
def test_max_entropy_equals_a_plain_newton_when_the_premise_holds(pool):
    log_p, heads = INSTANCES["premise"]()
    solution = softmeet.combine(log_p, heads, "max-entropy", pool=pool, tol=1e-11)
    assert (solution.status == Status.OPTIMAL).all()
    assert not solution.fallback.any()
    assert solution.residual.max() < 1e-6
    log_q = pool_of(log_p, heads, pool)
    for k in range(log_p.shape[1]):
        p, _ = plain_newton(log_q[k].numpy(), log_p[:, k].numpy(), [W.numpy() for W in heads], [INF] * len(heads))
        assert np.abs(solution.log_probs[k].exp().numpy() - p).max() < 1e-6


@pytest.mark.unchecked
def test_max_entropy_is_never_worse_than_any_pool_whatever_its_own_and_equalises_the_log_loss():
    """Under the premise, p_C is nearer to the truth than softmax(Aμ), by KL(p_C‖softmax(Aμ)), for every weighting.

    And -pᵀ log p_C = H(p_C) for every p in C, vertices too: the worst truth in C costs no more than any other.
    """
    log_p, heads = INSTANCES["premise"]()
    truth = zipf(4, 64, seed=2)
    ours = softmeet.combine(log_p, heads, "max-entropy", tol=1e-12).log_probs
    for weights in ([1.0, 0, 0], [0.2, 0.3, 0.5], [0.5, 0.9, 1.4], [0.1, 0.1, 0.1]):
        own = {"weights": weights, "free_weights": True}
        pool = softmeet.combine(log_p, heads, "logit-mean", **own).log_probs
        moved = kl(truth.log(), pool) - kl(truth.log(), ours)
        assert torch.allclose(moved, kl(ours, pool), atol=1e-6)  # Pythagoras
        assert (moved >= -1e-9).all()
        found = softmeet.combine(log_p, heads, "max-entropy", tol=1e-12, **own).log_probs
        assert total_variation(found, ours).max() < 1e-6
    corner = softmeet.combine(log_p, heads, "min-cross-entropy", vertex=True, tol=1e-8).log_probs
    other = softmeet.combine(log_p, heads, "min-reverse-cross-entropy", tol=1e-8).log_probs
    for p in (truth, corner.exp(), other.exp()):
        assert torch.allclose(-(p * ours).sum(-1), entropy(ours), atol=1e-6)


@pytest.mark.parametrize("name", ["peaked", "near_one_hot"])
def test_infeasible_rows_are_proved_and_answered_by_meet(name):
    log_p, heads = INSTANCES[name]()
    solution = softmeet.combine(log_p, heads, "max-entropy", tol=1e-8, max_steps=200)
    assert (solution.status == Status.INFEASIBLE).all()
    assert solution.fallback.all()
    meet = softmeet.combine(log_p, heads, "meet", tol=1e-8)
    assert total_variation(solution.log_probs, meet.log_probs).max() < 1e-4
    assert (solution.num_passes > meet.num_passes).all()
    again = solution.verify(heads, log_p)
    assert (again.status == Status.INFEASIBLE).all()
    with pytest.raises(InfeasibleError, match=r"no distribution has every member's moments in \d of \d rows"):
        softmeet.combine(log_p, heads, "max-entropy", on_infeasible="raise")


def test_an_infinite_trust_mixes_with_finite_ones():
    log_p, heads = INSTANCES["generic"]()
    log_q = pool_of(log_p, heads, "logit-mean")
    solution = softmeet.combine(log_p, heads, trust=(INF, 0.5), tol=1e-10)
    for k in (solution.status == Status.OPTIMAL).nonzero().flatten().tolist():
        p, _ = plain_newton(log_q[k].numpy(), log_p[:, k].numpy(), [W.numpy() for W in heads], [INF, 0.5])
        assert np.abs(solution.log_probs[k].exp().numpy() - p).max() < 1e-6
        assert solution.residual[0, k] < 1e-5
    assert (solution.status == Status.OPTIMAL).any()


@pytest.mark.unchecked
def test_what_proves_an_exact_member_infeasible_is_its_own_part():
    found = 0
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        heads = [torch.randn(32, 4, generator=draw, dtype=torch.float64) for _ in range(2)]
        hidden = [3 * torch.randn(4, generator=draw, dtype=torch.float64) for _ in heads]
        log_p = torch.stack([(W @ h).log_softmax(-1) for W, h in zip(heads, hidden, strict=True)])
        support = torch.arange(32) < 20
        solution = softmeet.combine(log_p, heads, trust=[INF, 0.01], support=support)
        if solution.status == Status.INFEASIBLE:
            found += 1
            first, second = solution.proof
            assert not second.any()
            assert ((heads[0] - log_p[0].exp() @ heads[0]) @ first)[support].max() < 0
            assert solution.verify(heads, log_p).status == Status.INFEASIBLE
    assert found


def test_a_feasible_set_on_the_boundary():
    log_p, heads = boundary()
    solution = softmeet.combine(log_p, heads, "max-entropy", tol=1e-6, max_steps=100)
    assert (solution.status == Status.OPTIMAL).all()
    assert (solution.gap <= 1e-6).all()
    assert solution.log_probs.exp()[:, 20:].sum() < 1e-4


@pytest.mark.unchecked
def test_a_stopped_solver_says_so_and_keeps_its_best_point():
    log_p, heads = INSTANCES["peaked"]()
    stopped = softmeet.combine(log_p, heads, trust=50.0, tol=1e-12, max_steps=1)
    assert (stopped.status == Status.NOT_CONVERGED).any()
    assert stopped.log_probs.isfinite().all()
    full = softmeet.combine(log_p, heads, trust=50.0, tol=1e-10, max_steps=200)
    certified = stopped.gap_is_certified
    true_gap = full.objective + full.gap - stopped.objective
    assert (true_gap[certified] <= stopped.gap[certified] + 1e-9).all()
    with pytest.raises(NotConvergedError, match="raise tol, or max_steps, of which up to 1 of 1 were taken"):
        softmeet.combine(log_p, heads, trust=50.0, tol=1e-12, max_steps=1, throw=True)


@pytest.mark.parametrize(
    ("name", "trust", "dtype"),
    [
        (name, (0.3, 1.0, 20.0)[(k + j) % 3], dtype)
        for k, name in enumerate(INSTANCES)
        for j, dtype in enumerate((torch.float32, torch.float64))
    ],
)
def test_the_certificate_is_never_below_the_true_gap(name, dtype, trust):
    log_p, heads = INSTANCES[name]()
    log_p, heads = log_p.to(dtype), [W.to(dtype) for W in heads]
    exact = softmeet.combine(log_p.double(), [W.double() for W in heads], trust=trust, tol=1e-12, max_steps=200)
    for steps in (1, 3, 6):
        solution = softmeet.combine(log_p, heads, trust=trust, tol=1e-14, max_steps=steps)
        true_gap = exact.objective - solution.objective
        certified = solution.gap_is_certified
        # What fp32 products do to the objective itself, beyond the gap.
        allowed = 1e-11 if dtype == torch.float64 else 2e-6 * max(1.0, trust)
        assert (true_gap[certified] <= solution.gap[certified] + allowed).all()


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (name, rule)
        for k, name in enumerate(INSTANCES)
        for j, rule in enumerate(("meet", "max-entropy", "logit-mean", "prob-mean", "power-mean", "one-hot"))
        if (k + j) % 2 == 0
    ],
)
def test_verify_agrees_without_the_solver(name, rule):
    log_p, heads = INSTANCES[name]()
    solution = softmeet.combine(log_p, heads, rule, trust=1.0, tol=1e-6, max_steps=200)
    again = solution.verify(heads, log_p)
    assert again.total_variation.max() < 1e-9
    assert torch.equal(again.status, solution.status)
    assert (again.gap <= 1e-6).all()
    assert torch.allclose(again.residual, solution.residual, atol=1e-9)


@pytest.mark.unchecked
def test_verify_catches_a_wrong_answer():
    log_p, heads = INSTANCES["generic"]()
    solution = softmeet.combine(log_p, heads, trust=1.0, tol=1e-8)
    other = softmeet.combine(log_p, heads, trust=4.0, tol=1e-8)
    object.__setattr__(solution, "_answer", other._answer)
    again = solution.verify(heads, log_p)
    assert (again.status == Status.NOT_CONVERGED).all()


def test_trust_zero_and_members_that_agree_are_exactly_the_pool_and_one_member_is_itself():
    log_p, heads = INSTANCES["generic"]()
    for pool in ("logit-mean", "prob-mean"):
        ours = softmeet.combine(log_p, heads, trust=0, pool=pool)
        assert torch.equal(ours.log_probs, pool_of(log_p, heads, pool))
        assert (ours.num_passes == 0).all()
        assert ours.disagreement_is_bound.all()
    same = torch.stack([log_p[0], log_p[0]])
    agreed = softmeet.combine(same, heads, trust=5.0)
    assert (agreed.num_passes == 0).all()
    assert agreed.disagreement_is_bound.all()
    assert torch.equal(agreed.log_probs, pool_of(same, heads, "logit-mean"))
    for rule in ("meet", "max-entropy", "logit-mean", "prob-mean", "power-mean"):
        alone = softmeet.combine(log_p[:1], heads[:1], rule)
        assert total_variation(alone.log_probs, log_p[0]).max() < 1e-14
        assert (alone.num_passes == 0).all()


@pytest.mark.unchecked
def test_mixed_rows_are_masked_one_by_one():
    """A row's trouble or ease leaves the others alone: batched equals looped, to round-off of the products."""
    easy, heads = INSTANCES["generic"]()
    hard = torch.stack([W @ torch.full((W.shape[1],), 9.0).double() for W in heads]).log_softmax(-1)
    log_p = torch.cat([easy[:, :2], easy[:1, :1].expand(2, -1, -1), hard[:, None]], dim=1)
    together = softmeet.combine(log_p, heads, trust=3.0, tol=1e-10, max_steps=100)
    assert len(set(together.num_steps.tolist())) > 1
    for k in range(log_p.shape[1]):
        alone = softmeet.combine(log_p[:, k], heads, trust=3.0, tol=1e-10, max_steps=100)
        assert total_variation(alone.log_probs, together.log_probs[k]) < 1e-9
        assert alone.num_passes.item() == pytest.approx(together.num_passes[k].item(), rel=1e-12)


def test_half_precision_heads_are_read_as_they_are():
    log_p, heads = INSTANCES["generic"]()
    half = [W.half() for W in heads]
    ours = softmeet.combine(log_p, half, trust=1.0, tol=1e-10)
    exact = softmeet.combine(log_p, [W.double() for W in half], trust=1.0, tol=1e-10)
    assert total_variation(ours.log_probs, exact.log_probs).max() < 1e-9
    single = softmeet.combine(log_p.float(), half, trust=1.0, tol=1e-6)
    assert single.log_probs.dtype == torch.float32
    assert total_variation(single.log_probs.double(), exact.log_probs).max() < 1e-3


def test_a_direction_does_not_depend_on_the_rest_of_the_batch():
    """To the last bit, though the other row is refined more often."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)).Q
    spectra = torch.stack([torch.linspace(1, 2, 8), torch.logspace(0, -13, 8)]).double()
    H, g = U @ (spectra[..., None] * U.mT), torch.randn(2, 8, generator=generator, dtype=torch.float64)
    together = solve_ridged(H, g, 2e-16)
    assert all(torch.equal(together[k], solve_ridged(H[k : k + 1], g[k : k + 1], 2e-16)[0]) for k in (0, 1))


@pytest.mark.parametrize("scale", [0.0, 1e-200, 1e-40])
def test_a_hessian_that_has_all_but_vanished_gives_the_gradient(scale):
    """Where one token has all mass H underflows, and H⁻¹g would overflow the scores."""
    H = torch.stack([scale * torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)])
    g = torch.full((2, 4), 0.1, dtype=torch.float64)
    assert torch.allclose(solve_ridged(H, g, 1e-7), g)
    H[0, 0, 0] = torch.nan
    assert torch.allclose(solve_ridged(H, g, 1e-7), g)


@pytest.mark.parametrize(
    ("name", "trusts"),
    [
        (name, ((0.0, 3.0, INF), (0.31, 1e-4, (5.0, 0.0, 1.0)))[k % 2])
        for k, name in enumerate(name for name in INSTANCES if name != "near_one_hot")
    ],
)
def test_a_start_elsewhere_leads_to_the_same_answer(name, trusts):
    log_p, heads = INSTANCES[name]()
    first = softmeet.combine(log_p, heads, trust=0.3, tol=1e-6)
    for trust in trusts:
        trust = trust[: len(heads)] if isinstance(trust, tuple) else trust
        options = {"trust": trust, "tol": 1e-12, "max_steps": 200}
        cold = softmeet.combine(log_p, heads, **options)
        warm = softmeet.combine(log_p, heads, start=first, **options)
        assert (warm.status == cold.status).all()
        solved = cold.status == Status.OPTIMAL
        assert (total_variation(warm.log_probs, cold.log_probs)[solved] < 1e-5).all()
        assert (warm.gap[solved] <= 1e-12).all()
        assert warm.gap_is_certified[solved].all()


def test_a_start_saves_steps_and_is_checked():
    log_p, heads = INSTANCES["generic"]()
    near = softmeet.combine(log_p, heads, trust=1.0, tol=1e-6)
    cold = softmeet.combine(log_p, heads, trust=1.05, tol=1e-6)
    warm = softmeet.combine(log_p, heads, trust=1.05, tol=1e-6, start=near)
    assert warm.num_passes.sum() < 0.8 * cold.num_passes.sum()
    with pytest.raises(InvalidInputError, match="one by logit-mean"):
        softmeet.combine(log_p, heads, start=softmeet.combine(log_p, heads, "logit-mean"))
    with pytest.raises(InvalidInputError, match="same rows and heads"):
        softmeet.combine(log_p[:, :2], heads, start=near)


@pytest.mark.unchecked
@pytest.mark.parametrize("name", ["generic", "premise", "peaked"])
def test_the_nearest_moments_prove_what_newton_leaves_open(name, monkeypatch):
    log_p, heads = INSTANCES[name]()
    known, descended = softmeet.combine(log_p, heads, "max-entropy").status, Meet.solve

    def stalls(self, problem):
        answer = descended(self, problem)
        if not isinstance(self, MaxEntropy):  # what answers where there is no distribution
            return answer
        nothing = tuple(torch.zeros_like(ray) for ray in answer.ray)
        return replace(answer, status=torch.full_like(answer.status, int(Status.NOT_CONVERGED)), ray=nothing)

    monkeypatch.setattr(Meet, "solve", stalls)
    solution = softmeet.combine(log_p, heads, "max-entropy")
    empty = known == Status.INFEASIBLE
    assert torch.equal(solution.status == Status.INFEASIBLE, empty)
    assert torch.equal(solution.verify(heads, log_p).status == Status.INFEASIBLE, empty)
    assert torch.equal(solution.fallback, empty)


@pytest.mark.unchecked
@pytest.mark.parametrize("name", ["generic", "premise"])
def test_what_max_entropy_found_serves_every_exact_rule(name):
    log_p, heads = INSTANCES[name]()
    first = softmeet.combine(log_p, heads, "max-entropy")
    for rule in ("max-entropy", "min-cross-entropy", "min-reverse-cross-entropy", "least-squares"):
        alone, warm = (softmeet.combine(log_p, heads, rule, start=start) for start in (None, first))
        assert torch.equal(warm.status, alone.status)
        assert torch.equal(warm.status, warm.verify(heads, log_p).status)
        assert (total_variation(warm.log_probs, alone.log_probs) < 1e-2).all()
        assert (warm.num_steps[warm.fallback] <= alone.num_steps[warm.fallback]).all()
    infeasible = first.fallback
    assert bool(infeasible.any()) == (name == "generic")
    again = softmeet.combine(log_p, heads, "max-entropy", start=first, on_infeasible=softmeet.combine(log_p, heads))
    # The proof that is known is checked by a single read.
    assert (again.num_steps[infeasible] == 1).all()


@pytest.mark.unchecked
def test_a_solved_meet_answers_infeasible_rows():
    log_p, heads = INSTANCES["generic"]()
    met = softmeet.combine(log_p, heads, trust=0.3)
    for rule in ("max-entropy", "min-cross-entropy"):
        solved = softmeet.combine(log_p, heads, rule)
        known = softmeet.combine(log_p, heads, rule, start=met, on_infeasible=met)
        assert known.fallback.any()
        assert torch.equal(known.fallback, solved.fallback)
        assert torch.equal(known.log_probs[known.fallback], met.log_probs[known.fallback])
        assert (total_variation(known.log_probs, solved.log_probs) < 1e-3).all()
        assert (known.verify(heads, log_p).status == solved.verify(heads, log_p).status).all()
        assert known.num_passes.sum() < solved.num_passes.sum()


@pytest.mark.parametrize("other", [{"trust": 1.0}, {"pool": "prob-mean"}, {"tol": 1e-2}, {"weights": [0.2, 0.8]}])
def test_only_the_meet_that_would_be_solved_stands_in(other):
    log_p, heads = INSTANCES["generic"]()
    met = softmeet.combine(log_p, heads, **other)
    with pytest.raises(InvalidInputError, match="same rows and settings"):
        softmeet.combine(log_p, heads, "max-entropy", on_infeasible=met)


def test_a_start_at_the_pool_proves_nothing():
    log_p, heads = INSTANCES["generic"]()
    pool = softmeet.combine(log_p, heads, trust=0.0)
    ours = softmeet.combine(log_p, heads, trust=1.0, start=pool)
    plain = softmeet.combine(log_p, heads, trust=1.0)
    assert (plain.objective > 0.01).any()
    assert (plain.objective - ours.objective <= ours.gap + 1e-9).all()


@pytest.mark.unchecked
def test_a_second_look_agrees_where_members_are_nearly_one_hot():
    generator = torch.Generator().manual_seed(2)
    heads = [torch.randn(60, d, generator=generator) for d in (9, 14)]
    sharpness = torch.tensor([[3.0], [10.0], [20.0], [40.0]])
    hidden = [sharpness * torch.randn(4, W.shape[1], generator=generator) / W.shape[1] ** 0.5 for W in heads]
    log_p = torch.stack([(x @ W.T).double() for x, W in zip(hidden, heads, strict=True)]).log_softmax(-1)
    found = softmeet.combine(log_p, heads, trust=(0.6, 1e-4), tol=1e-4)
    assert (found.status == Status.OPTIMAL).all()
    assert (found.verify(heads, log_p).status == Status.OPTIMAL).all()


@pytest.mark.parametrize("saturation", [7.0, 10.0])
def test_a_saturated_soft_cap_makes_no_false_certificate(saturation):
    """Slopes of 10⁻⁶ and less: single precision loses them in products."""
    generator = torch.Generator().manual_seed(6)
    heads = [
        SoftmaxHead(torch.randn(50, 5, generator=generator).double()),
        SoftmaxHead(torch.randn(50, 6, generator=generator).double(), torch.full((50,), 5 * saturation), soft_cap=5.0),
    ]
    hidden = [1.5 * torch.randn(3, h.d, generator=generator).double() for h in heads]
    logits = torch.stack([h.logits(x) for h, x in zip(heads, hidden, strict=True)])
    log_p = logits.log_softmax(-1)
    exact = softmeet.combine(log_p, heads, trust=0.3, tol=1e-9, logits=logits)
    found = softmeet.combine(log_p.float(), heads, trust=0.3, tol=1e-4, logits=logits, max_steps=20)
    assert exact.gap_is_certified.all()
    assert found.gap_is_certified.any()
    off = kl(exact.log_probs, found.log_probs.double())
    assert (off <= found.gap + 1e-6)[found.gap_is_certified].all()
