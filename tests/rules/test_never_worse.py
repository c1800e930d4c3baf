"""What is not solved is never worse than the pool by the rule's own measure, and every rule ends when its time is over.

The measures are computed here from the definitions, in numpy: the distance of the whitened moments, and the objective.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact_instances import CASES, instance
from exact_oracles import constraints, whitened
from instances import INSTANCES
from oracles import fall
from scipy.special import logsumexp, xlogy

import softmeet
import softmeet.rules.settings
from softmeet import Status
from softmeet.essay.preference import preference
from softmeet.solvers import tuning
from softmeet.solvers.projection import MOMENT_TOLERANCE

# Without a common distribution or with rows of which some have none; on the boundary or a single point; inside.
NAMES = ["generic", "peaked", "near_one_hot", "boundary", "faces", "nd = v", "premise", "biased", "v = 1024, biased"]
RULES = [*map(str, softmeet.RULES), "least-squares:metric=raw", "min-cross-entropy:slack=0.01",
         "min-cross-entropy:vertex=true", "min-squared-cross-entropy:slack=0.01"]  # fmt: skip
UNFINISHED = {Status.NOT_CONVERGED, Status.BUDGET}


def objective(rule, p, own, off):
    """The rule's objective at p by its definition; ``off`` are the differences of the moments that it compares."""
    with np.errstate(divide="ignore", invalid="ignore"):
        name, _, option = rule.partition(":")
        penalty = off @ off / (2 * 0.01) if "slack" in option else 0.0
        alive = np.isfinite(own).all(0)
        lines = xlogy(p > 0, np.exp(own)) if name.startswith("min-") else own
        sums = np.where(p > 0, p * lines, 0.0)[:, alive].sum(-1)
        if name == "least-squares":
            return off @ off
        if name == "min-cross-entropy":
            return -sums.mean() + penalty
        if name == "min-squared-cross-entropy":
            return np.square(sums).mean() + penalty
        if name == "min-underestimation":
            return np.max(np.log(p[alive]) - own.min(0)[alive])
        if name == "min-reverse-cross-entropy":
            mean = np.exp(own).mean(0)
            return -np.sum(np.where(mean > 0, mean * np.log(p), 0.0))
        log_q = own.mean(0) - logsumexp(own.mean(0))
        return np.sum(np.where(p > 0, p * (np.log(p) - log_q), 0.0))


def key(rule, p, own, matrices, targets):
    """(the distance from the moments that must hold, the objective), the smaller the better."""
    plain = ([W - W.mean(0) for W in matrices], [t - W.mean(0) for W, t in zip(matrices, targets, strict=True)])
    white = whitened(*plain)
    moments = np.concatenate([p @ Q - t for Q, t in zip(*white, strict=True)])
    raw = np.concatenate([p @ W - t for W, t in zip(*plain, strict=True)])
    free = "least-squares" in rule or "slack" in rule
    distance = 0.0 if free else max(float(np.linalg.norm(moments)), 1.05 * MOMENT_TOLERANCE)
    return distance, objective(rule, p, own, raw if "raw" in rule else moments)


def check(rule, name, solution):
    """Every row: a distribution; solved as a second look says, or unfinished and not worse than the pool."""
    log_p, heads, options, systems = instance(name)
    if set(map(Status, solution.status.tolist())) - UNFINISHED:
        again = solution.verify(heads, log_p, logits=options.get("logits"))
    assert not solution.log_probs.isnan().any()
    assert torch.allclose(solution.log_probs.logsumexp(-1), torch.zeros(()).double(), atol=1e-9)
    pool = softmeet.combine(log_p, heads, "logit-mean")
    given = [head if isinstance(head, softmeet.SoftmaxHead) else softmeet.SoftmaxHead(head) for head in heads]
    for k, status in enumerate(map(Status, solution.status.tolist())):
        if status not in UNFINISHED:
            # Only two programs show that an objective is constant on the boundary: a second look finds an optimum.
            assert again.status[k] == status or (status, again.status[k]) == (Status.DEGENERATE, Status.OPTIMAL)
            continue
        own = log_p[:, k].numpy()
        if rule == "meet" or solution.fallback[k]:
            dual = [part[k].numpy() for part in solution._answer.dual]
            weights = [head.weight.double().numpy() for head in given]
            trust = [solution.problem.relaxed().trust[0]] * len(own)
            assert fall(own.mean(0) - logsumexp(own.mean(0)), own, weights, trust, dual) <= 1e-9
            continue
        mine, its = (
            key(rule, each[k].exp().numpy(), own, *systems[k][:2]) for each in (solution.log_probs, pool.log_probs)
        )
        assert mine[0] <= its[0] * (1 + 1e-9) + 1e-12
        if mine[0] >= its[0] * (1 - 1e-9):
            assert mine[1] <= its[1] + 1e-9 * max(1.0, abs(its[1]))


def in_turn(names, values):
    """Every rule with every value, and with instances of each kind; every instance with rules of each kind."""
    n = len(values)
    pairs = [(k, j) for k in range(len(names)) for j in range(len(RULES)) if (k + j) % n == 0]
    return [(names[k], RULES[j], values[(k // n + j) % n]) for k, j in pairs]


def over_at(k):
    """A limit that is over when it is asked for the k-th time, and how often it was asked."""
    asked = [0]

    def over():
        asked[0] += 1
        return asked[0] >= k

    return over, asked


# At once: in the next test. By steps, of which those end at the same points, at some of the instances.
@pytest.mark.parametrize(
    ("name", "rule", "k", "steps"),
    [(*case, None) for case in in_turn(NAMES, (2, 5, 17))]
    + [(*case[:2], math.inf, case[2]) for case in in_turn(NAMES[::2], (1, 3))],
)
def test_what_is_ended_by_the_time_or_after_few_steps(name, rule, k, steps):
    log_p, heads, options, _ = instance(name)
    over, asked = over_at(k)
    few = {"max_steps": steps} if steps else {}
    with softmeet.time_limit(over):
        solution = softmeet.combine(log_p, heads, rule, tol=1e-9, **few, **options)
    # Every step of a row begins with a question; once the answer is yes no step follows.
    assert solution.num_steps.max() < k
    assert asked[0] < k or Status.NOT_CONVERGED not in solution.status.tolist()
    assert asked[0] >= k or Status.BUDGET not in solution.status.tolist()
    check(rule, name, solution)


@pytest.mark.parametrize(
    ("name", "rule"),
    [(n, rule) for n, rule, _ in in_turn(NAMES, range(3)) if softmeet.rules.settings.rule_of(rule).reads_heads],
)
def test_without_any_time_the_pool_answers(name, rule):
    log_p, heads, options, _ = instance(name)
    with softmeet.time_limit(0.0):
        solution = softmeet.combine(log_p, heads, rule, tol=1e-9, **options)
    assert solution.status.tolist() == [Status.BUDGET] * log_p.shape[1]
    assert torch.equal(solution.log_probs, softmeet.combine(log_p, heads, "logit-mean").log_probs)
    assert (solution.num_steps == 0).all()


def test_a_row_that_the_time_left_is_no_worse_than_the_pool_by_its_own_objective():
    """The I-projection of this pool onto its own moments, up to rounding, gives a token no mass at all."""
    log_p = torch.tensor([[[0.9, 0.07, 0.03, 1e-17]]], dtype=torch.float64).log().log_softmax(-1)
    ended, pool = 0, log_p[0, 0].exp()
    for k in range(1, 6):
        over, _ = over_at(k)
        with softmeet.time_limit(over):
            solution = softmeet.combine(log_p, [torch.eye(4, 3, dtype=torch.float64)], "min-reverse-cross-entropy")
        ended += int(solution.status[0] == Status.BUDGET)
        assert torch.allclose(solution.log_probs.exp(), log_p[0].exp(), rtol=0, atol=1e-9)
        assert -(pool @ solution.log_probs[0]) <= -(pool @ log_p[0, 0]) + 1e-12
    assert ended >= 3


def test_rounding_does_not_decide_between_points():
    assert preference(0.3, 1.0) < preference(0.3 - 6e-17, 2.0)
    assert preference(0.3 - 1e-6, 2.0) < preference(0.3, 1.0)


@pytest.mark.parametrize("rule", ["meet", "max-entropy", "min-cross-entropy"])
def test_a_second_look_does_not_ask_the_time(rule):
    log_p, heads, options, _ = instance("generic")
    solution = softmeet.combine(log_p, heads, rule, tol=1e-6, **options)
    calm = solution.verify(heads, log_p)
    with softmeet.time_limit(0.0):
        hurried = solution.verify(heads, log_p)
    assert torch.equal(calm.status, hurried.status)
    assert torch.equal(calm.gap, hurried.gap)


@pytest.mark.parametrize(
    ("trust", "dtype", "dense", "name"),
    [
        (1.0, torch.float32, False, "generic"), (1.0, torch.float32, True, "near_one_hot"),
        (1.0, torch.float64, False, "peaked"), (1.0, torch.float64, True, "sharp"),
        (1e6, torch.float32, False, "near_one_hot"), (1e6, torch.float32, True, "peaked"),
        (1e6, torch.float64, False, "sharp"), (1e6, torch.float64, True, "generic"),
    ],
)  # fmt: skip
def test_no_step_of_meet_raises_f(trust, dtype, dense, name, monkeypatch):
    if dense:
        for limit in ("HESSIAN", "HESSIAN_WHERE_FINE", "HESSIAN_AS_RESCUE"):
            monkeypatch.setattr(tuning, limit, 0)
    log_p, heads = INSTANCES[name]()
    before = torch.zeros(log_p.shape[1], dtype=torch.float64)
    for steps in range(1, 6):
        # What is answered may be the pool; the objective is -f at the solver's own point.
        now = softmeet.combine(log_p.to(dtype), heads, f"meet:budget={steps}", trust=trust, tol=1e-4).objective
        rounding = (1e-6 if dtype == torch.float32 else 1e-12) * (1 + before.abs())
        assert (now >= before - rounding).all()
        before = now


def test_throw_tells_of_rows_that_the_time_ended():
    log_p, heads = INSTANCES["generic"]()
    with softmeet.time_limit(0.0), pytest.raises(softmeet.errors.NotConvergedError, match="raise tol, or the time"):
        softmeet.combine(log_p, heads, tol=1e-9, throw=True)


def test_a_fallback_that_the_time_ended_says_so():
    log_p, heads, options, _ = instance("peaked")
    for k in range(1, 60, 6):
        over, _ = over_at(k)
        with softmeet.time_limit(over):
            solution = softmeet.combine(log_p, heads, "max-entropy", tol=1e-9, **options)
        found = {Status(s) for s in solution.status[solution.fallback].tolist()}
        assert found <= {Status.INFEASIBLE, Status.BUDGET}
        if Status.BUDGET in found:
            return
    pytest.fail("no fallback was ended by the time")


def test_a_rule_of_ones_own_may_ask():
    class Slow(softmeet.Rule):
        """Asks whether its time is over, and answers with the pool."""

        name = "slow"
        summary = "as slow as it may be"

        def solve(self, problem):
            while not softmeet.time_is_over():
                pass
            return problem.log_pool

    log_p, heads = INSTANCES["generic"]()
    with softmeet.time_limit(0.01):
        solution = softmeet.combine(log_p, heads, Slow())
    assert torch.equal(solution.log_probs, softmeet.combine(log_p, heads, "logit-mean").log_probs)
    assert not softmeet.time_is_over()


@pytest.mark.parametrize(
    ("name", "tol"),
    [(n, (1e-3, 1e-7)[k % 2]) for k, n in enumerate(CASES) if CASES[n].feasible is not False and n != "soft-capped"],
)
def test_max_entropy_has_the_moments_where_it_is_optimal(name, tol):
    log_p, heads, options, _ = instance(name)
    solution = softmeet.combine(log_p, heads, "max-entropy", tol=tol, **options)
    for k in (solution.status == Status.OPTIMAL).nonzero().flatten().tolist():
        matrices, targets = constraints(log_p[:, k], heads, options)
        white = whitened(matrices, targets)
        p = solution.log_probs[k].exp().numpy()
        off = np.concatenate([p @ Q - t for Q, t in zip(*white, strict=True)])
        assert np.linalg.norm(off) <= 1.01 * MOMENT_TOLERANCE


def test_a_limits_function_may_itself_use_softmeet():
    """It is asked under the limits outside of its own, or it would be asked without end."""
    members = [torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log(), [torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]]]

    def over():
        softmeet.combine(*members)
        return softmeet.time_is_over()

    with softmeet.time_limit(over):
        assert int(softmeet.combine(*members, trust=3.0).status) == softmeet.Status.OPTIMAL
        with softmeet.time_limit(0):
            assert softmeet.time_is_over()
    assert not softmeet.time_is_over()
