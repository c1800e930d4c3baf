"""The losses of averages: their derivatives against automatic ones, and scoring against scipy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.optimize import minimize

from softmeet.evaluation import scoring
from softmeet.evaluation.average import Family, Sums
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.layout import Layout, Values
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.scoring import Text
from softmeet.scaling.local import LocalEngine

V, B = 40, 5
FAMILIES = {
    "logit-mean": Family(Layout(3)),
    "free": Family(Layout(3, free=True, tempered=False)),
    "signed": Family(Layout(3, signed=True)),
    "prob-mean": Family(Layout(3), 1.0),
    "power-mean": Family(Layout(3, ordered=True)),
    "of order 0.3": Family(Layout(3), 0.3),
}


def rows(dtype=torch.float64, v=V, zeros=False):
    generator = torch.Generator().manual_seed(0)
    log_p = 2 * torch.randn(3, B, v, generator=generator, dtype=torch.float64)
    if zeros:
        log_p[0, :, ::7] = -torch.inf
        log_p[:, :, 3] = -torch.inf
    return log_p.log_softmax(-1).to(dtype), torch.arange(B) + 8


def expected(family, theta, log_p, support=None):
    """-log p(target) by the formula, for autograd."""
    parts = family.layout.unpack(theta)
    order = parts.order if family.layout.ordered else family.order
    if family.order == 0 and not family.layout.ordered:
        scores = torch.einsum("n,nbv->bv", parts.weights, log_p.clamp_min(-1e3))
        dead = log_p.isneginf().any(0)
    else:
        scores = (order * log_p.clamp_min(-1e3) + parts.weights.log()[:, None, None]).logsumexp(0) / order
        dead = log_p.isneginf().all(0)
    dead = dead if support is None else dead | ~support
    return (scores / parts.temperature).masked_fill(dead, -torch.inf).log_softmax(-1), dead


@pytest.mark.parametrize(
    ("name", "masked", "zeros"),
    [
        (name, masked, zeros)
        for k, name in enumerate(FAMILIES)
        for masked in (False, True)
        for zeros in (False, True)
        if (k + masked + zeros) % 2
    ],
)
def test_derivatives_are_those_of_the_formula(name, masked, zeros):
    family, (log_p, targets) = FAMILIES[name], rows(zeros=zeros)
    support = None
    if masked:
        support = torch.ones(V, dtype=torch.bool)
        support[-5:] = False
    theta = family.layout.pack(Values((0.2, 0.5, 0.3), 1.2, order=0.4)).requires_grad_()
    found = family.sums(theta.detach(), log_p, targets, support)
    loss = -expected(family, theta, log_p, support)[0][range(B), targets].sum()
    assert found.loss == pytest.approx(loss.item(), abs=1e-9)
    assert torch.allclose(found.gradient, torch.autograd.grad(loss, theta)[0], atol=1e-9)

    def finite(at):
        log_r, dead = expected(family, at, log_p, support)
        return log_r.masked_fill(dead, 0.0)

    slopes = torch.autograd.functional.jacobian(finite, theta.detach())
    weights = expected(family, theta.detach(), log_p, support)[0].exp()
    assert torch.allclose(found.information, torch.einsum("bvk,bv,bvj->kj", slopes, weights, slopes), atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_single_precision_suffices_over_a_large_vocabulary(name):
    family, (log_p, targets) = FAMILIES[name], rows(v=120_000)
    theta = family.layout.pack(Values((0.2, 0.5, 0.3), 1.2, order=0.4))
    exact, found = (family.sums(theta, log_p.to(dtype), targets, None) for dtype in (torch.float64, torch.float32))
    assert found.loss == pytest.approx(exact.loss, rel=1e-6)
    assert torch.allclose(found.gradient, exact.gradient, atol=2e-5)
    assert torch.allclose(found.information, exact.information, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "family",
    [Family(Layout(2)), Family(Layout(2), 1.0), Family(Layout(2, ordered=True)), Family(Layout(2, signed=True))],
)
def test_scoring_finds_what_scipy_finds_in_a_few_evaluations(ensemble, positions, family):
    text = Text(ensemble.model, positions, LocalEngine())
    values, loss, evaluations = text.fit(family, Values((0.5, 0.5)), 60, "own")
    low, high = zip(*family.layout.bounds(), strict=True)

    def mean(theta):
        sums = text.sums(family, torch.tensor(theta))
        return sums.loss, sums.gradient.numpy()

    start = family.layout.pack(Values((0.5, 0.5))).numpy()
    best = minimize(mean, start, jac=True, bounds=list(zip(low, high, strict=True)), options={"ftol": 1e-12})
    assert loss == pytest.approx(best.fun, abs=2e-6)
    assert evaluations <= 12 < best.nfev + 8
    assert sum(values.weights) == pytest.approx(1)


class Rows(Text):
    """Averages fitted to log-probabilities as they are, (n, N, v)."""

    def __init__(self, log_p, targets):
        self._rows, self._targets, self._cache = log_p, targets, PieceCache()

    def sums(self, family, theta, without=None, on_progress=None):
        return Sums(*(own / len(self._targets) for own in family.sums(theta, self._rows, self._targets, None)))


def overconfident(seed, n=4):
    """Four members that know some of the truth, exaggerate it, and err, some of them together, by far more."""
    generator = torch.Generator().manual_seed(seed)
    count, v = (50, 40) if seed % 2 else (300, 8)
    truth = (0.5 + 3.5 * torch.rand(1, generator=generator)) * torch.randn(count, v, generator=generator)
    shared, own = (torch.randn(k, count, v, generator=generator) for k in (1, n))
    errors = torch.where(torch.rand(n, 1, 1, generator=generator) < 0.3, shared, own)
    sharp = 0.4 + 1.2 * torch.rand(n, 1, 1, generator=generator)
    errors = 4 * torch.rand(1, generator=generator) * torch.rand(n, 1, 1, generator=generator) * errors
    log_p = (sharp * truth + errors).double().log_softmax(-1)
    return log_p, truth.softmax(-1).multinomial(1, generator=generator)[:, 0]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "power-mean"])
def test_scoring_ends_at_an_optimum_where_members_are_far_too_certain(name):
    """No step of scipy's from where scoring ends lowers the loss, though the Fisher information is no guide there."""
    family = replace(FAMILIES[name], layout=replace(FAMILIES[name].layout, n=4))
    lower = []
    for seed in (1, 15, 27, 37, 38):
        text = Rows(*overconfident(seed))
        values, loss, _ = text.fit(family, Values((0.25,) * 4), 75, "own")

        def mean(theta, text=text):
            sums = text.sums(family, torch.tensor(theta))
            return sums.loss, sums.gradient.numpy()

        end = family.layout.pack(values).numpy()
        best = minimize(mean, end, jac=True, bounds=family.layout.bounds(), options={"ftol": 1e-12})
        lower.append(loss - best.fun)
    assert max(lower) < 2e-4


def test_a_fold_is_left_out(ensemble, positions):
    fold, family = positions.document % 3, Family(Layout(2), 1.0)
    text = Text(ensemble.model, positions, LocalEngine(), fold)
    others = Text(ensemble.model, positions.take((fold != 1).nonzero().squeeze(-1)), LocalEngine())
    theta = family.layout.pack(Values((0.3, 0.7), 1.1))
    ours, theirs = text.sums(family, theta, without=1), others.sums(family, theta)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
    assert torch.allclose(ours.gradient, theirs.gradient, atol=1e-6)
    assert ours.loss != pytest.approx(text.sums(family, theta).loss, abs=1e-4)


def test_log_probabilities_are_computed_once_for_all_fits(ensemble, positions, monkeypatch):
    text = Text(ensemble.model, positions, LocalEngine())
    text.fit(Family(Layout(2)), Values((0.5, 0.5)), 3, "first")
    combiner = type(ensemble.model.combiner)
    monkeypatch.setattr(combiner, "own_log_probs", lambda *args: pytest.fail("computed again"))
    text.fit(Family(Layout(2), 1.0), Values((0.5, 0.5)), 3, "second")
    monkeypatch.undo()
    monkeypatch.setattr(scoring, "HELD", 0.0)
    assert not any(piece.keep for piece in Text(ensemble.model, positions, LocalEngine())._pieces)


def test_evaluations_are_kept_and_go_on(ensemble, positions, tmp_path, monkeypatch):
    family = Family(Layout(2))
    text = Text(ensemble.model, positions, LocalEngine(), cache=PieceCache(tmp_path, {}))
    first = text.fit(family, Values((0.5, 0.5)), 8, "own")
    monkeypatch.setattr(Text, "sums", lambda *args: pytest.fail("evaluated again"))
    assert text.fit(family, Values((0.5, 0.5)), 8, "own") == first


def test_scores_are_those_of_the_rules(ensemble, positions):
    values = Values((0.3, 0.7), 1.2, order=0.4)
    own = {
        "logit-mean": Family(Layout(2)),
        "prob-mean": Family(Layout(2), 1.0),
        "power-mean:order=0.4": Family(Layout(2, ordered=True)),
    }
    settings = {"weights": [0.3, 0.7], "rule_temperature": 1.2}
    expected = evaluate(ensemble, positions, [RuleChoice(rule, {"rule": rule, **settings}) for rule in own])
    fold = positions.document % 2
    averages = {rule: (family, values) for rule, family in own.items()}
    found = Text(ensemble.model, positions, LocalEngine(), fold).scores(ensemble.names, [averages, averages])
    for kind in ("members", "choices"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        assert list(ours) == list(theirs)
        for name in ours:
            assert torch.allclose(ours[name].nats, theirs[name].nats, atol=1e-5)
            assert torch.equal(ours[name].hit, theirs[name].hit)
            assert torch.allclose(ours[name].confidence, theirs[name].confidence, atol=1e-5)
    assert torch.allclose(found.disagreement, expected.disagreement, atol=1e-6)
    assert torch.equal(found.positions.targets, positions.targets)


def test_a_loss_that_is_infinite_everywhere_ends_at_the_start(ensemble, positions, monkeypatch):
    """A logit mean gives no probability to what one member excludes, whatever the weights."""
    text, family = Text(ensemble.model, positions, LocalEngine()), Family(Layout(2))
    whole = type(ensemble.model.combiner).own_log_probs

    def excluded(self, hidden):
        log_p, logits = whole(self, hidden)
        return log_p.index_fill(-1, positions.targets[:1], -torch.inf), logits

    monkeypatch.setattr(type(ensemble.model.combiner), "own_log_probs", excluded)
    values, loss, _ = text.fit(family, Values((0.5, 0.5)), 8, "own")
    assert loss == float("inf")
    assert values.weights == (0.5, 0.5)
