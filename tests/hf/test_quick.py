"""Averages without a report: the same distributions as those that are solved for, and the same errors."""

from __future__ import annotations

import pytest
import torch

from softmeet import SoftmaxHead
from softmeet.engine import combine as combining
from softmeet.engine.combine import Combiner
from softmeet.errors import DisjointSupportError, NonFiniteError
from softmeet.rules.settings import Settings

V = 40
RULES = ("logit-mean", "prob-mean", "power-mean:order=0.3", "power-mean:order=0", "power-mean:order=1")


def combiner(widths=(5, 7), sizes=(V, V), support=None, dtype=torch.float32, bias=None):
    generator = torch.Generator().manual_seed(0)
    heads = [
        SoftmaxHead(torch.randn(v, d, generator=generator).to(dtype), bias=bias)
        for v, d in zip(sizes, widths, strict=True)
    ]
    return Combiner(["a", "b"][: len(heads)], heads, support)


def hidden(of, rows=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(rows, head.d, generator=generator).to(dtype) for head in of.heads]


def both(of, states, **settings):
    """What generation computes without a report and with one, and whether the first was quick."""
    chosen = Settings(**settings).for_members(len(of.heads))
    return tuple(made(of, states, chosen, quickly=quickly) for quickly in (True, False))


def made(of, states, chosen, quickly=True):
    """What generation computes."""
    return torch.cat([part.ours for part in of.combined(states, chosen, quickly=quickly, proved=False)])


@pytest.fixture
def counted(monkeypatch):
    """How many rows were solved for."""
    solved = []
    original = Combiner.solve_rows

    def count(self, states, *args, **options):
        solved.append(len(states[0]))
        return original(self, states, *args, **options)

    monkeypatch.setattr(combining.Combiner, "solve_rows", count)
    return solved


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"weights": (0.2, 0.8)}, {"rule_temperature": 0.7}, {"weights": (1.5, 0.3), "free_weights": True}],
    ids=["plain", "weights", "temperature", "free"],
)
def test_distributions_are_those_that_are_solved_for(rule, dtype, settings, counted):
    of = combiner(dtype=dtype)
    ours, theirs = both(of, hidden(of, dtype=dtype), rule=rule, **settings)
    assert ours.dtype == theirs.dtype == dtype
    assert torch.allclose(ours, theirs, atol=2e-5 if dtype == torch.float32 else 1e-11)
    assert counted == [6] * (1 + (rule == "power-mean:order=0"))  # an order that fp32 would round is solved for


@pytest.mark.parametrize("rule", RULES[:3])
def test_ids_that_are_no_tokens_and_narrower_heads(rule):
    support = torch.arange(V) < V - 4
    of = combiner(sizes=(V, V - 6), support=support)
    ours, theirs = both(of, hidden(of), rule=rule)
    assert torch.equal(ours.isneginf(), theirs.isneginf())
    assert ours[..., ~support].isneginf().all()
    some = ~theirs.isneginf()
    assert torch.allclose(ours[some], theirs[some], atol=2e-5)


def test_signed_weights_and_excluded_tokens(counted):
    bias = torch.zeros(V).index_fill(0, torch.arange(3), -torch.inf)
    of = combiner(bias=bias)
    for weights in ((0.4, 0.6), (1.5, -0.5)):
        ours, theirs = both(of, hidden(of), rule="logit-mean", weights=weights)
        assert torch.equal(ours.isneginf(), theirs.isneginf())
        assert torch.allclose(ours[..., 3:], theirs[..., 3:], atol=2e-5)
    # What a member of negative weight excludes has to be found by solving.
    assert counted == [6, 6, 6]


def test_without_any_token_left_the_error_is_the_same():
    bias = torch.full((V,), -torch.inf).index_fill(0, torch.tensor([0]), 0.0)
    heads = [SoftmaxHead(torch.ones(V, 2), bias=bias), SoftmaxHead(torch.ones(V, 2), bias=bias.roll(1))]
    of = Combiner(["a", "b"], heads)
    states = [torch.ones(1, 2)] * 2
    with pytest.raises(DisjointSupportError):
        made(of, states, Settings(rule="logit-mean").for_members(2))
    (mixed, theirs) = both(of, states, rule="prob-mean")
    assert torch.allclose(mixed[..., :2], theirs[..., :2], atol=1e-6)


@pytest.mark.parametrize("rule", RULES[:3])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0)], ids=["equal", "one"])
def test_nan_names_its_member(rule, weights):
    of = combiner()
    states = hidden(of)
    states[1][2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"member 1.*a, b"):
        made(of, states, Settings(rule=rule, weights=weights).for_members(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"gate": "unsure:0.5"},
        {"gate": "disagreement:0.1"},
        {"weights": (1.0, 0.0)},
        {"rule": "logit-mean:plausibility=0.1"},
        {"rule": "meet"},
    ],
    ids=str,
)
def test_what_is_more_than_an_average_is_solved_for(settings, counted):
    of = combiner()
    ours, theirs = both(of, hidden(of), **{"rule": "logit-mean", **settings})
    assert torch.equal(ours, theirs)
    assert counted == [6, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_multiplied_as_the_model_does(dtype):
    of = combiner(dtype=dtype)
    states = hidden(of, dtype=dtype)
    ours, theirs = both(of, states, rule="logit-mean")
    assert ours.dtype == torch.float32
    own = [(state @ head.weight.T).float() for state, head in zip(states, of.heads, strict=True)]
    assert torch.allclose(ours, (0.5 * own[0] + 0.5 * own[1]).log_softmax(-1), atol=1e-5)
    # A report multiplies in fp32: logits are near, not equal.
    assert 1e-5 < (ours - theirs).abs().max() < 0.2


def test_many_rows_are_solved_for_in_chunks(counted, monkeypatch):
    monkeypatch.setattr(combining, "_ELEMENTS", 5 * 2 * V)
    of = combiner()
    ours, theirs = both(of, hidden(of), rule="prob-mean")
    assert torch.equal(ours, theirs)
    assert counted == [1] * 12
