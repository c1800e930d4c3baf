"""Options of the exact rules, laws that they keep, and zeros on their way through generation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from exact_instances import CASES, biased, boundary
from instances import INSTANCES, best_outputs, outputs, random_heads, zipf

import softmeet
from softmeet import Status
from softmeet.errors import InfeasibleError, InvalidInputError
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.simplex import entropy, kl, total_variation

pytestmark = pytest.mark.checked

PROGRAMS = ["min-cross-entropy", "min-squared-cross-entropy"]
EXACT = ["max-entropy", "least-squares", *PROGRAMS, "min-underestimation", "min-reverse-cross-entropy"]
OPTIONS = {"tol": 1e-8, "max_steps": 200}


@pytest.mark.parametrize("rule", PROGRAMS)
def test_a_degenerate_program_says_why_and_answers_with_the_largest_entropy(rule):
    log_p, heads = INSTANCES["premise"]()
    solution = softmeet.combine(log_p, heads, rule, **OPTIONS)
    assert "chooses nothing" in solution.remark
    assert "H(p̂_i)" in solution.remark
    exact = softmeet.combine(log_p, heads, "max-entropy", tol=1e-12)
    assert total_variation(solution.log_probs, exact.log_probs).max() < 1e-5
    vertex = softmeet.combine(log_p, heads, rule, vertex=True, **OPTIONS)
    assert (vertex.status == Status.DEGENERATE).all()
    assert ((vertex.log_probs > -math.inf).sum(-1) <= 1 + 15).all()
    assert (entropy(vertex.log_probs) < entropy(solution.log_probs)).all()
    assert torch.allclose(vertex.objective, solution.objective, atol=1e-7)
    assert (vertex.verify(heads, log_p).status == Status.DEGENERATE).all()
    assert softmeet.combine(*biased(), rule, **OPTIONS).remark == ""


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(PROGRAMS[0], torch.float32), (PROGRAMS[1], torch.float16), (PROGRAMS[0], torch.bfloat16)],
)
def test_few_digits_do_not_make_a_program_choose(rule, dtype):
    """What rounding makes of a constant objective is not one to minimise."""
    heads = random_heads(256, (12, 16), seed=2)
    log_p = best_outputs(heads, zipf(2, 256, seed=4)).to(dtype)
    solution = softmeet.combine(log_p, heads, rule, tol=1e-7)
    assert (solution.status == Status.DEGENERATE).all()
    assert not solution.log_probs.isneginf().any()
    assert (solution.verify(heads, log_p).status == Status.DEGENERATE).all()
    log_p, heads = biased()
    assert (softmeet.combine(log_p.to(dtype), heads, rule).status == Status.OPTIMAL).all()


@pytest.mark.parametrize("rule", PROGRAMS)
def test_a_vertex_on_the_boundary_is_one(rule):
    log_p, heads = boundary()
    solution = softmeet.combine(log_p, heads, rule, vertex=True, **OPTIONS)
    assert (solution.status == Status.DEGENERATE).all()
    assert ((solution.log_probs > -math.inf).sum(-1) <= 1 + 3).all()


def test_empirical_likelihood_without_a_finite_value():
    """Every feasible point has zeros where the members have none: the answer is the I-projection of the pool."""
    log_p, heads = boundary()
    solution = softmeet.combine(log_p, heads, "min-reverse-cross-entropy", **OPTIONS)
    assert (solution.status == Status.NOT_CONVERGED).all()
    exact = softmeet.combine(log_p, heads, "min-cross-entropy", **OPTIONS)
    assert total_variation(solution.log_probs, exact.log_probs).max() < 1e-6
    assert (solution.verify(heads, log_p).status == Status.NOT_CONVERGED).all()


def test_the_nearest_point_of_largest_entropy_where_heads_share_directions():
    """Excesses cancel, so that every token is on the face: the nearest moments are the mean of the members'."""
    (W,) = random_heads(64, (6,), seed=0)
    for seed in range(3):
        log_p = outputs([W, W], 2, seed=seed, sharpness=0.5)
        solution = softmeet.combine(log_p, [W, W], "least-squares", **OPTIONS)
        assert (solution.status == Status.OPTIMAL).all()
        best = best_outputs([W], log_p.exp().mean(0))[0]
        assert total_variation(solution.log_probs, best).max() < 1e-6


@pytest.mark.parametrize("rule", EXACT)
def test_batched_equals_looped(rule):
    log_p, heads = CASES["generic"].build()
    log_p = log_p[:, :2]
    together = softmeet.combine(log_p, heads, rule, **OPTIONS)
    for k in range(log_p.shape[1]):
        alone = softmeet.combine(log_p[:, k], heads, rule, **OPTIONS)
        assert total_variation(alone.log_probs, together.log_probs[k]) < 1e-6
        assert alone.status == together.status[k]
        assert alone.objective.item() == pytest.approx(together.objective[k].item(), abs=1e-7)


@pytest.mark.parametrize("rule", [rule for rule in EXACT if rule != "least-squares"])
def test_on_infeasible(rule):
    log_p, heads = INSTANCES["peaked"]()
    solution = softmeet.combine(log_p, heads, rule, **OPTIONS)
    meet = softmeet.combine(log_p, heads, "meet", **OPTIONS)
    assert solution.fallback.all()
    assert total_variation(solution.log_probs, meet.log_probs).max() < 1e-4
    scores = sum(
        (W - p.exp() @ W) @ lam.T for W, p, lam in zip(heads, log_p[:, 0], [x[:1] for x in solution.proof], strict=True)
    )
    assert scores.max() < 0
    with pytest.raises(InfeasibleError):
        softmeet.combine(log_p, heads, rule, on_infeasible="raise", **OPTIONS)


@pytest.mark.parametrize("rule", EXACT)
def test_invariant_to_changes_of_basis(rule):
    log_p, heads = CASES["premise"].build()
    generator = torch.Generator().manual_seed(0)
    moved = [W @ torch.randn(W.shape[1], W.shape[1], generator=generator).double() + 3 for W in heads]
    ours = softmeet.combine(log_p, heads, rule, **OPTIONS)
    theirs = softmeet.combine(log_p, moved, rule, **OPTIONS)
    assert total_variation(ours.log_probs, theirs.log_probs).max() < 1e-4
    assert torch.allclose(ours.objective, theirs.objective, atol=1e-6)


@pytest.mark.parametrize("rule", EXACT)
def test_impossible_tokens_stay_impossible(rule):
    _, heads = CASES["premise"].build()
    truth = torch.nn.functional.pad(zipf(1, 60, seed=5), (4, 0))
    log_p = torch.stack([best_outputs([W[4:]], truth[:, 4:])[0] for W in heads])
    log_p = torch.nn.functional.pad(log_p, (4, 0), value=-math.inf)
    solution = softmeet.combine(log_p, heads, rule, **OPTIONS)
    assert solution.log_probs[:, :4].isneginf().all()
    assert solution.status.item() in (Status.OPTIMAL, Status.DEGENERATE)
    assert not solution.log_probs.isnan().any()
    again = solution.verify(heads, log_p)
    assert torch.equal(again.status, solution.status)


def test_as_many_moments_as_tokens_leave_one_answer():
    """Under the premise it is the truth; without it, it is said that it leaves the simplex, or that there is none."""
    heads = random_heads(24, (12, 12), seed=31)
    truth = zipf(2, 24, seed=31)
    log_p = best_outputs(heads, truth)
    for rule in EXACT:
        solution = softmeet.combine(log_p, heads, rule, **OPTIONS)
        assert (kl(truth.log(), solution.log_probs) < 1e-9).all()
        assert (solution.status == Status.OPTIMAL).all()
    for seed in range(3):  # no mass is at its bound but one
        more = random_heads(24, (15, 15), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        sharp = (6 * torch.randn(2, 24, generator=generator, dtype=torch.float64)).softmax(-1)
        solution = softmeet.combine(best_outputs(more, sharp), more, "min-underestimation")
        assert (solution.status == Status.OPTIMAL).all()
        assert total_variation(solution.log_probs, sharp.log()).max() < 1e-6
    for wide in (heads, random_heads(24, (15, 15), seed=1)):
        solution = softmeet.combine(outputs(wide, 2, seed=31), wide, "max-entropy", tol=1e-8)
        assert (solution.status == Status.INFEASIBLE).all()
        assert solution.fallback.all()
        assert (solution.verify(wide, outputs(wide, 2, seed=31)).status == Status.INFEASIBLE).all()


@pytest.mark.parametrize("rule", [rule.name for rule in softmeet.RULES])
def test_relaxed_is_said_only_of_rules_that_the_option_is_for(rule):
    log_p, heads = CASES["premise"].build()
    assert softmeet.combine(log_p[:, :1], heads, rule, slack=0.1).relaxed == (rule in PROGRAMS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 0}, "expected max_steps to be an integer of at least 1"),
        ({"rank": 2}, "got rank, which is none since"),
        ({"rule": "meet:bands=2"}, "got bands, which is none since"),
        ({"metric": "cosine"}, "metric of least-squares to be 'whitened' or 'raw', got 'cosine'"),
        ({"on_infeasible": "guess"}, "on_infeasible"),
        ({"max_steps": True}, "expected max_steps to be an integer of at least 1, got True"),
        ({"free_radial": True}, "got free_radial, which is none since"),
        ({"slack": -1.0}, "slack of min-cross-entropy to be"),
        ({"slack": math.nan}, "slack of min-cross-entropy to be"),
    ],
)
def test_options_are_checked(change, message):
    log_p, heads = CASES["premise"].build()
    with pytest.raises(InvalidInputError, match=message):
        softmeet.combine(log_p, heads, **{"rule": "least-squares", **change})
    with pytest.raises(InvalidInputError, match=message):
        EnsembleConfig(members=["a"], **{"rule": "least-squares", **change})


@pytest.mark.parametrize("rule", ["least-squares", "min-cross-entropy"])
def test_zeros_go_through_sampling_and_beams(rule):
    models = [tiny.build("gpt2", 0).double(), tiny.build("llama", 1).double()]
    model = EnsembleForCausalLM(EnsembleConfig(members=["gpt2", "llama"], rule=rule, slack=0.01), models).eval()
    prompts = torch.tensor([[5], [9]])
    options: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 2}
    assert model(input_ids=prompts).logits.isneginf().any()
    torch.manual_seed(0)
    for ways in ({"do_sample": True}, {"do_sample": False, "num_beams": 2}):
        out = model.generate(prompts, **ways, **options)
        assert out.shape == (2, 3)
        scores = model(input_ids=out[:, :-1]).logits.gather(-1, out[:, 1:, None])
        assert scores.isfinite().all()


def test_options_reach_the_ensemble(tmp_path):
    config = EnsembleConfig(members=["a", "b"], rule="least-squares", metric="raw", max_steps=7, on_infeasible="raise")
    config.save_pretrained(tmp_path)
    again = EnsembleConfig.from_pretrained(tmp_path)
    assert (again.max_steps, again.on_infeasible, again.rule) == (7, "raise", "least-squares:metric=raw")


@pytest.mark.parametrize("rule", ["min-reverse-cross-entropy", "min-underestimation"])
def test_where_one_distribution_has_the_moments_its_small_probabilities_count(rule):
    """A probability of 1e-12 that is off by 1e-10 has the moments to 1e-6, and quite another objective."""
    heads = [torch.tensor([[1.0], [0.0], [0.0]]).double(), torch.tensor([[0.0], [1.0], [0.0]]).double()]
    log_p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 1e-12, 0.5 - 1e-12]], dtype=torch.float64).log()
    solution = softmeet.combine(log_p, heads, rule, tol=1e-3)
    assert int(solution.status) == Status.OPTIMAL
    assert float(solution.log_probs[1]) == pytest.approx(math.log(1e-12), abs=1e-3)
    off = solution.log_probs.exp() + torch.tensor([0.0, 1e-10, -1e-10], dtype=torch.float64)
    found = replace(solution, log_probs=off.log()).verify(heads, log_p)
    assert int(found.status) == Status.NOT_CONVERGED
    assert float(found.gap) > 1e-3


def test_moments_that_are_off_by_little_may_leave_an_objective_far_off():
    """All that have these moments give a token 1e-6, which a member gives 1e-11; without it they hold to 2e-7."""
    rng = np.random.default_rng(50176)
    v = int(rng.choice([4, 5, 6]))
    widths = (first := int(rng.integers(1, v - 2)), v - 2 - first)
    heads = [torch.tensor(rng.normal(size=(v, d))) for d in widths]
    truth = rng.dirichlet(np.ones(v) * rng.choice([0.05, 0.1, 0.2, 1]))
    truth = np.maximum(truth, 10.0 ** rng.uniform(-13, -5))
    log_p = best_outputs(heads, torch.tensor(truth / truth.sum())[None])
    solution = softmeet.combine(log_p, heads, "min-underestimation")
    least = 8.5
    assert solution.status.tolist() == [Status.NOT_CONVERGED] or float(solution.objective) > least
    assert solution.verify(heads, log_p).status.tolist() == solution.status.tolist()
