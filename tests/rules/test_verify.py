"""``Solution.verify`` judges the answer that was given, not the one that its dual variables stand for."""

import math
from dataclasses import replace

import pytest
import torch
from instances import best_outputs

from softmeet import Status, StoppedBy, combine
from softmeet.rules.recomputed import reach
from softmeet.simplex import kl


def _members():
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(30, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    return heads, torch.randn(2, 30, generator=generator, dtype=torch.float64).log_softmax(-1)


RULES = ["meet", "meet:trust=0", "max-entropy", "least-squares", "logit-mean", "prob-mean", "power-mean", "one-hot"]


def test_a_pool_that_was_altered_is_judged_by_its_own_objective():
    heads, members = _members()
    solution = combine(members, heads, trust=1e-3)
    assert solution.stopped_by == StoppedBy.POOL
    shifted = torch.cat([solution.log_probs[:1] + 0.3, solution.log_probs[1:]]).log_softmax(-1)
    assert replace(solution, log_probs=shifted).verify(heads, members).status == Status.NOT_CONVERGED


@pytest.mark.parametrize(("seed", "steps", "tol"), [(0, 2, 1e-3), (0, 2, 1e-5), (1, 1, 1e-3)])
def test_an_answer_that_is_not_at_the_dual_point_is_judged_itself(seed, steps, tol):
    generator = torch.Generator().manual_seed(seed)
    heads = [torch.randn(100, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    target = (2 * torch.randn(1, 100, generator=generator, dtype=torch.float64)).softmax(-1)
    members = best_outputs(heads, target)[:, 0]
    best = combine(members, heads, "max-entropy", tol=1e-10)
    solution = combine(members, heads, "max-entropy", tol=tol, max_steps=steps)
    assert kl(best.log_probs, solution.log_probs) > tol
    assert solution.verify(heads, members).status == Status.NOT_CONVERGED
    assert best.verify(heads, members).status == Status.OPTIMAL


@pytest.mark.parametrize("size", [1e-9, 1e-4, 0.1, 3.0])
@pytest.mark.parametrize("away", [0.0, 1e-6, 0.01, 1.0])
def test_the_reach_bounds_the_divergence_of_what_was_given(size, away):
    generator = torch.Generator().manual_seed(3)
    optimum, first, second = torch.randn(3, 20, 50, generator=generator, dtype=torch.float64)
    optimum = (3 * optimum).log_softmax(-1)
    claimed = (optimum + away * first).log_softmax(-1)
    given = claimed + size * second
    found = reach(kl(optimum, claimed), claimed, given)
    true = kl(optimum, given.log_softmax(-1))
    assert (found >= true - 1e-12).all()
    assert (found <= 12 * (true + size**2 + away * size) + kl(optimum, claimed) + 1e-12).all()


def test_the_reach_of_impossible_tokens():
    claimed = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log().expand(3, 3)
    given = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64).log()
    for gap in (0.0, 1e-3):
        found = reach(torch.full((3,), gap).double(), claimed, given)
        assert torch.allclose(found[[0, 2]], torch.tensor([gap, gap + math.log(2)]).double())
        assert found[1] == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [*RULES, "min-cross-entropy"])
def test_an_altered_answer_is_not_optimal_but_for_rounding_and_the_rules_temperature(rule, dtype):
    heads, members = _members()
    members = members.to(dtype)
    cold, plain = (combine(members, heads, rule, rule_temperature=T) for T in (0.7, 1.0))
    found, expected = (one.verify(heads, members) for one in (cold, plain))
    rounded = plain.log_probs.float()
    for given in (rounded, rounded.double()):
        assert replace(plain, log_probs=given).verify(heads, members).status == Status.OPTIMAL
    assert found.status == expected.status == Status.OPTIMAL
    assert torch.equal(found.residual, expected.residual)
    assert found.total_variation == expected.total_variation
    uniform = torch.full_like(cold.log_probs, 1 / 30).log()
    for one in (cold, plain):
        assert replace(one, log_probs=uniform).verify(heads, members).status == Status.NOT_CONVERGED


def test_a_row_that_the_first_member_answers_has_no_temperature():
    heads, members = _members()
    solution = combine(members, heads, "logit-mean", weights=[1.0, 0.0], gate="unsure:0.01", rule_temperature=0.5)
    assert solution.gated
    assert solution.verify(heads, members).status == Status.OPTIMAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e300])
def test_an_absurd_temperature_gives_a_distribution(temperature, dtype):
    heads, members = _members()
    solution = combine(members.to(dtype), heads, rule_temperature=temperature)
    p = solution.log_probs.exp()
    assert torch.allclose(p, torch.full_like(p, 1 / 30) if temperature > 1 else (p == p.max()).to(dtype))
    assert solution.verify(heads, members.to(dtype)).status == Status.OPTIMAL


@pytest.mark.parametrize("trust", [0.0, 0.3])
def test_a_proof_of_infeasibility_holds_at_any_trust_of_the_fallback(trust):
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(5, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    members = (3 * torch.randn(2, 5, generator=generator, dtype=torch.float64)).log_softmax(-1)
    solution = combine(members, heads, "max-entropy", trust=trust)
    assert solution.verify(heads, members).status == solution.status == Status.INFEASIBLE


@pytest.mark.parametrize(
    ("seed", "trust", "pool"), [(2, 1e-4, "prob-mean"), (2, 1e-2, "logit-mean"), (104, 1e-2, "prob-mean")]
)
def test_peaked_rows_are_confirmed_at_small_trusts(seed, trust, pool):
    generator = torch.Generator().manual_seed(seed)
    heads = [torch.randn(2500, 80, generator=generator) for _ in range(3)]
    logits = [W @ torch.randn(80, generator=generator) * 10 / 80**0.5 for W in heads]
    members = torch.stack(logits).double().log_softmax(-1).float()
    solution = combine(members, heads, trust=trust, pool=pool, tol=1e-3 if trust < 1e-3 else 1e-2)
    assert solution.status == solution.verify(heads, members).status == Status.OPTIMAL
