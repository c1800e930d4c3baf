"""The study: cells are found again after a stop, tables say what the cells hold, and the theorems hold in them."""

import doctest
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

from cells import Run
from softmeet.cli.main import app
from softmeet.errors import InvalidInputError
from softmeet.evaluation.documents import Document
from softmeet.evaluation.premise import best_hidden
from softmeet.heads import SoftmaxHead
from softmeet.scaling.local import LocalEngine
from softmeet.simplex import kl
from studies import report as reports
from studies import text as on_text
from studies.known_truth import KnownTruthStudy, SyntheticStudy, never_worse
from studies.report import mean_text
from study import study

pytestmark = pytest.mark.slow

TINY = SyntheticStudy(v=32, rows=1, trials=1, ratios=("1/4", "1"), noises=(0.0, 0.1))


@pytest.mark.parametrize("bias", [False, True])
def test_best_hidden_has_the_moments_of_the_truth(bias):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    head = SoftmaxHead(weight, bias=torch.randn(40, generator=generator).double() if bias else None, scale=0.5)
    truth = torch.randn(3, 40, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_p = head.log_probs(best_hidden(head, truth))
    assert ((log_p.exp() - truth.exp()) @ weight).abs().max() < 1e-13
    near = head.log_probs(best_hidden(head, truth) + 0.01 * torch.randn(3, 6, generator=generator, dtype=torch.float64))
    assert (kl(truth, log_p) < kl(truth, near)).all()


def test_best_hidden_of_a_wide_head_is_the_truth():
    generator = torch.Generator().manual_seed(4)
    head = SoftmaxHead(torch.randn(20, 24, generator=generator, dtype=torch.float64))
    truth = torch.randn(2, 20, generator=generator, dtype=torch.float64).log_softmax(-1)
    assert (head.log_probs(best_hidden(head, truth)) - truth).abs().max() < 1e-9


def _cells(ran):
    return {key: lambda key=key: ran.append(key) or {"key": key} for key in "abc"}


def test_a_run_goes_on_where_it_stopped_and_drops_a_torn_line(tmp_path):
    ran = []
    first = Run(tmp_path, {"size": 1})
    assert first.each(dict(list(_cells(ran).items())[:2])).keys() == {"a", "b"}
    with (tmp_path / "cells.jsonl").open("a") as out:
        out.write('{"key": "c", "resu')
    again = Run(tmp_path, {"size": 1})
    assert list(again.each(_cells(ran), LocalEngine(2))) == ["a", "b", "c"]
    assert sorted(ran) == ["a", "b", "c"]
    assert [json.loads(line)["key"] for line in (tmp_path / "cells.jsonl").read_text().splitlines()] == ["a", "b", "c"]


def test_a_failing_cell_loses_no_other(tmp_path):
    def fail():
        raise RuntimeError("no")

    cells = {**_cells([]), "d": fail}
    with pytest.raises(RuntimeError, match="no"):
        Run(tmp_path, {}).each(cells)
    assert Run(tmp_path, {}).done.keys() == {"a", "b", "c"}


def test_a_folder_of_other_settings_is_refused(tmp_path):
    Run(tmp_path, {"size": 1})
    with pytest.raises(InvalidInputError, match="size: 1 there, 2 here"):
        Run(tmp_path, {"size": 2})


def test_infinite_losses_are_said():
    assert mean_text([0.5, None]) == "∞ (50 %)"
    assert mean_text([0.5, 0.25]) == "0.3750"


def test_examples_in_docstrings_give_what_they_say():
    assert doctest.testmod(reports) == (0, 5)


def test_a_broken_theorem_would_be_seen():
    cell = {"rules": {"ours": {"kl": [0.1, 0.3]}, "theirs": {"kl": [0.2, 0.2]}, "lost": {"kl": [None, 0.0]}}}
    assert "**fails** in 1 of 2 rows" in never_worse([cell], "ours", "theirs", 1e-6)
    assert "**fails** in 1 of 2 rows" in never_worse([cell], "lost", "theirs", 1e-6)
    assert "holds in 2 rows" in never_worse([cell], "theirs", "theirs", 1e-6)


@pytest.fixture(scope="module")
def synthetic_results(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("synthetic"), {})
    return run.each(dict(TINY.cells()))


def test_max_entropy_is_never_worse_than_averaging_where_the_premise_holds(synthetic_results):
    exact = [cell for cell in synthetic_results.values() if cell["noise"] == 0]
    for cell in exact:
        rules = cell["rules"]
        assert rules["max-entropy"]["infeasible"] == 0
        for ours, theirs in zip(rules["max-entropy"]["kl"], rules["logit-mean"]["kl"], strict=True):
            assert ours <= theirs + TINY.tol
        if cell["ratio"] == "1":
            assert max(rules["max-entropy"]["kl"]) < 1e-6


def test_the_linear_program_chooses_nothing(synthetic_results):
    exact = [cell for cell in synthetic_results.values() if cell["noise"] == 0 and cell["ratio"] == "1/4"]
    for cell in exact:
        program = cell["rules"]["min-cross-entropy"]
        assert program["degenerate"] == TINY.rows
        assert max(program["range"]) < 1e-9


def test_cells_do_not_depend_on_which_others_run(synthetic_results):
    key, work = list(TINY.cells())[-1]
    again = work()
    assert again["rules"]["meet 1"]["kl"] == synthetic_results[key]["rules"]["meet 1"]["kl"]


def test_the_report_holds_every_rule_and_the_plots(synthetic_results, tmp_path):
    report = TINY.report(synthetic_results, "study.py synthetic")
    text = report.write(tmp_path).read_text()
    assert "`max-entropy` is never worse than `logit-mean`: holds in 4 rows" in text
    assert "min-reverse-cross-entropy" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"width.png", "noise.png"}
    assert json.loads(json.dumps(report.json()))["tables"]


def test_known_truths_under_trained_heads(tmp_path):
    members, truth = ("narrow/opt-a", "narrow/opt-b"), ("wide/gpt2", "wide/neox")
    tier = KnownTruthStudy(members, truth, positions=2, rows=2, documents=1, sizes=(2,))
    text = "And it came to pass, when men began to multiply on the face of the earth, that there were giants. " * 4
    ((key, work),) = tier.cells([Document("text", text)], tier.load())
    result = work()
    found = result["rules"]
    assert found["max-entropy"]["infeasible"] == 0
    for ours, theirs in zip(found["max-entropy"]["kl"], found["logit-mean"]["kl"], strict=True):
        assert ours <= theirs + tier.tol
        assert math.isfinite(ours)
    report = tier.report({key: result}, "study.py known-truth")
    assert "![Trained heads: the premise holds](members.png)" in report.write(tmp_path).read_text()
    assert (tmp_path / "members.png").stat().st_size
    (plot,) = report.plots
    assert plot.lines["max-entropy"] == [(2, pytest.approx(sum(found["max-entropy"]["kl"]) / 2))]


@pytest.mark.parametrize(
    ("given", "came"),
    [([], "none of these"), (["-m", "narrow"], "--member"), (["--text", "t"], "--text"),
     (["-m", "narrow", "--text", "t", "--trace", "r"], "--member, --text, --trace")],
)  # fmt: skip
def test_members_of_ones_own_need_a_text_or_a_trace(given, came, tmp_path):
    result = CliRunner().invoke(study, ["pretrained", str(tmp_path / "out"), *given])
    assert isinstance(result.exception, InvalidInputError)
    assert str(result.exception).endswith(f"got {came}")
    assert not (tmp_path / "out").exists()


def test_the_command_on_text_writes_a_report_and_goes_on(tmp_path, monkeypatch):
    small = {"positions": 4, "meet": 2, "exact": 2, "slow": 2, "rows": 3, "tokens": 1, "premise": 2}
    monkeypatch.setattr(on_text, "SMOKE", replace(on_text.SMOKE, **small))
    text = tmp_path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth. And the earth was without form. " * 6)
    out = tmp_path / "study"
    arguments = ["real", str(out), "--family", "narrow", "--text", str(text), "--smoke"]
    assert CliRunner().invoke(study, arguments).exit_code == 0
    before = (out / "cells.jsonl").read_text()
    report = (out / "report.md").read_text()
    for rule in ("logit-mean", "meet 0.3", "max-entropy", "least-squares", "one-hot", "narrow/opt-a"):
        assert rule in report
    assert "- `min-cross-entropy`: INFEASIBLE at all 2 tokens: no distribution has every member's moments" in report
    assert "- `min-cross-entropy`: answered by meet at all 2 tokens" in report
    assert CliRunner().invoke(study, arguments).exit_code == 0
    assert (out / "cells.jsonl").read_text() == before


def test_a_study_of_a_trace_is_pinned_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "gpt2", "gpt2", seed=0)
    runner = CliRunner()
    for k, text in enumerate(("the quick brown fox jumps over it", "and then it rains a lot in spain.")):
        Path("text").write_text(text)
        assert runner.invoke(app, ["trace", f"t{k}", "-m", "gpt2", "-t", "text"], catch_exceptions=False).exit_code == 0
    arguments = ["pretrained", str(tmp_path / "out"), "--positions", "20", "--meet", "0", "--exact", "0"]
    arguments += ["--slow", "0", "--tokens", "0", "--premise", "0", "--trace"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # members that were named by relative paths are found from anywhere
    assert runner.invoke(study, [*arguments, str(tmp_path / "t0")], catch_exceptions=False).exit_code == 0
    with pytest.raises(InvalidInputError, match=r"other settings \(source: .* there"):
        runner.invoke(study, [*arguments, str(tmp_path / "t1")], catch_exceptions=False)
