"""The gate ``auto``, the default of generation and serving: ``disagreement:0.08`` where ``meet`` has finite trusts."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import softmeet
from softmeet import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.documents import Document
from softmeet.evaluation.held_out import held_out_books
from softmeet.evaluation.positions import observe_text
from softmeet.rules.gates import Automatic, parse_gate
from softmeet.server.ensembles import load
from softmeet.server.schemas import Extension
from softmeet.simplex import kl

GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two tiny members with a tokenizer."""
    folder = tmp_path_factory.mktemp("pair")
    return [str(tiny.save(folder / name, name, seed)) for name, seed in (("gpt2", 0), ("llama", 1))]


@pytest.fixture
def alike():
    """Members of which some rows differ by more than the threshold, and some by less."""
    torch.manual_seed(0)
    scale = torch.linspace(0.05, 1.5, 12)[:, None]
    log_p = (torch.randn(1, 12, 40) + scale * torch.randn(2, 12, 40)).log_softmax(-1)
    return log_p, [torch.randn(40, 4), torch.randn(40, 4)]


def test_it_has_one_text_and_the_gate_it_took_the_place_of_is_refused_by_name():
    assert str(parse_gate("auto")) == "auto"
    for text in ("movement:0.003", "movement"):
        with pytest.raises(InvalidInputError, match=r"no gate movement since 0\.3\.0.*disagreement:T"):
            parse_gate(text)


def test_a_closed_row_is_the_pool_and_an_open_one_as_without(alike):
    log_p, heads = alike
    plain = softmeet.combine(log_p, heads)
    found = softmeet.combine(log_p, heads, gate="auto")
    assert found.gated.tolist() == (plain.problem.pool_bound() <= Automatic().threshold).tolist()
    assert 0 < found.gated.sum() < 12
    assert torch.equal(found.log_probs[found.gated], found.pool[found.gated])
    assert torch.equal(found.log_probs[~found.gated], plain.log_probs[~found.gated])
    assert (found.num_passes[found.gated] == 0).all()
    assert (found.stopped_by[found.gated] == softmeet.StoppedBy.GATE).all()
    for k in range(12):
        assert bool(softmeet.combine(log_p[:, k : k + 1], heads, gate="auto").gated) == bool(found.gated[k])


@pytest.mark.parametrize(
    "given",
    [{"rule": "max-entropy", "on_infeasible": "meet"}, {"rule": "logit-mean"}, {"trust": 0.0},
     {"trust": (1.0, float("inf"))}],
)  # fmt: skip
def test_it_closes_for_no_rule_but_one_that_moves_the_pool_by_finite_trusts(alike, pair, given):
    log_p, heads = alike
    assert not softmeet.combine(log_p, heads, gate="auto", **given).gated.any()
    ensemble = Ensemble.from_pretrained(pair, **{key: value for key, value in given.items() if key != "on_infeasible"})
    assert ensemble.model.combiner.resolved(ensemble.model.settings).gate is None


@pytest.mark.parametrize(("family", "every"), [("narrow", 24), ("wide", 40)])
def test_bundled_families_lose_nothing_by_it(family, every):
    """On held-out text: what is given up where the gate is closed, in nats a token of movement."""
    ensemble = Ensemble.from_pretrained(family, trust=0.3)
    model = ensemble.model
    settings = model.combiner.resolved(model.settings)
    texts = [Document(book.name, book.text[1000:1400]) for book in held_out_books()[:4]]
    some = [h[::every] for h in observe_text(ensemble, texts).hidden]
    _, plain = model.combiner.solve_rows(some, settings.ungated().changed(tol=1e-5))
    closed = ~settings.gate.open(plain.problem)
    moved = kl(plain.log_probs.double(), plain.pool.double())
    assert 0.05 < closed.double().mean() < 0.9
    assert moved[closed].mean() < 2e-3
    assert moved[~closed].mean() > 2 * moved[closed].mean()


def test_it_is_the_default_kept_in_checkpoints_and_that_of_requests(pair, tmp_path):
    ensemble = Ensemble.from_pretrained(pair)
    ensemble.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["gate"] == "auto"
    file.write_text(json.dumps(config | {"movement": {"{}": 0.02}}))  # as 0.2 wrote it
    saved = Ensemble.from_pretrained(tmp_path)
    assert saved.generate("a b", **GREEDY) == ensemble.generate("a b", **GREEDY)
    assert "movement" not in saved.model.config.to_dict()
    del config["gate"]
    file.write_text(json.dumps(config))
    assert Ensemble.from_pretrained(tmp_path).model.config.gate is None
    file.write_text(json.dumps(config | {"gate": "movement:0.01"}))
    with pytest.raises(InvalidInputError, match="no gate movement since"):
        Ensemble.from_pretrained(tmp_path)
    (served,) = load({"default": pair})
    assert str(served.combination(Extension(trust=0.4), ("trust",)).gate) == "auto"
