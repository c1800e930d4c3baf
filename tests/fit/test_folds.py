"""Cross-validation by document: folds, choices made on other folds, and fits and evaluations by folds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from commands import facts_of, ran, run
from texts import documents

from softmeet.errors import InvalidInputError
from softmeet.evaluation.by_folds import evaluate_by_folds
from softmeet.evaluation.candidates import Options
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.fit import fit
from softmeet.evaluation.folds import best_elsewhere, folds_of
from softmeet.evaluation.intervals import clusters
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import observe_text
from softmeet.evaluation.save import figures, save, verdict
from softmeet.members.weighting import Adaptation


@pytest.fixture(scope="module")
def by_folds(ensemble, positions):
    return fit(ensemble, positions, Options(folds=3, meets=False, rules=("meet:trust=0.3",)))


def test_no_document_is_in_two_folds(positions):
    fold = folds_of(clusters(positions.document), 5)
    for document in positions.document.unique():
        assert len(fold[positions.document == document].unique()) == 1
    assert set(fold.tolist()) == set(range(5))
    with pytest.raises(InvalidInputError, match="enough for 13 folds, got 12 documents"):
        folds_of(clusters(positions.document), 13)
    with pytest.raises(InvalidInputError, match="at least 2 folds"):
        folds_of(clusters(positions.document), 1)


def test_a_choice_is_made_on_other_folds():
    generator = torch.Generator().manual_seed(0)
    losses = {name: torch.rand(300, generator=generator, dtype=torch.float64) for name in "abcdefgh"}
    fold = torch.arange(300) % 3
    found = best_elsewhere(losses, fold)
    for k in range(3):
        name = min(losses, key=lambda name: losses[name][fold != k].mean())
        assert torch.equal(found[fold == k], losses[name][fold == k])
    # What is best in hindsight is luck here; the choice by other folds does not profit from it.
    assert min(own.mean() for own in losses.values()) < found.mean()


def test_figures_are_of_fits_without_the_fold(by_folds, ensemble, positions):
    assert [len(some) for some in by_folds.refits] == [6, 6, 6]
    for place, whole in enumerate(by_folds.candidates):
        scores = by_folds.test.choices[whole.label]
        k = place % 3
        here, own = (by_folds.fold == k).nonzero().squeeze(-1), by_folds.refits[k][place]
        again = evaluate(ensemble, positions.take(here), [RuleChoice("own", own.settings)])
        assert torch.allclose(scores.nats[here], again.choices["own"].nats, atol=1e-4)
        if own.average is not None:
            assert all(refits[place].settings != whole.settings for refits in by_folds.refits)
    assert torch.equal(by_folds.test.positions.targets, positions.targets)


def test_a_fit_without_a_fold_does_not_depend_on_it(ensemble, positions):
    """Other targets in one fold leave what is fitted without it as it was, though it begins elsewhere."""
    fold = folds_of(clusters(positions.document), 3)
    other = replace(positions, targets=positions.targets.where(fold != 1, (positions.targets + 7) % 60))
    first, second = (fit(ensemble, text, Options(folds=3, meets=False)) for text in (positions, other))
    for ours, theirs in zip(first.refits[1], second.refits[1], strict=True):
        assert ours.fit_nll == pytest.approx(theirs.fit_nll, abs=2e-6)
        assert ours.settings["weights"] == pytest.approx(theirs.settings["weights"], abs=5e-3)
    assert first.refits[0][2].fit_nll != pytest.approx(second.refits[0][2].fit_nll, abs=1e-4)


def test_the_best_of_the_folds_is_saved(by_folds, folders, tmp_path):
    from softmeet import Ensemble

    facts = save(Ensemble.from_pretrained(folders), by_folds, tmp_path / "saved")
    assert facts["folds"] == 3
    assert facts["candidate"] in (by_folds.rival.name, by_folds.best_baseline.name)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "fits without one of 3 folds" in card
    assert "part for" not in card
    assert verdict(figures(by_folds)) in card
    assert Ensemble.from_pretrained(tmp_path / "saved").model.config.weights == by_folds.chosen.settings["weights"]


def test_a_loss_changes_later_weights_of_its_document_alone():
    generator = torch.Generator().manual_seed(0)
    nats, document = torch.rand(3, 12, generator=generator, dtype=torch.float64), torch.arange(12) // 6
    other = nats.clone()
    other[1, 2] += 5.0
    ours, theirs = (Adaptation(0.9, 0.3).weights([0.2, 0.3, 0.5], own, document) for own in (nats, other))
    same = (ours == theirs).all(0)
    assert same.tolist() == [True] * 3 + [False] * 3 + [True] * 6
    # By the sum as it is defined.
    t, past = 5, torch.tensor([0.9 ** (5 - 1 - s) for s in range(5)], dtype=torch.float64)
    score = torch.tensor([0.2, 0.3, 0.5]).log() - 0.1 * (nats[:, :t] * past).sum(-1) / 0.3
    assert torch.allclose(ours[:, t], score.softmax(0), atol=1e-6)


def test_weights_that_adapt_know_the_past_alone(ensemble, positions):
    options = Options(folds=2, meets=False, adaptive=True, evaluations=5)
    found = fit(ensemble, positions, options)
    later = positions.targets.clone()
    last = (positions.document != positions.document.roll(-1)).nonzero().squeeze(-1)
    later[last] = (later[last] + 5) % 60
    again = fit(ensemble, replace(positions, targets=later), options)
    # The last token of a document is in no weight: what differs are the fits, a little.
    before = torch.ones(len(later), dtype=torch.bool).index_fill(0, last, False)
    for name in ("logit-mean", "prob-mean", "power-mean"):
        ours, theirs = (one.test.choices[f"fitted adaptive {name}"].nats[before] for one in (found, again))
        assert (ours - theirs).abs().max() < 0.2
    # At a document's start the weights are the fitted ones.
    first = (positions.document != positions.document.roll(1)).nonzero().squeeze(-1)
    fixed, adaptive = (found.test.choices[f"fitted {kind}prob-mean"].nats for kind in ("", "adaptive "))
    assert torch.allclose(fixed[first], adaptive[first], atol=1e-5)
    assert not torch.allclose(fixed, adaptive, atol=1e-3)


def test_adaptive_weights_find_the_member_that_knows_a_document(ensemble, positions):
    """One member writes every other document, so that fixed weights are never right."""
    generator, log_p = torch.Generator().manual_seed(0), ensemble.model.combiner.own_log_probs(positions.hidden)[0]
    drawn = torch.stack([torch.multinomial(own.exp(), 1, generator=generator).squeeze(-1) for own in log_p])
    written = drawn.gather(0, (positions.document % 2)[None]).squeeze(0)
    options = Options(folds=3, meets=False, adaptive=True)
    found = fit(ensemble, replace(positions, targets=written), options).test.choices
    assert found["fitted adaptive prob-mean"].mean < found["fitted prob-mean"].mean - 0.02


@pytest.mark.parametrize("over_bytes", [False, True], ids=["tokens", "bytes"])
def test_an_evaluation_by_folds_scores_what_one_without_scores(folders, over_bytes):
    from softmeet import Ensemble

    own = Ensemble.from_pretrained(["mixed/gpt2", "mixed/llama"] if over_bytes else folders, "logit-mean")
    assert own.model.over_bytes == over_bytes
    found = observe_text(own, documents()[:2], max_per_document=20)
    choices = [
        RuleChoice("prob-mean", {"rule": "prob-mean"}),
        RuleChoice("power", {"rule": "power-mean:order=0.5"}),
        RuleChoice("own", {"rule": "logit-mean", "weights": [0.7, 0.3], "rule_temperature": 1.2}),
        RuleChoice("cut", {"rule": "logit-mean:plausibility=0.2"}),
        RuleChoice("gated", {"rule": "prob-mean", "gate": "unsure:0.03"}),
        RuleChoice("by prompt", {"rule": "prob-mean"}, prompt=5),
    ]
    ours, theirs = evaluate_by_folds(own, found, choices, 2), evaluate(own, found, choices)
    assert list(ours.choices)[: len(choices)] == list(theirs.choices)
    assert ours.members.keys() == theirs.members.keys()
    for name, scores in (theirs.members | theirs.choices).items():
        again = (ours.members | ours.choices)[name]
        assert torch.allclose(again.nats, scores.nats, atol=1e-5), name
        assert torch.equal(again.work, scores.work)
        assert torch.equal(again.gated, scores.gated) or not scores.gated.any()
    assert ours.choices["gated"].gated.any()
    assert all(len(scores.work) for scores in ours.members.values()) == over_bytes


def test_evaluate_sets_fitted_averages_beside_uniform_ones(folders, texts):
    facts = facts_of("evaluate", *tiny.each("-m", folders), "-t", texts, "--rule", "logit-mean", "--folds", 2)
    averages = ["logit-mean", "prob-mean", "power-mean"]
    names = [f"fitted {name}" for name in (*map(str, folders), *averages)]
    assert [name for name in facts["rules"] if name.startswith("fitted")] == names
    assert facts["best_baseline"].startswith("fitted ")
    assert facts["rules"]["fitted prob-mean"]["nll"] < facts["rules"]["prob-mean"]["nll"]
    # Averages that were scored without a solver have no gate either: no column says so.
    assert not any(rule["gated"] for rule in facts["rules"].values())


def test_fit_by_folds(folders, texts, tmp_path):
    given = ["fit", *tiny.each("-m", folders), "-t", texts, "--json", tmp_path / "fit.json", "--out", tmp_path / "out"]
    given += ["--evaluations", 1, "--meet-tokens", 10, "--premise-tokens", 10, "--judge-tokens", 60, "--folds"]
    done = ran(*given, 2)
    facts = json.loads((tmp_path / "fit.json").read_text())
    assert facts["folds"] == 2
    assert "each judged by a fit without its fold" in done.stdout
    assert {"meet", "power-mean"} <= facts["candidates"].keys()
    assert facts["splits"]["test"]["tokens"] == 60
    assert "enough for 30 folds" in run(*given, 30, "--force").stderr
