"""The rules over the feasible set against outside oracles: each rule on every other instance of one table."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from exact_instances import CASES, biased_outputs
from exact_instances import instance as whole
from exact_oracles import (
    constraints,
    linear,
    max_entropy,
    reverse_cross_entropy,
    squared_cross_entropies,
    squared_distance,
    underestimation,
    whitened,
    with_slack,
)
from instances import random_heads, zipf
from scipy.special import logsumexp

import softmeet
from softmeet import Status
from softmeet.evaluation.held_out import held_out_books
from softmeet.evaluation.positions import observe_text
from softmeet.simplex import total_variation

pytestmark = pytest.mark.checked

TOL = 1e-7
CLOSE = 1e-6
EXACT = ["max-entropy", "min-cross-entropy", "min-squared-cross-entropy", "min-underestimation",
         "min-reverse-cross-entropy"]  # fmt: skip


@functools.cache
def instance(name):
    """Its first feasible row and its first infeasible one, where it has both."""
    log_p, heads, options, rows = whole(name)
    feasible = [known for *_, known in rows]
    some = [feasible.index(kind) for kind in set(feasible)]
    if "logits" in options:
        options = options | {"logits": options["logits"][:, some]}
    return log_p[:, some], heads, options, [rows[k] for k in some]


def names_of(rule):
    """Every other instance: some are feasible, infeasible, and on the boundary, and the programs are constant or not.

    On the boundary the last rule has no finite value, though there is a distribution: see the tests of options.
    """
    own = list(CASES)[EXACT.index(rule) % 2 :: 2]
    return [name for name in own if not (CASES[name].boundary and rule == EXACT[-1])]


@functools.cache
def solve(name, rule, **changes):
    """(solution, rows), found once for all tests that ask for it."""
    log_p, heads, options, rows = instance(name)
    return softmeet.combine(log_p, heads, rule, tol=TOL, max_steps=200, **{**options, **changes}), rows


def check_again(solution, name):
    """A second look without the solver finds the same."""
    log_p, heads, options, _ = instance(name)
    again = solution.verify(heads, log_p, logits=options.get("logits"))
    # On the boundary, where only two programs may show that an objective is constant, the second look finds an optimum.
    unseen = (again.status == Status.OPTIMAL) & CASES[name].boundary
    shown = torch.where(unseen, solution.status, again.status)
    assert torch.equal(shown, solution.status)
    assert (again.gap <= TOL).all()
    assert again.total_variation.max() < 1e-9
    assert torch.allclose(again.residual, solution.residual, atol=1e-9)


@pytest.mark.parametrize(("name", "rule"), [(name, rule) for rule in EXACT for name in names_of(rule)])
def test_feasibility_is_what_highs_says(name, rule):
    solution, rows = solve(name, rule)
    known = CASES[name].feasible
    for k, (*_, G, g, feasible) in enumerate(rows):
        assert known is None or feasible == known
        assert (solution.status[k] == Status.INFEASIBLE) == (not feasible)
        assert solution.status[k] != Status.NOT_CONVERGED
        assert solution.fallback[k] == (not feasible)
        if feasible:
            slack = 1e-2 if rule == "max-entropy" else CLOSE  # its tolerance is on the gap
            assert np.abs(G.T @ solution.log_probs[k].exp().numpy() - g).max() < slack
    check_again(solution, name)


# What others find for members' log-probabilities (n, v) and a system (G, g): HiGHS, Clarabel and scipy.
VALUES = {
    "max-entropy": lambda own, G, g: max_entropy(own.mean(0) - logsumexp(own.mean(0)), G, g),
    "min-cross-entropy": lambda own, G, g: linear(-own.mean(0), G, g),
    "min-squared-cross-entropy": lambda own, G, g: squared_cross_entropies(own, np.full(len(own), 1 / len(own)), G, g),
    "min-underestimation": underestimation,
    "min-reverse-cross-entropy": lambda own, G, g: reverse_cross_entropy(np.exp(own).mean(0), G, g),
}


@pytest.mark.parametrize(("name", "rule"), [(name, rule) for rule in VALUES for name in names_of(rule)])
def test_the_objective_is_what_others_find(name, rule):
    solution, rows = solve(name, rule)
    log_p = instance(name)[0]
    for k, (*_, G, g, feasible) in enumerate(rows):
        if not feasible:
            continue
        own, squared = log_p[:, k].numpy(), rule == "min-squared-cross-entropy"
        value = VALUES[rule](own, G, g)
        assert solution.objective[k].item() == pytest.approx(value, abs=CLOSE, rel=1e-8 if squared else None)
        if rule == "min-underestimation":
            over = (solution.log_probs[k] - log_p[:, k].amin(0)).max()
            assert over.item() == pytest.approx(solution.objective[k].item(), abs=1e-12)
        if rule not in ("min-cross-entropy", "min-squared-cross-entropy"):
            continue
        unique = np.linalg.matrix_rank(G) == len(G)
        expected = Status.DEGENERATE if CASES[name].constant and not unique else Status.OPTIMAL
        assert solution.status[k] == expected
        if squared:
            largest = [linear(x, G, g) for x in own]
            most = solution.objective_range[1, k].item()
            assert most == pytest.approx(np.square(largest).mean(), abs=CLOSE, rel=1e-7)
        else:
            high = -linear(own.mean(0), G, g)
            assert solution.objective_range[:, k].tolist() == pytest.approx([value, high], abs=CLOSE)
            assert (high - value < CLOSE) == (CASES[name].constant or unique)


@pytest.mark.parametrize("lightest", [100.0, 720.0, 2000.0])
def test_underestimation_where_a_members_token_underflows(lightest):
    heads = random_heads(64, (4, 4), seed=2)
    biases = [torch.zeros(64, dtype=torch.float64) for _ in heads]
    biases[0][5] = -lightest
    log_p, heads = biased_outputs(heads, biases, zipf(1, 64, seed=2))
    found = softmeet.combine(log_p, heads, "min-underestimation", tol=TOL, max_steps=200)
    assert found.status.tolist() == [Status.OPTIMAL]
    assert found.objective.item() < 2
    assert found.verify(heads, log_p).gap.item() <= TOL


@pytest.mark.parametrize(("name", "metric"), [(name, ("whitened", "raw")[k % 2]) for k, name in enumerate(CASES)])
def test_least_squares(name, metric):
    solution, rows = solve(name, "least-squares", metric=metric)
    assert (solution.status == Status.OPTIMAL).all()
    assert not solution.fallback.any()
    check_again(solution, name)
    for k, (matrices, targets, *_, feasible) in enumerate(rows):
        system = (matrices, targets) if metric == "raw" else whitened(matrices, targets)
        value = squared_distance(*system)
        assert solution.objective[k].item() == pytest.approx(value, abs=CLOSE)
        assert (solution.objective[k] < 1e-10) == feasible
        # Farkas: the members' moments lie beyond those of every token.
        if not feasible:
            scores = sum(
                (W - t) @ lam[k].numpy()
                for W, t, lam in zip(raw_of(name, k), means_of(name, k), solution.proof, strict=True)
            )
            assert scores.max() < 0


@pytest.mark.parametrize(("rule", "constant"), [("min-cross-entropy", (True, True, False)),
                                                ("min-squared-cross-entropy", (True, False, False))])  # fmt: skip
def test_biases_leave_a_choice_unless_moments_fix_them(rule, constant):
    """In the span of the columns each; with a sum in it; neither."""
    draw = torch.Generator().manual_seed(5)
    heads = [torch.randn(48, d, generator=draw, dtype=torch.float64) for d in (4, 5)]
    free = torch.randn(48, generator=draw, dtype=torch.float64)
    spanned = [heads[1][:, 0] - 2 * heads[0][:, 1], 0.5 * heads[0][:, 2] + 1]
    truth = torch.randn(1, 48, generator=draw, dtype=torch.float64).softmax(-1)
    for biases, expected in zip((spanned, (free, spanned[1] - free), (free, free)), constant, strict=True):
        log_p, made = biased_outputs(heads, biases, truth)
        found = softmeet.combine(log_p, made, rule, tol=TOL)
        assert found.status == (Status.DEGENERATE if expected else Status.OPTIMAL)


def test_nearest_moments_need_as_many_tokens_as_there_are_moments():
    solution, rows = solve("v = 1024, infeasible", "least-squares")
    for k, (_, _, G, *_) in enumerate(rows):
        assert int((solution.log_probs[k] > -torch.inf).sum()) <= G.shape[1] - 1


@pytest.mark.parametrize("name", ["premise", "v = 1024"])
def test_the_least_underestimation_is_zero_or_full_but_for_as_many_tokens(name):
    solution, rows = solve(name, "min-underestimation")
    log_p = instance(name)[0]
    for k, (_, _, G, *_) in enumerate(rows):
        share = (solution.log_probs[k] - log_p[:, k].amin(0) - solution.objective[k]).exp()
        assert int(((share > 1e-6) & (share < 1 - 1e-6)).sum()) <= G.shape[1]


@pytest.mark.parametrize("metric", ["whitened", "raw"])
def test_least_squares_stays_in_the_support(metric):
    """Reduced costs of tokens outside may be the least of all."""
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        heads = [torch.randn(v, 8, generator=draw, dtype=torch.float64) for v in (64, 56)]
        hidden = torch.randn(2, 8, generator=draw, dtype=torch.float64)
        rows = [(head @ h).log_softmax(-1) for head, h in zip(heads, hidden, strict=True)]
        padded = torch.stack([torch.nn.functional.pad(row, (0, 64 - len(row)), value=-torch.inf) for row in rows])
        support = torch.arange(64) >= 10
        solution = softmeet.combine(padded, heads, "least-squares", metric=metric, support=support, tol=TOL)
        assert solution.status == Status.OPTIMAL
        assert (solution.log_probs[:10].isneginf()).all()
        assert (solution.log_probs[56:].isneginf()).all()
        # Mass that is put there is found, whoever put it.
        moved = dataclasses.replace(solution, log_probs=(0.5 * solution.log_probs.exp() + 0.5 / 64).log())
        assert moved.verify(heads, padded).status == Status.NOT_CONVERGED


@pytest.mark.parametrize(("shared", "seed"), [(4, 0), (8, 1)])
def test_rounding_in_shared_directions_is_no_proof(shared, seed):
    """Members with biases of their own agree there to rounding, which multipliers without bound would amplify."""
    draw = torch.Generator().manual_seed(seed)
    heads = [torch.randn(64, 8, generator=draw, dtype=torch.float64) for _ in range(2)]
    heads[1][:, :shared] = heads[0][:, :shared]
    biases = [torch.randn(64, generator=draw, dtype=torch.float64) for _ in range(2)]
    truth = torch.randn(1, 64, generator=draw, dtype=torch.float64).softmax(-1)
    log_p, made = biased_outputs(heads, biases, truth)
    for rule in EXACT:
        solution = softmeet.combine(log_p, made, rule, pool="prob-mean", tol=TOL)
        assert solution.status in (Status.OPTIMAL, Status.DEGENERATE)
        assert solution.verify(made, log_p).status == solution.status


@pytest.mark.parametrize(
    ("n", "noise", "pool"),
    [(2, 1e-15, "logit-mean"), (2, 1e-12, "prob-mean"), (2, 1e-10, "logit-mean"),
     (8, 1e-15, "prob-mean"), (8, 1e-12, "logit-mean"), (8, 1e-10, "prob-mean")],
)  # fmt: skip
def test_members_that_are_the_same_but_for_rounding_agree(n, noise, pool):
    draw = torch.Generator().manual_seed(3)
    head = torch.randn(64, 8, generator=draw, dtype=torch.float64)
    own = (head @ torch.randn(8, 2, generator=draw, dtype=torch.float64)).T
    log_p = own + noise * torch.randn(n, 2, 64, generator=draw, dtype=torch.float64)
    log_p = log_p.log_softmax(-1)
    solution = softmeet.combine(log_p, [head] * n, "max-entropy", pool=pool, tol=TOL)
    assert (solution.status == Status.OPTIMAL).all()
    assert total_variation(solution.log_probs, log_p[0]).max() < 1e-6
    assert (solution.verify([head] * n, log_p).status == Status.OPTIMAL).all()


@pytest.mark.unchecked
def test_a_row_whose_moments_are_all_but_met_is_answered():
    """Its nearest moments are 3e-6 off: Newton's method runs along a ray whose point is no answer."""
    ensemble = softmeet.Ensemble.from_pretrained(["narrow/opt-a", "narrow/opt-c"])
    found = observe_text(ensemble, [book for book in held_out_books() if book.name == "Ruth"], max_tokens=1200)
    row = found.take(slice(1196, 1197))
    heads = list(ensemble.model.heads)
    log_p = torch.stack([h.log_probs(x) for h, x in zip(heads, row.hidden, strict=True)])
    for rule in EXACT:
        solution = softmeet.combine(log_p, heads, rule)
        assert solution.status == Status.INFEASIBLE
        assert solution.verify(heads, log_p).status == Status.INFEASIBLE
        assert solution.log_probs[0, row.targets[0]] > -10


def raw_of(name, k):
    """The matrices in the heads' own coordinates."""
    log_p, heads, options, _ = instance(name)
    plain = {key: x for key, x in options.items() if key == "logits"}
    own = {"logits": plain["logits"][:, k]} if plain else {}
    return constraints(log_p[:, k], heads, own)[0]


def means_of(name, k):
    log_p = instance(name)[0]
    return [own.exp().numpy() @ W for own, W in zip(log_p[:, k], raw_of(name, k), strict=True)]


@pytest.mark.parametrize(
    ("name", "tau"),
    [("generic", 1e-3), ("generic", 0.1), ("premise", 0.1), ("peaked", 1e-3), ("v = 1024", 1e-3),
     ("v = 1024, infeasible", 0.1)],
)  # fmt: skip
def test_slack_makes_the_linear_program_choose(name, tau):
    solution, rows = solve(name, "min-cross-entropy", slack=tau)
    assert (solution.status == Status.OPTIMAL).all()
    assert solution.relaxed
    check_again(solution, name)
    log_p = instance(name)[0]
    for k, (matrices, targets, *_) in enumerate(rows):
        value = with_slack(-log_p[:, k].mean(0).numpy(), *whitened(matrices, targets), tau)
        assert solution.objective[k].item() == pytest.approx(value, abs=CLOSE)
