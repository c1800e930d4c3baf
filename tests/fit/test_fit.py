"""``softmeet fit``: its gradients, its choice, and its promise never to be worse than a fitted average."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from cards import checked
from commands import ran, refusal
from texts import LETTERS, documents
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from softmeet import Ensemble, extras
from softmeet.cli.main import app
from softmeet.errors import InvalidInputError, TraceError
from softmeet.evaluation import fit as fitting
from softmeet.evaluation import positions as positions_module
from softmeet.evaluation import save as saving
from softmeet.evaluation.average import Family
from softmeet.evaluation.candidates import Options
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.fit import fit
from softmeet.evaluation.intervals import PARTS, split
from softmeet.evaluation.layout import Layout, Values
from softmeet.evaluation.objective import Objective
from softmeet.evaluation.positions import observe_text
from softmeet.evaluation.save import figures, save, verdict
from softmeet.evaluation.scoring import Text
from softmeet.evaluation.trace import record
from softmeet.scaling.local import LocalEngine


def mean_loss(objective, theta):
    """The objective's loss and gradient, a position."""
    total, gradient = objective.sums(theta)
    return total / len(objective.positions), gradient / len(objective.positions)


@pytest.fixture(scope="module")
def fitted(ensemble, positions):
    return fit(ensemble, positions, Options(meet_positions=40, premise_positions=40, evaluations=4))


@pytest.mark.parametrize(("pool", "free"), [("logit-mean", True), ("prob-mean", False)])
def test_the_gradient_is_that_of_the_loss(ensemble, positions, pool, free):
    layout = Layout(2, 2, free)
    few = positions.take(slice(6))
    few = replace(few, hidden=[h.double() for h in few.hidden])
    objective = Objective(ensemble.model, few, layout, pool, tol=1e-12)
    theta = layout.pack(Values((0.3, 0.6), 1.2, (0.4, 1.5)))
    _, gradient = mean_loss(objective, theta)
    for k in range(len(theta)):
        step = torch.zeros_like(theta)
        step[k] = 1e-4
        slope = (mean_loss(objective, theta + step)[0] - mean_loss(objective, theta - step)[0]) / 2e-4
        assert gradient[k].item() == pytest.approx(slope, abs=1e-6)


def test_a_member_without_trust_is_one_of_next_to_none(ensemble, positions):
    few, tol = positions.take(slice(6)), 1e-12
    both = Objective(ensemble.model, few, Layout(2, 2), "logit-mean", tol=tol)
    one = Objective(ensemble.model, few, Layout(2, 1), "logit-mean", trusted=[1], tol=tol)
    weights, trust = (0.3, 0.7), (0.4,)
    alone = mean_loss(one, one.layout.pack(Values(weights, 1.2, trust)))
    theta = both.layout.pack(Values(weights, 1.2, (0.0, *trust)))
    theta[3] = -25.0  # below the bounds of a fit
    beside = mean_loss(both, theta)
    assert alone[0] == pytest.approx(beside[0], abs=1e-8)
    assert torch.allclose(alone[1], torch.cat([beside[1][:3], beside[1][4:]]), atol=1e-7)


def test_parts_share_no_document(positions):
    parts = split(positions)
    seen = [set(parts[name].positions.document.tolist()) for name in PARTS]
    assert [len(own) for own in seen] == [4, 4, 4]
    assert len(set.union(*seen)) == 12
    assert sum(len(part.positions) for part in parts.values()) == len(positions)
    with pytest.raises(InvalidInputError, match="enough for 9 clusters"):
        split(positions.take(slice(5)))


def test_fitting_lowers_the_loss_and_every_candidate_is_kept(fitted, ensemble, positions):
    names = [candidate.name for candidate in fitted.candidates]
    assert names == [*ensemble.names, "logit-mean", "prob-mean", "power-mean", "meet", "meet from prob-mean"]
    by_name = {candidate.name: candidate for candidate in fitted.candidates}
    part = split(positions)["fit"].positions
    text = Text(ensemble.model, part, LocalEngine())
    for order, pool in enumerate(("logit-mean", "prob-mean")):
        family = Family(Layout(2), order)
        start = text.sums(family, family.layout.pack(Values((0.5, 0.5)))).loss
        assert by_name[pool].fit_nll < start - 0.01
        assert sum(by_name[pool].settings["weights"]) == pytest.approx(1)
    # The family between the two holds both.
    assert by_name["power-mean"].fit_nll <= min(by_name[p].fit_nll for p in ("logit-mean", "prob-mean")) + 1e-4


def test_the_choice_is_the_saved_rule_and_its_figures_are_evaluations(fitted, ensemble, folders, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    there = tmp_path / "link" / "fitted"
    facts = save(Ensemble.from_pretrained(folders), fitted, there)
    assert json.loads((there / "fit.json").read_text()) == facts
    said = (there / "README.md").read_text()
    assert verdict(facts) in said
    assert str(tmp_path) not in said
    assert str(folders[0]) not in said
    (index,) = checked(there / "README.md")["model-index"]
    assert index["name"] == "fitted"
    assert index["results"][0]["metrics"] == [{"type": "loss", "name": "nats per token", "value": facts["test"]["nll"]}]
    again = Ensemble.from_pretrained(there)
    for key in ("rule", "weights", "trust", "rule_temperature"):
        assert getattr(again.model.config, key) == pytest.approx(fitted.chosen.settings[key])
    test = fitted.test.positions
    _, solution = again.model.combiner.solve_rows(test.hidden, again.model.settings.ungated())
    nll = -solution.log_probs.gather(-1, test.targets[:, None]).mean().item()
    assert facts["test"]["nll"] == pytest.approx(nll, abs=1e-4)
    import softmeet  # noqa: F401

    loaded = AutoModelForCausalLM.from_pretrained(there)
    ids = again.tokenizer("hello", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(input_ids=ids).logits, again.model(input_ids=ids).logits)


def test_the_ensembles_own_settings_do_not_matter(fitted, folders, positions):
    other = Ensemble.from_pretrained(folders)
    own = {"max_steps": 1, "tol": 0.1, "free_weights": True, "trust": [0.5, 0.1]}
    for name, value in own.items():
        setattr(other.model.config, name, value)
    found = fit(other, positions, Options(meet_positions=40, premise_positions=40, evaluations=4))
    assert figures(found) == figures(fitted)


@pytest.mark.parametrize(("high", "kept"), [(-0.01, True), (0.01, False)])
def test_an_interval_that_holds_zero_means_the_baseline(ensemble, fitted, positions, monkeypatch, high, kept):
    """The rule wins on the second part here, and the third part's interval decides."""
    parts = split(positions)
    monkeypatch.setattr(fitting, "paired", lambda *args: fitting.Difference(-0.05, -0.1, high))
    low = {c.label: c for c in fitted.candidates}["fitted meet"]

    def scored(ensemble, positions, choices, **options):
        found = fitted.select if len(positions) == len(parts["select"].positions) else fitted.test
        for scores in found.choices.values():
            scores.nats = torch.ones_like(scores.nats)
        found.choices["fitted meet"].nats = torch.zeros_like(found.choices["fitted meet"].nats)
        return found

    monkeypatch.setattr(fitting, "evaluate_positions", scored)
    monkeypatch.setattr(fitting.Fitter, "candidates", lambda self, part, text: (fitted.candidates, fitted.premise))
    judged = fit(ensemble, positions)
    assert judged.rival is low
    assert (judged.chosen is low) == kept
    assert judged.chosen.baseline == (not kept)
    facts = figures(judged)
    assert facts["fell_back"] == (not kept)
    assert ("Falls back" in verdict(facts)) == (not kept)
    assert facts["rival"]["delta"] == -0.05
    assert facts["test"]["delta"] == (-1.0 if kept else 0.0)


def test_a_member_that_knows_nothing_gets_next_to_no_weight_and_trust(tmp_path):
    """A bundled member beside a copy whose head is shuffled."""
    from fit import changed, held_out_documents, shuffled

    ensemble = Ensemble.from_pretrained(["narrow/opt-c", changed("narrow/opt-a", tmp_path / "bad", shuffled)])
    positions = observe_text(ensemble, held_out_documents()[::3], max_per_document=60)
    found = fit(ensemble, positions, Options(meet_positions=20, premise_positions=20, evaluations=6))
    for candidate in found.candidates[2:]:
        # A few hundred tokens leave a logit mean some per cent of noise (0.036 here); what is saved has none.
        assert candidate.settings["weights"][1] < 0.06
        if candidate.settings["rule"] == "meet":
            assert candidate.settings["trust"][1] < 0.01
    assert found.chosen.settings["weights"][1] < 0.03
    alone = found.test.choices["fitted narrow/opt-c"].mean
    assert found.test.choices[found.chosen.label].mean < alone + 0.01


def test_one_member_is_a_temperature(folders):
    ensemble = Ensemble.from_pretrained(folders[:1])
    found = fit(ensemble, observe_text(ensemble, documents()), Options(evaluations=4))
    assert [candidate.name for candidate in found.candidates] == ensemble.names
    assert found.chosen.settings["rule_temperature"] != 1.0


@pytest.mark.parametrize("folds", [[], ["--folds", 2]])
def test_what_files_add_is_told_of_what_is_judged_each_read_without_itself(folders, tmp_path, folds):
    project = tmp_path / "project"
    project.mkdir()
    for document in documents():
        (project / f"{document.name}.txt").write_text(document.text)
        (project / f"{document.name} again.md").write_text(f"{document.text[5:25]} {document.text[20:30]}")
    done = ran(
        "fit", *tiny.each("-m", folders), "-m", f"files:{project}", "-t", project / "*.txt", "--out", tmp_path / "out",
        "--json", tmp_path / "fit.json", "--evaluations", 2, "--meet-tokens", 20, "--premise-tokens", 10, *folds,
    )  # fmt: skip
    assert "With the files beside it" in " ".join(done.stdout.split())
    facts, saved = (json.loads((tmp_path / name).read_text()) for name in ("fit.json", "out/config.json"))
    assert saved["files"] == [f"files:{project}"]
    found, part = facts["files"], facts["splits"]["test"]
    bytes_read = facts["test"]["nll"] * part["tokens"] / math.log(2) / found["alone"]
    for path in project.glob("*.txt"):
        path.unlink()
    ensemble = Ensemble.from_pretrained(tmp_path / "out")
    texts = [document.text for document in documents() if f"{project}/{document.name}.txt" in part["documents"]]
    nats = -sum(report.log_prob for text in texts for report in ensemble.inspect(text))
    # By folds what is saved was fitted on what is judged, and differs a little.
    assert found["beside"] == pytest.approx(nats / math.log(2) / bytes_read, rel=0.05 if folds else 1e-4)
    assert found["gain"] == pytest.approx(found["alone"] - found["beside"])
    assert found["interval"][0] > 0


def test_the_command(folders, texts, tmp_path):
    done = ran(
        "fit", *tiny.each("-m", folders), "-t", texts, "--out", tmp_path / "out", "--json", tmp_path / "fit.json",
        "--evaluations", 2, "--meet-tokens", 20, "--batch", 8, "--premise-tokens", 10,
        "--select-tokens", 20, "--judge-tokens", 30,
    )  # fmt: skip
    facts = json.loads((tmp_path / "fit.json").read_text())
    assert [facts["splits"][part]["tokens"] for part in ("select", "test")] == [20, 30]
    meets = {name: row["evaluations"] for name, row in facts["candidates"].items() if row["rule"] == "meet"}
    assert list(meets.values()) == [2]
    assert facts["chosen"].split(":")[0] in ("meet", "logit-mean", "prob-mean", "power-mean")
    assert set(facts["test"]) == {"nll", "best_baseline", "delta", "ci95"}
    assert len(facts["weights"]) == len(facts["trust"]) == 2
    assert verdict(facts).split(":")[0].split()[0] in done.stdout
    assert Ensemble.from_pretrained(tmp_path / "out").generate("the", max_new_tokens=2)
    assert "expected text enough for 9 clusters" in refusal(
        "fit", *tiny.each("-m", folders), "--text", texts, "--max-tokens", 5, "--out", tmp_path / "other"
    )
    assert not (tmp_path / "other").exists()


def test_minibatches_go_down_the_same_loss_and_are_kept(ensemble, positions, fitted, tmp_path, monkeypatch):
    sizes = {"meet_positions": 40, "premise_positions": 40, "select_positions": 100, "judge_positions": 100}
    options = Options(**sizes, evaluations=12, batch=16)
    found = fit(ensemble, positions, options, cache=PieceCache(tmp_path / "kept", {}))
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "sums", lambda *given: pytest.fail("a loss was evaluated again"))
        assert figures(fit(ensemble, positions, options, cache=PieceCache(tmp_path / "kept", {}))) == figures(found)
    assert len(found.parts["fit"].positions) == len(fitted.parts["fit"].positions)
    assert len(found.parts["select"].positions) == len(found.parts["test"].positions) == 100
    subset = split(positions)["fit"].spread(40).positions
    [ours] = [candidate for candidate in found.candidates if not candidate.baseline]
    pool = ours.settings["pool"]
    objective = Objective(ensemble.model, subset, Layout(2, 2), pool)

    def loss(settings):
        values = Values(tuple(settings["weights"]), settings["rule_temperature"], tuple(settings["trust"]))
        return mean_loss(objective, objective.layout.pack(values))[0]

    whole, parts, start = (
        {c.name: c.settings for c in one.candidates}[name]
        for one, name in ((fitted, ours.name), (found, ours.name), (found, pool))
    )
    start = {**start, "trust": [0.05, 0.05]}
    assert loss(parts) < loss(start)
    assert loss(parts) < loss(whole) + 0.01


@pytest.mark.parametrize(
    ("command", "missing"),
    [(["fit", "--out", "there"], "psutil and scipy"), (["evaluate"], "psutil and scipy"),
     (["evaluate", "--losses", "there.parquet"], "pyarrow"), (["evaluate", "--plots", "there"], "matplotlib")],
)  # fmt: skip
def test_a_missing_package_is_named_at_once(command, missing, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda package: None if package in missing else package)
    with pytest.raises(InvalidInputError, match=rf"needs {missing}: .*\[eval\]'"):
        CliRunner().invoke(app, [*command, "-m", "/absent", "-t", "/absent"], catch_exceptions=False)


@pytest.mark.parametrize("command", [["fit", "--out", "out"], ["evaluate"]])
def test_pieces_of_a_damaged_trace_are_not_those_of_the_whole(command, ensemble, tmp_path, monkeypatch):
    def stop(self, name, found):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PieceCache, "_write", stop)
    made = record(ensemble, documents(), "t")
    whole, again = made.document(1).read_bytes(), [*command, "--trace", "t", "--resume", "kept"]
    made.document(1).write_bytes(whole[: len(whole) // 2])
    assert CliRunner().invoke(app, again).exit_code == 130
    made.document(1).write_bytes(whole)
    with pytest.raises(InvalidInputError, match=r"documents left out: \[1\] there, None here\): choose another folder"):
        CliRunner().invoke(app, again, catch_exceptions=False)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "--json", "none/x.json"], r"in a folder that is there, got none/x.json: make none first"),
        (["fit", "--out", "o", "--json", "none/x.json"], "make none first"),
        (["fit", "--out", "taken"], "expected a folder, got taken, but taken is a file"),
        (["evaluate", "--plots", "taken/plots"], "expected a folder, got taken/plots, but .*taken is a file"),
        (["trace", "taken"], "but taken is a file"),
        (["trace", "/proc/x"], r"cannot write in /proc \("),
        (["fit", "--out", "/proc/x"], r"cannot write in /proc \("),
        (["evaluate", "--json", "/proc/x.json"], r"cannot write in /proc \("),
        (["evaluate", "--trace", "t"], "expected --trace or --text, got both: t holds a text of its own"),
        (["fit", "--out", "o", "--trace", "t"], "expected --trace or --text, got both"),
    ],
)
def test_what_cannot_work_is_refused_at_once(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(InvalidInputError, match=message):
        CliRunner().invoke(app, [*command, "-m", "/absent", "-t", "/absent"], catch_exceptions=False)


def test_a_members_own_folder_is_not_overwritten(ensemble, fitted, folders, tmp_path):
    before = (folders[0] / "config.json").read_bytes()
    result = CliRunner().invoke(app, ["fit", "--out", str(folders[0]), "-m", str(folders[0]), "-t", "/absent"])
    assert isinstance(result.exception, InvalidInputError)
    assert "holds other files, some of which would be overwritten" in str(result.exception)
    with pytest.raises(InvalidInputError, match="name another folder"):
        save(ensemble, fitted, folders[0])
    assert (folders[0] / "config.json").read_bytes() == before


@pytest.mark.parametrize("command", [["evaluate", "-t", "x"], ["fit", "--out", "o", "-t", "x"], ["generate", "a"]])
def test_ctrl_c_while_members_load_says_so(command, folders, tmp_path, monkeypatch):
    def stop(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text(LETTERS)
    monkeypatch.setattr(Ensemble, "from_pretrained", stop)
    result = CliRunner().invoke(app, [*command, "-m", str(folders[0])])
    assert result.exit_code == 130
    assert "stopped: members were being loaded" in result.output


def test_a_full_disk_leaves_the_older_ensemble_whole(ensemble, positions, fitted, tmp_path, monkeypatch):
    save(ensemble, fitted, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*args, **settings):
        raise Exception("No space left on device (os error 28)")  # as tokenizers do

    monkeypatch.setattr(type(ensemble.tokenizer), "save_pretrained", full)
    with pytest.raises(TraceError, match="no room on the disk"):
        save(ensemble, fitted, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(TraceError, match="no room on the disk"):
        save(ensemble, fitted, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_figures_are_written_though_the_ensemble_has_no_room(folders, texts, tmp_path, monkeypatch):
    def full(*args, **settings):
        raise TraceError("no room on the disk")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saving, "save", full)
    command = ["fit", *tiny.each("-m", folders), "-t", str(texts), "--out", "out", "--json", "x.json"]
    command += ["--evaluations", "1", "--meet-tokens", "20", "--premise-tokens", "20", "--resume", "kept"]
    assert isinstance(CliRunner().invoke(app, command).exception, TraceError)
    assert json.loads((tmp_path / "x.json").read_text())["chosen"]
    # The members' runs are kept, too.
    monkeypatch.setattr(positions_module, "observe", None)
    assert isinstance(CliRunner().invoke(app, [*command, "--force"]).exception, TraceError)


def test_one_position_to_judge_by_shows_nothing(ensemble, positions):
    few = Options(meet_positions=20, premise_positions=20, evaluations=1, judge_positions=1)
    found = fit(ensemble, positions, few)
    assert found.chosen.baseline
    if found.rival is not found.best_baseline:
        assert (found.difference.low, found.difference.high) == (-float("inf"), float("inf"))


def test_free_weights_are_a_logit_means_only(ensemble, positions):
    free = Options(free_weights=True, meet_positions=20, premise_positions=20, evaluations=2)
    rows = figures(fit(ensemble, positions, free))["candidates"]
    assert sum(rows["logit-mean"]["weights"]) != pytest.approx(1.0)
    for name in ("prob-mean", "meet from prob-mean"):
        assert sum(rows[name]["weights"]) == pytest.approx(1.0)
