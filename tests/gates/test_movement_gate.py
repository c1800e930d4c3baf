"""The gate ``movement``, the default of generation and serving: calibrated once, and closed where nothing is lost."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import tiny
import torch

import softmeet
from softmeet import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.choices import parse_choices
from softmeet.evaluation.documents import Document
from softmeet.evaluation.held_out import held_out_books
from softmeet.evaluation.perplexity import evaluate_text
from softmeet.evaluation.positions import observe_text
from softmeet.hf import Recorder, calibrated
from softmeet.rules.gates import PredictedMovement, parse_gate
from softmeet.server.ensembles import load
from softmeet.server.errors import RequestError
from softmeet.server.schemas import Extension
from softmeet.simplex import kl

GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


@pytest.fixture
def default_gate(monkeypatch, tmp_path):
    """As users have it, with a cache of its own."""
    monkeypatch.setenv("SOFTMEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "movement.json"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two tiny members with a tokenizer."""
    folder = tmp_path_factory.mktemp("pair")
    return [str(tiny.save(folder / name, name, seed)) for name, seed in (("gpt2", 0), ("llama", 1))]


@pytest.fixture
def never(monkeypatch):
    """Nothing is calibrated."""

    def refuse(*args):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(calibrated, "calibrate", refuse)


def count(monkeypatch):
    """Every calibration's settings."""
    found, whole = [], calibrated.calibrate
    monkeypatch.setattr(
        calibrated, "calibrate", lambda model, settings: found.append(settings) or whole(model, settings)
    )
    return found


def test_texts_and_what_they_mean():
    assert str(parse_gate("movement:0.01")) == "movement:0.01"
    auto = parse_gate("auto")
    assert str(auto) == "auto"
    assert auto.threshold == 3e-3
    assert parse_gate("movement:0").never_closes
    with pytest.raises(InvalidInputError, match="movement:T"):
        parse_gate("movement:-1")


def test_without_an_ensemble_it_is_refused_with_what_to_do():
    log_p = torch.randn(2, 3, 40).log_softmax(-1)
    heads = [torch.randn(40, 4), torch.randn(40, 4)]
    with pytest.raises(InvalidInputError, match="disagreement:T"):
        softmeet.combine(log_p, heads, gate="auto")
    # At 0, and for a rule that moves nothing, there is nothing to know.
    free, none = softmeet.combine(log_p, heads, gate="movement:0"), softmeet.combine(log_p, heads)
    assert torch.equal(free.log_probs, none.log_probs)


def test_a_closed_row_is_the_pool_and_an_open_one_as_without():
    torch.manual_seed(0)
    log_p = torch.randn(2, 12, 40).log_softmax(-1)
    heads = [torch.randn(40, 4), torch.randn(40, 4)]
    plain = softmeet.combine(log_p, heads)
    free = plain.problem.pool_bound()
    gate = PredictedMovement(0.1 * free.median().item(), factor=0.1)
    found = softmeet.combine(log_p, heads, gate=gate)
    assert found.gated.tolist() == (0.1 * free < gate.threshold).tolist()
    assert 0 < found.gated.sum() < 12
    assert torch.equal(found.log_probs[found.gated], found.pool[found.gated])
    assert torch.equal(found.log_probs[~found.gated], plain.log_probs[~found.gated])
    assert (found.num_passes[found.gated] == 0).all()
    assert (found.stopped_by[found.gated] == softmeet.StoppedBy.GATE).all()
    for k in range(12):
        alone = softmeet.combine(log_p[:, k : k + 1], heads, gate=gate)
        assert bool(alone.gated) == bool(found.gated[k])
    exact = softmeet.combine(log_p, heads, "max-entropy", gate=gate, on_infeasible="meet")
    assert not exact.gated.any()


def test_it_is_calibrated_once_said_once_and_kept(default_gate, pair, monkeypatch, caplog):
    calls = count(monkeypatch)
    ensemble = Ensemble.from_pretrained(pair)
    assert ensemble.model.config.gate == "auto"
    recorder = Recorder()
    with caplog.at_level(logging.WARNING, "softmeet"):
        first = ensemble.generate("a b", **GREEDY, recorder=recorder)
        again = ensemble.generate("a b", **GREEDY)
    assert first == again
    assert len(calls) == 1
    assert [r.message for r in caplog.records if "calibrating the gate auto" in r.message]
    (factor,) = ensemble.model.config.movement.values()
    assert 0 <= factor < 1
    assert list(json.loads(default_gate.read_text()).values()) == [ensemble.model.config.movement]
    # Other members in memory, same ones by their numbers: from the file of this machine.
    other = Ensemble.from_pretrained(pair)
    assert other.generate("a b", **GREEDY) == first
    assert len(calls) == 1
    other.model.config.trust = 0.7
    other.generate("a b", **GREEDY)
    assert [settings.trust for settings in calls] == [(0.3, 0.3), (0.7, 0.7)]


def test_a_checkpoint_has_the_factor_and_an_older_one_no_gate(default_gate, pair, tmp_path, never, monkeypatch):
    monkeypatch.setattr(calibrated, "calibrate", lambda model, settings: 0.02)
    ensemble = Ensemble.from_pretrained(pair)
    ensemble.next_token("a")
    ensemble.save_pretrained(tmp_path / "saved")
    default_gate.unlink()
    monkeypatch.setattr(calibrated, "calibrate", lambda *args: pytest.fail("calibrated again"))
    saved = Ensemble.from_pretrained(tmp_path / "saved")
    assert saved.model.config.gate == "auto"
    assert list(saved.model.config.movement.values()) == [0.02]
    assert saved.generate("a b", **GREEDY) == ensemble.generate("a b", **GREEDY)
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    del config["gate"], config["movement"]
    file.write_text(json.dumps(config))
    assert Ensemble.from_pretrained(tmp_path / "saved").model.config.gate is None


def test_nothing_is_calibrated_where_no_gate_can_close(default_gate, pair, never):
    for options in (
        {"gate": "none"}, {"gate": "movement:0"}, {"rule": "logit-mean"}, {"rule": "max-entropy"}, {"trust": 0.0},
        {"trust": (1.0, float("inf"))}, {"rule": "meet:gate=none"}, {"gate": "disagreement:0.1"},
    ):  # fmt: skip
        ensemble = Ensemble.from_pretrained(pair, **options)
        ensemble.next_token("a b")
        assert ensemble.model.config.movement == {}


def test_where_calibrating_takes_too_long_the_gate_is_off_and_says_so(default_gate, pair, monkeypatch, caplog):
    monkeypatch.setattr(calibrated, "_SECONDS", -1.0)
    ensemble = Ensemble.from_pretrained(pair)
    with caplog.at_level(logging.WARNING, "softmeet"):
        found = ensemble.generate("a b", **GREEDY)
    assert any("the gate auto is off" in r.message for r in caplog.records)
    assert not default_gate.exists()
    assert ensemble.model.config.to_dict()["movement"] == {}
    assert found == Ensemble.from_pretrained(pair, gate="none").generate("a b", **GREEDY)


@pytest.mark.parametrize(("family", "every"), [("narrow", 24), ("wide", 40)])
def test_bundled_families_come_with_their_factors_and_lose_nothing(default_gate, never, family, every):
    """On held-out text: what is given up where the gate is closed, in nats a token of movement."""
    ensemble = Ensemble.from_pretrained(family, trust=0.3)
    model = ensemble.model
    settings = calibrated.resolved(model, model.settings)
    texts = [Document(book.name, book.text[1000:1400]) for book in held_out_books()[:4]]
    hidden = observe_text(ensemble, texts).hidden
    some = [h[::every] for h in hidden]
    _, plain = model.combiner.solve_rows(some, settings.ungated().changed(tol=1e-5))
    closed = ~settings.gate.open(plain.problem)
    moved = kl(plain.log_probs.double(), plain.pool.double())
    assert moved[closed].mean() < 2e-3 if closed.any() else family == "narrow"
    # What is left open moves more.
    assert moved[~closed].mean() > 2 * (moved[closed].mean() if closed.any() else 0.0)
    assert 0.1 < closed.double().mean() < 0.9 or family == "narrow"


def test_a_server_calibrates_when_it_loads_and_never_for_a_request(default_gate, pair, monkeypatch):
    calls = count(monkeypatch)
    (served,) = load({"default": pair})
    assert len(calls) == 1
    usual = served.combination(Extension(), ())
    assert isinstance(usual.gate, PredictedMovement)
    assert usual.gate.factor is not None
    changed = served.combination(Extension(trust=0.4), ("trust",))
    assert changed.gate is None
    assert len(calls) == 1
    with pytest.raises(RequestError):
        served.combination(Extension(trust=0.4), ())


def test_beams_under_it(default_gate, pair, monkeypatch):
    """Closed everywhere it is the pool's beams, and open everywhere those of no gate."""
    monkeypatch.setattr(calibrated, "calibrate", lambda model, settings: 0.02)
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    found = {
        gate: Ensemble.from_pretrained(pair, gate=gate, trust=3.0).generate("a b", **beams)
        for gate in ("movement:1e9", "movement:1e-12", "none")
    }
    pool = Ensemble.from_pretrained(pair, "logit-mean", weights=[1, 1]).generate("a b", **beams)
    assert found["movement:1e9"] == pool
    assert found["movement:1e-12"] == found["none"]
    assert found["none"] != pool


def test_an_evaluation_under_it_is_calibrated_before_anything_is_sent(default_gate, pair, monkeypatch):
    calls = count(monkeypatch)
    ensemble = Ensemble.from_pretrained(pair)
    choices = parse_choices(["meet", "meet:gate=movement:0.001"], 2)
    found = evaluate_text(ensemble, [Document("one", "a b c d e f g a b c d")], choices)
    assert len(calls) == 1
    assert not found.choices["meet"].gated.any()
    assert list(ensemble.model.config.movement.values()) != [None]


def test_what_was_solved_when_time_is_up_has_to_do(default_gate, pair, monkeypatch):
    ensemble = Ensemble.from_pretrained(pair)
    settings = ensemble.model.settings
    whole = calibrated.calibrate(ensemble.model, settings)
    # The beginning, a look before each of two chunks, and one that comes too late.
    clock = iter([0.0, 0.0, 0.0, 1e9])
    # Not that of the module time itself: other threads, such as those of servers, sleep by it.
    monkeypatch.setattr(calibrated, "time", SimpleNamespace(monotonic=lambda: next(clock, 1e9)))
    half = calibrated.calibrate(ensemble.model, settings)
    assert half is not None
    assert half != whole
    assert half == pytest.approx(whole, rel=0.5)
