"""`meet` at trusts from 1e-3 to 1e6, on held-out text: every row is solved, or says so and is answered by the pool."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import damped_newton, fall
from scipy.special import logsumexp

import softmeet
from softmeet import Ensemble, Status
from softmeet.evaluation.held_out import held_out_books
from softmeet.simplex import total_variation

ROWS = 8
TOL = 1e-3
PAIRS = {
    "narrow": ("narrow/opt-a", "narrow/opt-c"),
    "wide": ("wide/gpt2", "wide/neox"),
    "across": ("narrow/opt-a", "wide/llama"),
}


@pytest.fixture(scope="module", params=PAIRS)
def rows(request):
    """(log-probabilities of two members, (2, ROWS, v); their heads), at the beginnings of four books."""
    ensemble = Ensemble.from_pretrained(list(PAIRS[request.param]))
    states = [
        [hidden[1::3] for hidden in next(ensemble.positions(book.text, 3 * ROWS // 4))[0]]
        for book in held_out_books()[:4]
    ]
    heads = ensemble.model.heads
    both = [head.log_probs(torch.cat(own)) for head, own in zip(heads, zip(*states, strict=True), strict=True)]
    return torch.stack(both), heads


def arrays(log_p, heads):
    """(log q, log p̂_i, heads) in fp64 for the oracle."""
    log_q = softmeet.combine(log_p.double(), heads, rule="logit-mean").log_probs
    return log_q.numpy(), log_p.double().numpy(), [h.scale * h.weight.detach().double().numpy() for h in heads]


@pytest.mark.parametrize(
    ("rows", "trust"),
    [
        ("narrow", (1e-3, 1e-3)), ("narrow", (1e3, 1e3)), ("narrow", (1e6, 1.0)),
        ("wide", (1.0, 1.0)), ("wide", (1e-3, 1e3)), ("across", (10.0, 10.0)), ("across", (1e6, 1e6)),
    ],
    indirect=["rows"],
)  # fmt: skip
def test_no_row_is_worse_than_the_pool_and_solved_ones_are_a_plain_newtons(rows, trust):
    log_p, heads = rows[0][:, ::2], rows[1]
    # At the largest trusts most rows are unfinished after a few steps, and are what they are for here.
    steps = 4 if min(trust) >= 1e3 else 60
    ours = softmeet.combine(log_p, heads, trust=trust, tol=TOL, max_steps=steps)
    assert not ours.log_probs.isnan().any()
    assert ours.log_probs.logsumexp(-1).abs().max() < 1e-5
    solved = ours.status == Status.OPTIMAL
    assert solved.all() or min(trust) >= 1e3
    assert (ours.gap[solved] <= TOL).all()
    assert ours.gap_is_certified[solved].all()
    assert (ours.status[~solved] == Status.NOT_CONVERGED).all()
    log_q, own, weights = arrays(log_p, heads)
    pool = softmeet.combine(log_p, heads, rule="logit-mean")
    free = (torch.tensor(trust)[:, None] * pool.disagreement).sum(0)
    dual = ours.as_start(heads, log_p).dual
    for k in range(len(log_q)):
        at = [lam[k].double().numpy() for lam in dual]
        assert fall(log_q[k], own[:, k], weights, trust, at) <= 1e-6 * max(1.0, *trust)
        if solved[k] and k % 2 == 0:
            p, _, _ = damped_newton(log_q[k], own[:, k], weights, trust)
            assert total_variation(ours.log_probs[k].double(), torch.from_numpy(np.log(p))) <= math.sqrt(TOL / 2)
        if not solved[k] and not torch.equal(ours.log_probs[k], pool.log_probs[k]):
            assert ours.gap_is_certified[k]
            assert ours.gap[k] <= min(free[k], 2.0)


@pytest.mark.parametrize("rows", ["narrow"], indirect=True)
def test_steps_are_not_many_more_than_a_plain_newtons(rows):
    log_p, heads = rows
    log_q, own, weights = arrays(log_p, heads)
    trust = (1e3, 1e3)
    ours = softmeet.combine(log_p, heads, trust=trust, tol=TOL)
    counted = [damped_newton(log_q[k], own[:, k], weights, trust, TOL)[2] for k in range(len(log_q))]
    solved = (ours.status == Status.OPTIMAL).tolist()
    assert sum(solved) >= 0.8 * len(solved)
    # Those that a second attempt has solved had taken all steps of the first one.
    first = [taken < 50 for taken in ours.num_steps.tolist()]
    assert sum(first) >= 0.8 * len(first)
    theirs = sum(steps for steps, known in zip(counted, first, strict=True) if known)
    assert ours.num_steps[torch.tensor(first)].sum() <= 1.5 * theirs


@pytest.mark.parametrize("rows", ["narrow"], indirect=True)
@pytest.mark.parametrize("trust", [1e3, 1e4])
def test_where_members_are_unlike_a_row_is_solved_or_near_or_the_pool(rows, trust):
    log_p, heads = rows
    apart = softmeet.combine(log_p, heads, rule="logit-mean").disagreement.sum(0)
    # Normalised in fp64: the trust multiplies what the sums of single precision miss 1 by.
    log_p = log_p[:, apart.argsort(descending=True)[:2]].double().log_softmax(-1)
    ours = softmeet.combine(log_p, heads, trust=trust, tol=TOL)
    pool = softmeet.combine(log_p, heads, rule="logit-mean").log_probs
    log_q, own, weights = arrays(log_p, heads)
    for k, status in enumerate(map(Status, ours.status.tolist())):
        if status == Status.OPTIMAL:
            p, least, _ = damped_newton(log_q[k], own[:, k], weights, (trust, trust))
            assert total_variation(ours.log_probs[k].double(), torch.from_numpy(p).log()) < math.sqrt(TOL / 2)
            assert ours.objective[k].item() == pytest.approx(-least, abs=TOL)
        else:
            assert status == Status.NOT_CONVERGED
            near = ours.gap_is_certified[k] and ours.gap[k] <= 2.0
            assert near or torch.equal(ours.log_probs[k], pool[k])


def hostile(kind, size, trust, seed):
    """(log-probabilities, (n, v); heads) of members that are sure of unlike tokens."""
    rng = np.random.default_rng(seed)
    heads = [rng.standard_normal((size[1], int(d))) for d in rng.integers(1, 12, size[0])]
    if kind == "nearly one direction":
        heads = [W[:, :1] + 1e-4 * W for W in heads]
    if kind == "twice the same tokens":
        heads = [np.concatenate([W[: size[1] // 2]] * 2) for W in heads]
    if kind == "few long rows":
        heads = [W * np.exp(2 * rng.standard_normal((size[1], 1))) for W in heads]
    logits = [W @ rng.standard_normal(W.shape[1]) for W in heads]
    scaled = [60 * x / np.abs(x).max() for x in logits]
    return np.array([x - logsumexp(x) for x in scaled]), heads, (trust,) * size[0]


@pytest.mark.parametrize(("size", "trust"), [((8, 60), 60.0), ((4, 200), 7.35)])
@pytest.mark.parametrize("kind", ["any", "nearly one direction", "twice the same tokens", "few long rows"])
def test_rows_that_a_plain_newton_solves_are_solved(kind, size, trust):
    log_p, heads, trusts = hostile(kind, size, trust, 2)
    ours = softmeet.combine(torch.tensor(log_p)[:, None], [torch.tensor(W) for W in heads], trust=trust)
    log_q = log_p.mean(0) - logsumexp(log_p.mean(0))
    _, least, _ = damped_newton(log_q, log_p, heads, trusts)
    assert ours.status == Status.OPTIMAL
    assert ours.gap_is_certified
    # The plain one, too, may end early, by rounding: no dual value is above the optimum.
    assert ours.objective.item() >= -least - TOL
