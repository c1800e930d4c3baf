"""``softmeet fit --signed-weights``: weights below 0 are found where they are best, and kept only if that is shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from texts import documents
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app
from softmeet.evaluation.average import Family
from softmeet.evaluation.candidates import Options
from softmeet.evaluation.fit import fit
from softmeet.evaluation.layout import Layout, Values
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.save import figures, save, verdict
from softmeet.evaluation.scoring import Text
from softmeet.scaling.local import LocalEngine

NAME = "logit-mean with signed weights"
QUICK = Options(signed_weights=True, meet_positions=20, premise_positions=20, evaluations=3)


@pytest.fixture(scope="module")
def over_tokens(tmp_path_factory):
    """Two tiny members with one head, so that what they say is in their hidden states."""
    folder = tmp_path_factory.mktemp("members")
    found = Ensemble.from_pretrained(
        [tiny.save(folder / name, name, seed=k) for k, name in enumerate(("gpt2", "llama"))]
    )
    one, other = (member.get_output_embeddings().weight for member in found.model.members)
    with torch.no_grad():
        other.copy_(one)
    return found


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


@pytest.mark.parametrize("vocabulary", ["tokens", "bytes"])
def test_a_negative_weight_is_found_where_it_is_best_and_saved(vocabulary, request, tmp_path):
    ensemble = request.getfixturevalue(f"over_{vocabulary}")
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


def test_a_negative_weight_that_chance_may_explain_is_refused(over_tokens):
    """The best weight is -0.05 here, and 200 positions to judge by cannot tell it from 0."""
    found = fit(over_tokens, text(over_tokens, 0.05, 600, seed=2), QUICK)
    by_name = {candidate.name: candidate for candidate in found.candidates}
    assert found.rival is by_name[NAME]
    assert found.fell_back
    assert found.chosen.baseline
    assert min(found.chosen.settings["weights"]) >= 0
    assert NAME in verdict(figures(found))


def test_without_the_option_no_weight_is_negative(over_tokens):
    found = fit(over_tokens, text(over_tokens, 0.5, 600), replace(QUICK, signed_weights=False))
    assert NAME not in [candidate.name for candidate in found.candidates]
    assert all(min(candidate.settings["weights"]) >= 0 for candidate in found.candidates)


def test_free_weights_leave_signed_ones_with_the_sum_1(over_tokens):
    found = fit(over_tokens, text(over_tokens, 0.5, 600), replace(QUICK, free_weights=True))
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


def test_the_loss_of_signed_weights_is_that_of_the_formula(over_tokens):
    few = text(over_tokens, 0.5, 60).take(slice(6))
    family = Family(Layout(2, signed=True))
    found = Text(over_tokens.model, few, LocalEngine()).sums(family, family.layout.pack(Values((1.7, -0.7), 1.2)))
    scores = 1.7 * few.hidden[0] - 0.7 * few.hidden[1]
    expected = -(over_tokens.model.heads[0].logits(scores) / 1.2).log_softmax(-1)[range(6), few.targets].mean()
    assert found.loss == pytest.approx(expected.item(), abs=1e-5)


def test_the_command(tmp_path):
    members = [tiny.save(tmp_path / name, name, seed=k) for k, name in enumerate(("gpt2", "llama"))]
    (tmp_path / "text").write_text("\n\n".join(document.text for document in documents()))
    command = ["fit", *tiny.each("-m", members), "-t", tmp_path / "text", "--separator", "\n\n", "--signed-weights"]
    command += ["--out", tmp_path / "out", "--json", tmp_path / "fit.json", "--evaluations", 1, "--meet-tokens", 10]
    done = CliRunner().invoke(app, [*map(str, command), "--premise-tokens", "10"])
    assert done.exit_code == 0, done.output
    row = json.loads((tmp_path / "fit.json").read_text())["candidates"][NAME]
    assert not row["baseline"]
    assert sum(row["weights"]) == pytest.approx(1)
