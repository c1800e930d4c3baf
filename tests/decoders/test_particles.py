"""Particles against sums over all texts."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import rival_oracles
import torch

from softmeet import Settings
from softmeet.decoders.base import ToWrite
from softmeet.decoders.particles import Particles, systematic
from softmeet.decoders.registry import decoder_of
from softmeet.errors import InvalidInputError

RUNS = 4000
# (rule, what the oracle calls it, its order)
RULES = [
    ("logit-mean", "product", None), ("prob-mean", "mean", None), ("power-mean:order=0.5", "power", 0.5),
    ("pointwise-min", "min", None), ("pointwise-max", "max", None),
]  # fmt: skip
# (members, symbols, T)
SIZES = [(2, 3, 4), (3, 4, 3), (2, 5, 5)]


class Tables:
    """Texts of toy members, many at once: what follows each text is in a table, by the text's number."""

    def __init__(self, members, v, most, rows, seed=0):
        self.v, self.most, self.rows, self.end = v, most, rows, v - 1
        count = sum(v**k for k in range(most))
        generator = np.random.default_rng(seed)
        scores = generator.normal(size=(members, count, v)) * 1.5
        # Some symbols have probability 0, the end now and then, and the first member cannot begin with symbol 0.
        dead = generator.random((members, count, v)) < 0.15
        dead[:, :, 1] = False
        scores[dead] = -math.inf
        scores[0, 0, 0] = -math.inf
        self.table = torch.tensor(scores).log_softmax(-1)
        self.at = torch.zeros(rows, dtype=torch.long)
        self.closed = torch.zeros(rows, dtype=torch.bool)

    def log_probs(self, rows):
        assert rows
        assert not self.closed[rows].any()
        return self.table[:, self.at[rows]]

    def add(self, rows, symbols):
        self.at[rows] = self.at[rows] * self.v + 1 + torch.tensor(symbols)

    def finish(self, rows):
        self.closed[rows] = True

    def replace(self, rows, sources):
        self.at[rows], self.closed[rows] = self.at[sources], self.closed[sources]

    def symbols(self, row):
        found, at = [], int(self.at[row])
        while at:
            found.append((at - 1) % self.v)
            at = (at - 1) // self.v
        return tuple(found[::-1])

    def allowed(self, rows):
        return None

    def toys(self):
        def told(i, text):
            at = 0
            for symbol in text:
                at = at * self.v + 1 + symbol
            return self.table[i, at].exp().numpy()

        return [rival_oracles.Toy(self.v, self.end, lambda text, i=i: told(i, text)) for i in range(len(self.table))]


def written(size, rule, weights, *, n=4, runs=RUNS, seed=0, **options):
    members, v, most = size
    texts = Tables(members, v, most, n * runs)
    generator = torch.Generator().manual_seed(seed)
    settings = Settings(rule=rule, weights=weights).for_members(members)
    decoder = Particles(n=n, **options)
    decoder.require(settings)
    return texts, decoder.decode(texts, ToWrite(runs, settings, most, frozenset({texts.end}), generator))


@cache
def exact(size, op, order, weights):
    texts = Tables(*size, 1)
    return rival_oracles.sequence_ensemble(texts.toys(), np.array(weights), op, size[2], order)


def weights_of(size):
    return (0.5, 0.5) if size[0] == 2 else (0.2, 0.3, 0.5)


@pytest.mark.parametrize(
    ("rule", "op", "order", "size"),
    [(*RULES[k], SIZES[size]) for k, size in ((0, 0), (0, 1), (1, 1), (2, 0), (3, 1), (4, 0), (0, 2), (4, 2))],
)
def test_means_are_those_of_the_ensemble_of_texts(rule, op, order, size):
    """The mean of Ẑ is Z, and that of Ẑ where a text is drawn Z π of it, both within four standard errors."""
    weights = weights_of(size)
    z, shares = exact(size, op, order, weights)
    _, found = written(size, rule, weights)
    estimates = np.array([math.exp(one.log_z) for one in found])
    assert abs(estimates.mean() - z) <= 4 * estimates.std() / RUNS**0.5 + 1e-12
    # Texts that are drawn less than ten times count as one: of few draws no standard error can be told.
    rare = {text for text, share in shares.items() if share * RUNS < 10}
    names = {text: None if text in rare else text for text in shares}
    expected = dict.fromkeys(names.values(), 0.0)
    for text, share in shares.items():
        expected[names[text]] += z * share
    drawn = [one if one.chosen is None else names[one.texts[one.chosen].symbols] for one in found]
    places = {text: k for k, text in enumerate(expected)}
    numbers = np.array([places.get(one, -1) for one in drawn])
    for text, mean in expected.items():
        values = np.where(numbers == places[text], estimates, 0.0)
        spread = max(values.var(), mean * (z - mean))  # what it would be if every estimate were Z
        assert abs(values.mean() - mean) <= 4 * (spread / RUNS) ** 0.5 + 1e-12, text


def test_members_that_can_write_nothing_together_have_an_estimate_of_zero():
    texts = Tables(2, 3, 3, 8)
    texts.table[0], texts.table[1] = -math.inf, -math.inf
    texts.table[0, :, 0] = texts.table[1, :, 1] = 0.0
    settings = Settings(rule="pointwise-min").for_members(2)
    found = Particles(n=4).decode(texts, ToWrite(2, settings, 3, frozenset({2}), torch.Generator().manual_seed(0)))
    assert [(one.log_z, one.chosen, one.text) for one in found] == [(-math.inf, None, None)] * 2


def test_drawing_anew_at_every_symbol_changes_no_mean():
    """Which it would if texts that were drawn anew kept their weights."""
    size, weights, runs = (2, 4, 4), (0.5, 0.5), 10_000  # with fewer, weights that are kept are not seen
    z, shares = exact(size, "product", None, weights)
    _, found = written(size, "logit-mean", weights, runs=runs, ess=1.0)
    estimates = np.array([math.exp(one.log_z) for one in found])
    assert abs(estimates.mean() - z) <= 4 * estimates.std() / runs**0.5
    for text in sorted(shares, key=shares.get)[-5:]:
        values = (
            np.array([one.chosen is not None and one.texts[one.chosen].symbols == text for one in found]) * estimates
        )
        assert abs(values.mean() - z * shares[text]) <= 4 * values.std() / runs**0.5


@pytest.mark.parametrize("seed", range(20))
def test_systematic_draws_are_between_rounding_down_and_up(seed):
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(3, 7, generator=generator, dtype=torch.float64) ** 4
    shares[:, seed % 7] = 0
    shares /= shares.sum(-1, keepdim=True)
    drawn = systematic(shares, torch.rand(3, 1, generator=generator, dtype=torch.float64))
    for row, own in zip(drawn, shares, strict=True):
        counts = torch.bincount(row, minlength=7)
        assert ((counts - 7 * own).abs() < 1 + 1e-9).all()
        assert not counts[seed % 7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "meet"}, "meet does not: choose logit-mean or prob-mean or power-mean"),
        ({"rule": "logit-mean", "plausibility": 0.1}, "does not: choose"),
        ({"rule": "logit-mean", "gate": "unsure:0.5"}, "cannot be used with the gate unsure:0.5: leave it out"),
        ({"rule": "logit-mean", "rule_temperature": 0.5}, "cannot be used with rule_temperature"),
    ],
)
def test_what_has_no_meaning_for_texts_is_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        Particles().require(Settings.of(settings))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("particle", "unknown decoder 'particle': .*particles"), ("particles:m=3", "unknown option 'm'"),
        ("particles:n", "expected option=value"), ("particles:n=0", "expected n of particles to be greater"),
        ("particles:n=2:n=3", "each option once"), (3, "a decoder's name"),
    ],
)  # fmt: skip
def test_decoders_are_made_of_texts(text, message):
    with pytest.raises(InvalidInputError, match=message):
        decoder_of(text)
    assert str(decoder_of("particles:n=3:utf8=true")) == "particles:n=3:utf8=true"
