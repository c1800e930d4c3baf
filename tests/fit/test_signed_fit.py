"""``softmeet fit --signed-weights``: weights below 0 are found where they are best, and kept only if that is shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from commands import facts_of

from softmeet import Ensemble
from softmeet.evaluation.candidates import Options
from softmeet.evaluation.fit import fit
from softmeet.evaluation.layout import Layout, Values
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.save import figures, save, verdict

NAME = "logit-mean with signed weights"
QUICK = Options(signed_weights=True, meet_positions=20, premise_positions=20, evaluations=3)


@pytest.fixture(scope="module")
def over_bytes():
    return Ensemble.from_pretrained("mixed")


def text(ensemble, share, count=1500, seed=0):
    """Positions of 30 documents where the second member errs by an e, and the first by ``share`` of it.

    The truth's logits are the first member's, 1 / (1 - share) times, less the second's, share / (1 - share) times.
    """
    generator = torch.Generator().manual_seed(seed)
    over_bytes, head = ensemble.model.over_bytes, ensemble.model.heads[0]
    width = head.v if over_bytes else head.d
    spread = 1.2 if over_bytes else 0.5 / head.weight.std().item() / width**0.5 * 3

    def draw():
        return spread * torch.randn(count, width, generator=generator)

    truth, error = draw(), draw()
    states = [truth + share * error, truth + error]
    logits = truth if over_bytes else head.logits(truth)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    if over_bytes:
        states = [own.log_softmax(-1) for own in states]
    document = torch.arange(count) * 30 // count
    return Positions(states, targets, document, torch.ones(count, dtype=torch.int64), [f"d{k}" for k in range(30)])


@pytest.mark.parametrize("members", ["one_head", "over_bytes"])
def test_a_negative_weight_is_found_where_it_is_best_and_saved(members, request, tmp_path):
    ensemble = request.getfixturevalue(members)
    found = fit(ensemble, text(ensemble, 0.5), QUICK)
    assert found.chosen.name == NAME
    assert found.chosen.settings["weights"] == pytest.approx([2.0, -1.0], abs=0.3)
    assert found.chosen.settings["rule_temperature"] == pytest.approx(1.0, abs=0.2)
    assert sum(found.chosen.settings["weights"]) == pytest.approx(1)
    assert found.best_baseline.name != NAME
    assert found.difference.high < -0.02
    facts = save(ensemble, found, tmp_path / "fitted")
    assert verdict(facts).startswith(f"Uses {NAME}: -0.")
    again = json.loads((tmp_path / "fitted" / "config.json").read_text())
    assert (again["rule"], again["weights"]) == ("logit-mean", found.chosen.settings["weights"])


def test_a_negative_weight_that_chance_may_explain_is_refused(one_head):
    """The best weight is -0.05 here, and 200 positions to judge by cannot tell it from 0."""
    found = fit(one_head, text(one_head, 0.05, 600, seed=2), QUICK)
    by_name = {candidate.name: candidate for candidate in found.candidates}
    assert found.rival is by_name[NAME]
    assert found.fell_back
    assert found.chosen.baseline
    assert min(found.chosen.settings["weights"]) >= 0
    assert NAME in verdict(figures(found))


def test_free_weights_leave_signed_ones_with_the_sum_1(one_head):
    found = fit(one_head, text(one_head, 0.5, 600), replace(QUICK, free_weights=True))
    [own] = [candidate.settings for candidate in found.candidates if candidate.name == NAME]
    assert sum(own["weights"]) == pytest.approx(1)
    assert not own["free_weights"]
    assert min(own["weights"]) < 0


def test_signed_weights_are_held_as_they_are():
    layout = Layout(2, signed=True)
    theta = layout.pack(Values((1.7, -0.7), 1.2))
    assert layout.unpack(theta).weights.tolist() == pytest.approx([1.7, -0.7])
    assert layout.values(theta) == Values((1.7, -0.7), pytest.approx(1.2))
    assert layout.values(layout.pack(Values((1.001, -0.001)))).weights == (1.0, 0.0)


def test_the_command(folders, texts, tmp_path):
    sizes = ["--evaluations", 1, "--meet-tokens", 10, "--premise-tokens", 10]
    given = [*tiny.each("-m", folders), "-t", texts, "--signed-weights", "--out", tmp_path / "out", *sizes]
    row = facts_of("fit", *given)["candidates"][NAME]
    assert not row["baseline"]
    assert sum(row["weights"]) == pytest.approx(1)
