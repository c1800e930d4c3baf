"""Members with one head: ``meet`` is an average of logits there, in closed form, and reads no head."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import tiny
import torch
from typer.testing import CliRunner

import softmeet
from softmeet import Ensemble, SoftmaxHead, Status
from softmeet.cli.main import app
from softmeet.engine.combine import Combiner
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.documents import Document
from softmeet.evaluation.perplexity import evaluate_text
from softmeet.heads import WhitenedHead
from softmeet.members.heads import one_head
from softmeet.rules.settings import Settings
from softmeet.server.ensembles import Served
from softmeet.server.errors import RequestError
from softmeet.server.schemas import CHANGES, Extension

V, D = 60, 5
INSTANCES = {
    "equal": ({"trust": 0.3}, {}),
    "in proportion to the weights": ({"trust": [0.4, 0.8, 1.2], "weights": [1 / 6, 1 / 3, 1 / 2]}, {}),
    "unequal": ({"trust": [0.2, 3.0, 0.0], "weights": [0.5, 0.0, 0.5]}, {}),
    "large": ({"trust": [30.0, 1.0, 7.0]}, {"bias": True}),
    "bias and scale": ({"trust": [1.0, 0.1, 0.5], "weights": [0.2, 0.3, 0.5]}, {"bias": True, "scale": 0.7}),
    "budget": ({"rule": "meet:budget=1", "trust": [1.0, 0.1, 0.5]}, {}),
}


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def head(bias=False, scale=1.0, cap=None, seed=0):
    return SoftmaxHead(drawn(V, D, seed=seed), drawn(V, seed=1) if bias else None, scale, cap)


def hidden(n=3, rows=4):
    return [drawn(rows, D, seed=10 + i) for i in range(n)]


def solved(own, settings, support=None, heads=None):
    """What an ensemble computes of hidden states; the heads are copies of one."""
    combiner = Combiner([f"m{i}" for i in range(3)], heads or [own, own, own], support)
    return combiner.solve_rows(hidden(), Settings.of(settings).for_members(3))[1]


@contextmanager
def no_reads():
    """No head is whitened or read for a rule, meanwhile."""

    def refuse(*args, **options):
        raise AssertionError("a head was read")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("scores", "moments", "rows", "even_rows", "block"):
            patch.setattr(WhitenedHead, name, refuse)
        patch.setattr(SoftmaxHead, "whitening", refuse)
        yield


def copies(own):
    return [
        SoftmaxHead(own.weight.clone(), None if own.bias is None else own.bias.clone(), own.scale) for _ in range(3)
    ]


@pytest.mark.parametrize("name", INSTANCES)
def test_it_is_what_the_solver_finds_and_its_dual_variables_prove_it(name):
    settings, kind = INSTANCES[name]
    own, tol = head(**kind), 1e-9
    with no_reads():
        found, again = solved(own, settings), solved(own, settings, heads=copies(own))
    assert torch.equal(found.log_probs, again.log_probs)
    assert (found.status == Status.OPTIMAL).all()
    assert (found.num_passes == 0).all()
    assert (found.num_steps == 0).all()
    assert (found.gap == 0).all()
    assert found.gap_is_certified.all()
    # combine() cannot know where log-probabilities come from, and solves.
    log_p = torch.stack([own.log_probs(states) for states in hidden()])
    expected = softmeet.combine(log_p, copies(own), **settings | {"rule": "meet", "tol": tol})
    assert (expected.num_passes > 0).all() or name == "in proportion to the weights"
    assert (found.log_probs.exp() - expected.log_probs.exp()).abs().max() < math.sqrt(tol)
    assert torch.allclose(found.objective, expected.objective, atol=1e-7)
    assert (found.disagreement_is_bound[:, 0] == torch.tensor([not rho for rho in found.problem.trust])).all()
    theirs = torch.where(found.disagreement_is_bound, found.disagreement, expected.disagreement)
    assert torch.allclose(found.disagreement, theirs, atol=1e-3)
    checked = found.verify([own] * 3, log_p)
    assert (checked.status == Status.OPTIMAL).all()
    assert (checked.gap < 1e-9).all()
    assert (checked.total_variation < 1e-9).all()
    # p ∝ q exp(Σ W λ_i), and every corrected member is p.
    lam, p = found._answer.dual, found.log_probs
    assert torch.allclose((found.pool + sum(lam) @ own.weight.T).log_softmax(-1), p)
    for i, rho in enumerate(found.problem.trust):
        if rho:
            assert torch.allclose((log_p[i] - lam[i] @ own.weight.T / rho).log_softmax(-1), p)
    if name == "in proportion to the weights":
        assert torch.allclose(p, found.pool, atol=1e-14)
    # A solver that begins there has nothing left to do but to prove it.
    again = softmeet.combine(log_p, [own] * 3, start=found, **settings | {"tol": 1e-8, "rule": "meet"})
    assert (again.num_steps <= 2).all()


def test_what_a_support_takes_is_proved_and_else_solved(monkeypatch):
    """Padding that members give mass to costs the gap; a row in which that is too much is solved."""
    own, settings = head(), {"trust": [0.5, 0.2, 2.0]}
    log_p = torch.stack([own.log_probs(states) for states in hidden()])
    average = torch.einsum("n,nbv->bv", (1 / 3 + torch.tensor([0.5, 0.2, 2.0])).double() / 3.7, log_p).log_softmax(-1)
    support = torch.ones(V, dtype=torch.bool)
    support[average[0].argsort()[:8]] = False
    lost = -2.7 * average[:, support].logsumexp(-1)
    tol = (lost[0] + lost[1:].min()).item() / 2
    assert lost[0] < tol < lost[1:].min()
    found = solved(own, {**settings, "tol": tol}, support)
    exact = softmeet.combine(log_p, copies(own), support=support, **settings, tol=1e-10)
    assert found.num_passes[0] == 0
    assert found.gap[0] == pytest.approx(lost[0].item())
    assert (found.status == Status.OPTIMAL).all()
    assert (found.num_passes[1:] > 0).any()
    assert (found.log_probs[:, ~support] == -torch.inf).all()
    assert (softmeet.simplex.kl(exact.log_probs, found.log_probs) <= tol).all()
    # A lower bound, within the gap.
    assert (found.objective <= exact.objective + 1e-9).all()
    assert (exact.objective - found.objective <= found.gap + 1e-9).all()
    assert (found.verify([own] * 3, log_p).status == Status.OPTIMAL).all()


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        ({"pool": "prob-mean"}, {}),
        ({"trust": [math.inf, 1.0, 1.0]}, {}),
        ({"rule": "max-entropy"}, {}),
        ({"weights": [1.0, 1.0, 0.0], "free_weights": True}, {"bias": True}),
        ({}, {"cap": 5.0}),
    ],
)
def test_where_it_does_not_hold_the_solver_is_asked(settings, other):
    own = head(**other)
    combiner = Combiner(["a", "b", "c"], [own] * 3)
    complete = Settings.of({"trust": 1.0, **settings}).for_members(3)
    assert combiner.average(complete) is None
    assert (combiner.solve_rows(hidden(), complete)[1].num_passes > 0).any()


def test_what_one_head_is():
    own = head(bias=True)
    assert one_head([own, *copies(own)])
    assert one_head([own, SoftmaxHead(own.weight, own.bias)])
    assert not one_head([own])
    others = [head(), head(bias=True, scale=2.0), head(bias=True, seed=3), head(bias=True, cap=5.0)]
    others += [SoftmaxHead(own.weight[:-1], own.bias[:-1]), SoftmaxHead(own.weight.float(), own.bias)]
    others += [SoftmaxHead(own.weight, own.bias + 1), SoftmaxHead(own.weight.to("meta"), own.bias.to("meta"))]
    assert not any(one_head([own, other]) for other in others)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two tiny members, the head of the second a copy of that of the first."""
    folder = tmp_path_factory.mktemp("pair")
    found = Ensemble.from_pretrained([tiny.save(folder / name, name, k) for k, name in enumerate(("neox", "llama"))])
    one, other = (member.get_output_embeddings().weight for member in found.model.members)
    with torch.no_grad():
        other.copy_(one)
    for member, name in zip(found.model.members, found.names, strict=True):
        member.save_pretrained(name)
    return found.names


@no_reads()
def test_texts_are_those_of_the_average_without_a_gate(pair):
    options = {"max_new_tokens": 12, "seed": 3, "do_sample": True}
    meet = Ensemble.from_pretrained(pair, trust=[1.0, 0.5], weights=[0.25, 0.75], gate="auto")
    average = Ensemble.from_pretrained(pair, "logit-mean", weights=[0.5, 0.5])
    assert meet.generate("the", **options) == average.generate("the", **options)
    assert meet.next_token("the").solution.num_passes == 0
    document, choice = Document("a", "the quick brown fox"), RuleChoice("meet", {"rule": "meet"})
    scores = evaluate_text(meet, [document], [choice]).choices["meet"]
    assert scores.passes == 0
    expected = evaluate_text(average, [document], [RuleChoice("logit-mean", {"rule": "logit-mean"})])
    assert torch.allclose(scores.nats, expected.choices["logit-mean"].nats, atol=1e-5)


def test_the_server_says_that_no_gate_saves_anything(pair):
    served = Served("pair", Ensemble.from_pretrained(pair, trust=1.0, gate="auto"), tuple(pair))
    plain = served.combination(Extension(), CHANGES)
    assert plain.gate is None
    assert served.combination(Extension(gate="auto"), CHANGES).gate is None
    with pytest.raises(RequestError, match=r"one head, so there is no solve that the gate disagreement:0.1 could save"):
        served.combination(Extension(gate="disagreement:0.1"), CHANGES)


def test_check_says_so(pair):
    def checked(*words):
        return CliRunner().invoke(app, ["check", *tiny.each("-m", pair), "--sampled", "0", *words])

    facts = json.loads(checked("--weights", "0.2,0.8", "--json").stdout)
    assert facts["average"] == pytest.approx([(0.2 + 0.3) / 1.6, (0.8 + 0.3) / 1.6])
    sentence = "All members have one head, so meet is logit-mean with weights 0.312, 0.688 here, and costs no more"
    assert facts["notes"][0].startswith(sentence)
    assert "meet is logit-mean with weights 0.5, 0.5" in " ".join(checked().stdout.split())
    assert "span one column space" in json.loads(checked("--pool", "prob-mean", "--json").stdout)["notes"][0]
