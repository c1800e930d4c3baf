"""Trust per band of principal directions."""

from __future__ import annotations

import pytest
import tiny
import torch

from softmeet import Ensemble, combine
from softmeet.errors import InvalidInputError
from softmeet.evaluation.choices import RuleChoice, parse_choices
from softmeet.evaluation.documents import Document
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import observe_text
from softmeet.heads import SoftmaxHead
from softmeet.members.bands import bands, principal_directions
from softmeet.server.ensembles import Served
from softmeet.server.schemas import CHANGES, Extension

pytestmark = pytest.mark.checked


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return [tiny.save(folder / name, name, seed=k) for k, name in enumerate(("gpt2", "llama"))]


def test_directions_are_those_of_the_singular_value_decomposition():
    W = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1.0, 7)
    V = torch.linalg.svd(W - W.mean(0)).Vh.T
    assert torch.allclose((principal_directions(SoftmaxHead(W)).T @ V).abs(), torch.eye(6).double(), atol=1e-6)
    parts = bands(SoftmaxHead(W), 4)
    assert [band.d for band in parts] == [2, 2, 1, 1]
    with pytest.raises(InvalidInputError, match="from 1 to 6 bands"):
        bands(SoftmaxHead(W), 7)


def test_a_trust_of_zero_drops_a_bands_constraint_and_no_other(folders):
    """With every other band at zero, one band is a member whose head has those directions alone."""
    ensemble = Ensemble.from_pretrained(folders, gate="none")
    hidden = ensemble.model.hidden_states(torch.arange(1, 5)[None])
    log_p, _ = ensemble.model.combiner.own_log_probs(hidden)
    banded = ensemble.model.settings.changed(bands=2, trust=[0.7, 0, 0, 0], tol=1e-9)
    found = ensemble.model.combiner.combine_rows(log_p, None, banded)
    (first, _) = bands(ensemble.model.heads[0], 2)
    other = ensemble.model.heads[1]
    expected = combine(log_p, [first, other], trust=[0.7, 0.0], tol=1e-9)
    assert torch.allclose(found.log_probs, expected.log_probs, atol=1e-5)
    assert found.disagreement.shape == (2, 4)
    assert not torch.allclose(found.log_probs, found.pool, atol=1e-3)


def test_an_ensemble_with_bands_is_saved_and_generates(folders, tmp_path):
    ensemble = Ensemble.from_pretrained(folders)
    ensemble.model.config.bands, ensemble.model.config.trust = 2, [0.5, 0.1, 1.0, 0.0]
    ensemble.save_pretrained(tmp_path / "e")
    again = Ensemble.from_pretrained(tmp_path / "e")
    assert (again.model.config.bands, again.model.config.trust) == (2, [0.5, 0.1, 1.0, 0.0])
    ids = torch.arange(1, 6)[None]
    assert torch.equal(again.model(input_ids=ids).logits, ensemble.model(input_ids=ids).logits)
    assert again.generate("the", max_new_tokens=3, do_sample=False)
    with pytest.raises(InvalidInputError, match="2 in all, or one for each member's 2 bands, 4 in all, got 3"):
        type(again.model.config)(members=[str(f) for f in folders], bands=2, trust=[1.0, 2.0, 3.0])


def test_one_trust_per_member_serves_all_its_bands(folders, tmp_path):
    saved = Ensemble.from_pretrained(folders)
    saved.model.config.bands, saved.model.config.trust = 2, [0.5, 0.1, 1.0, 0.0]
    saved.save_pretrained(tmp_path / "e")
    ensemble = Ensemble.from_pretrained(tmp_path / "e", trust=[0.5, 0.1])
    assert ensemble.model.config.trust == [0.5, 0.5, 0.1, 0.1]
    for given, expected in (("1/0.3", [1.0, 1.0, 0.3, 0.3]), ("1/2/3/4", [1.0, 2.0, 3.0, 4.0])):
        (choice,) = parse_choices([f"meet:trust={given}"], 2, 2)
        assert choice.settings["trust"] == expected
    positions = observe_text(ensemble, [Document("", "hello there")])
    rules = ("meet", "max-entropy")
    short, long = (
        evaluate(ensemble, positions, [RuleChoice(rule, {"rule": rule, "trust": trust}) for rule in rules]).choices
        for trust in ([0.3, 1.0], [0.3, 0.3, 1.0, 1.0])
    )
    assert all(torch.equal(short[rule].nats, long[rule].nats) for rule in rules)


def test_an_ensemble_with_bands_is_served(folders):
    ensemble = Ensemble.from_pretrained(folders)
    ensemble.model.config.bands, ensemble.model.config.trust = 2, [0.5, 0.1, 1.0, 0.0]
    served = Served("e", ensemble, ("a", "b"))
    assert served.combination(Extension(), CHANGES).settings.trust == (0.5, 0.1, 1.0, 0.0)
    assert served.combination(Extension(trust=[1.0, 2.0]), CHANGES).settings.trust == (1.0, 1.0, 2.0, 2.0)
    alone = served.combination(Extension(members=["b"]), CHANGES)
    assert (alone.settings.trust, alone.model.config.bands) == ((1.0, 0.0), 2)
