"""When averaging is the right way: the identities behind it, the pool as a proved answer, and what is reported."""

from __future__ import annotations

import json
import math

import pytest
import torch
from commands import facts_of, ran

import softmeet
from softmeet import Status, StoppedBy
from softmeet.heads import SoftmaxHead
from softmeet.rules.movement import Movement
from softmeet.simplex import kl, log_normalize, total_variation


def family_member(log_p, log_base, W):
    """s(p): the member of exp(W δ) · base with the moments of p, by a damped Newton method on δ; a row."""
    delta, p = torch.zeros(W.shape[1], dtype=torch.float64), log_p.exp()
    centred = W - W.mean(0)

    def loss(at):
        return (log_base + centred @ at).logsumexp(-1) - p @ (centred @ at)

    for _ in range(200):
        s = log_normalize(log_base + centred @ delta)
        mean = s.exp() @ centred
        gradient = mean - p @ centred
        if gradient.norm() < 1e-13:
            break
        hessian = (centred * s.exp()[:, None]).T @ centred - mean[:, None] * mean
        step, t = torch.linalg.lstsq(hessian, -gradient[:, None], driver="gelsd").solution.squeeze(-1), 1.0
        while loss(delta + t * step) > loss(delta) + 1e-4 * t * (gradient @ step) and t > 1e-10:
            t /= 2
        delta = delta + t * step
    return log_normalize(log_base + centred @ delta)


def members(widths=(3, 5), v=24, batch=3, biased=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = [SoftmaxHead(draw(v, d), draw(v) if biased else None) for d in widths]
    log_p = [h.log_probs(draw(batch, h.d)) for h in heads]
    return torch.stack(log_p), heads


@pytest.mark.parametrize(
    ("widths", "biased", "pool"),
    [((3, 5), False, "logit-mean"), ((2, 2, 4), True, "prob-mean"), ((8, 12), False, "prob-mean")],
)
def test_the_objective_is_a_divergence_less_what_heads_cannot_express(widths, biased, pool):
    """(5a), at distributions that have nothing to do with the members, and at the optimum."""
    log_p, heads = members(widths, batch=2, biased=biased)
    trust = torch.tensor([0.4, 2.0, 0.9][: len(heads)], dtype=torch.float64)
    found = softmeet.combine(log_p, heads, trust=trust.tolist(), pool=pool, tol=1e-12)
    log_q, R = found.pool, trust.sum()
    scores = (log_q + torch.einsum("n,nbv->bv", trust, log_p)) / (1 + R)
    log_tilde, log_z = log_normalize(scores), scores.logsumexp(-1)
    generator = torch.Generator().manual_seed(5)
    elsewhere = log_normalize(2 * torch.randn(log_q.shape, generator=generator, dtype=torch.float64))
    for log_x in (elsewhere, found.log_probs):
        for k in range(len(log_q)):
            s = [family_member(log_x[k], own[k], h.weight) for own, h in zip(log_p, heads, strict=True)]
            D = torch.stack([kl(a, own[k]) for a, own in zip(s, log_p, strict=True)])
            E = torch.stack([kl(log_x[k], a) for a in s])
            F = kl(log_x[k], log_q[k]) + trust @ D
            there = (1 + R) * (kl(log_x[k], log_tilde[k]) - log_z[k]) - trust @ E
            assert F.item() == pytest.approx(there.item(), abs=1e-7)
            if log_x is found.log_probs:
                assert F.item() == pytest.approx(found.objective[k].item(), abs=1e-7)


@pytest.mark.parametrize("trust", [0.1, 3.0, 1e3])
def test_heads_that_can_express_the_pool_meet_there(trust):
    """Heads of as many columns as tokens but one; narrow ones of one column space do so, too, by another law."""
    log_p, heads = members((23, 23))
    found = softmeet.combine(log_p, heads, trust=trust, tol=1e-11)
    assert (found.status == Status.OPTIMAL).all()
    assert total_variation(found.log_probs, found.pool).max() < 1e-5
    # Unequal trusts meet at q̃, which is another average.
    rho = torch.tensor([trust, 2 * trust], dtype=torch.float64)
    found = softmeet.combine(log_p, heads, trust=rho.tolist(), tol=1e-11)
    tilde = log_normalize((found.pool + torch.einsum("n,nbv->bv", rho, log_p)) / (1 + rho.sum()))
    assert total_variation(found.log_probs, tilde).max() < 1e-5


CASES = ["plain", "biased", "soft-capped", "padded", "duplicated"]


@pytest.mark.parametrize("pool", ["logit-mean", "prob-mean"])
@pytest.mark.parametrize("case", CASES)
def test_every_dual_point_bounds_how_far_the_pool_is(case, pool):
    """(5b): the identity at random dual points, and the bound of KL(q‖p°)."""
    log_p, heads = members((3, 5), biased=case == "biased")
    options = {}
    if case == "soft-capped":
        heads = [SoftmaxHead(h.weight, soft_cap=3.0) for h in heads]
        generator = torch.Generator().manual_seed(3)
        states = [torch.randn(3, h.d, generator=generator, dtype=torch.float64) for h in heads]
        options["logits"] = torch.stack([h.logits(x) for h, x in zip(heads, states, strict=True)])
        log_p = log_normalize(options["logits"])
    if case == "padded":
        options["support"] = torch.arange(24) < 20
    if case == "duplicated":
        heads, log_p = [heads[0], heads[0]], torch.stack([log_p[0], log_p[0].roll(1, 0)])
    exact = softmeet.combine(log_p, heads, trust=[0.3, 4.0], pool=pool, tol=1e-12, **options)
    projection = exact.problem.projection([0, 1], (0.3, 4.0))
    free = projection.pool_gap()
    generator = torch.Generator().manual_seed(4)
    for size in (0.0, 0.3, 3.0):
        nu = size * torch.randn(3, len(projection.scale), generator=generator, dtype=torch.float64)
        parts = nu.split(projection.widths, dim=-1)
        z = torch.stack([h.scores(part) for h, part in zip(projection.heads, parts, strict=True)], dim=1)
        right = kl(projection.log_q, projection.pooled(z))
        r = projection.corrected(z)
        right = right + (torch.tensor([0.3, 4.0]).double() * kl(projection.log_q[:, None].expand_as(r), r)).sum(-1)
        bound = free + projection.dual(z)
        assert torch.allclose(bound, right, atol=1e-9)
        assert (kl(exact.pool, exact.log_probs) <= bound + 1e-9).all()


@pytest.mark.parametrize("tol", [0.3, 0.03, 1e-3])
def test_a_row_is_done_when_the_answer_or_the_pool_is_near_enough(tol):
    log_p, heads = members(v=40, batch=8, seed=2)
    exact = softmeet.combine(log_p, heads, trust=1.0, tol=1e-12)
    found = softmeet.combine(log_p, heads, trust=1.0, tol=tol)
    by_pool = found.stopped_by == StoppedBy.POOL
    assert torch.equal(found.log_probs[by_pool], found.pool[by_pool])
    assert (kl(found.pool, exact.log_probs)[by_pool] <= found.gap[by_pool] + 1e-12).all()
    assert (kl(exact.log_probs, found.log_probs)[~by_pool] <= found.gap[~by_pool] + 1e-12).all()
    assert total_variation(found.log_probs, exact.log_probs).max() <= math.sqrt(tol / 2)
    assert (found.gap <= tol).all()
    assert found.gap_is_certified.all()
    again = found.verify(heads, log_p)
    assert (again.status == Status.OPTIMAL).all()
    assert torch.allclose(again.gap[by_pool], found.gap[by_pool], atol=1e-9)
    assert again.total_variation.max() < 1e-9


def test_the_pool_never_answers_where_it_may_not():
    log_p, heads = members(v=40, batch=8, seed=2)
    found = softmeet.combine(log_p, heads, "max-entropy", tol=0.3)
    assert found.fallback.any()
    assert (found.stopped_by[~found.fallback] != StoppedBy.POOL).all()


def test_how_far_meet_moves_the_pool_is_what_it_says():
    log_p, heads = members(v=40, batch=8, seed=2)
    found = softmeet.combine(log_p, heads, trust=[0.5, 2.0], tol=1e-12)
    moved = Movement.of(found)
    p, q = found.log_probs.flatten(0, -2), found.pool.flatten(0, -2)
    assert torch.allclose(moved.forward, kl(p, q))
    assert torch.allclose(moved.backward, kl(q, p))
    assert torch.allclose(moved.total_variation, total_variation(p, q))
    # The excess is KL(q‖p°) + Σ ρ_i KL(q‖r_i°), so never less than the first.
    assert (moved.backward <= moved.excess + 1e-9).all()
    assert Movement.of(softmeet.combine(log_p, heads, "logit-mean")) is None
    assert Movement.of(softmeet.combine(log_p, heads, trust=math.inf)) is None


def test_check_and_evaluate_say_how_far(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(
        "And it came to pass, when men began to multiply on the face of the earth, that there were giants. "
    )
    given = ["-m", "narrow/opt-a", "-m", "narrow/opt-b", "--text", text]
    facts = json.loads(ran("check", *given, "--tokens", 20, "--json").stdout)["movement"]
    assert facts["positions"] == 20
    assert 0 < facts["forward"]["5 %"] < facts["forward"]["median"] < facts["forward"]["95 %"]
    assert facts["forward"]["mean"] < facts["free"]["mean"]
    assert facts["says"].startswith(f"meet moves the average by {facts['forward']['mean']:.4f} nats a token")
    assert facts["says"] in " ".join(ran("check", *given, "--tokens", 20).stdout.split())
    rules = facts_of("evaluate", *given, "--rule", "meet:trust=0.3", "--rule", "meet:trust=0")["rules"]
    assert rules["meet:trust=0.3"]["movement"]["total_variation"]["mean"] > 0.005
    assert rules["meet:trust=0"]["movement"]["total_variation"]["mean"] < 1e-6
    assert "movement" not in rules["logit-mean"]


def test_check_without_a_text_takes_one_that_the_ensemble_samples():
    given = ["check", "-m", "narrow/opt-a", "-m", "narrow/opt-b", "--json"]

    def moved(*more):
        return json.loads(ran(*given, *more).stdout).get("movement")

    one, two = moved("--sampled", 8), moved("--sampled", 8)
    assert one == two
    assert one["positions"] == 8
    assert moved()["positions"] == 64
    assert moved("--sampled", 0) is None
