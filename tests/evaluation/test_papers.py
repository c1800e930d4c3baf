"""What ``softmeet evaluate`` writes for papers: baselines, pairs, losses, tables, and how a run can be made again."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
import tiny
import torch
from commands import run
from pyarrow import parquet
from scipy import stats

from softmeet.evaluation.intervals import Clusters, paired
from softmeet.evaluation.pairs import holm

TEXTS = [
    "the quick brown fox",
    "jumps over the lazy dog",
    "a dog and a fox",
    "over the brown hills",
    "foxes jump and run",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return [tiny.save(folder / name, name, seed=k) for k, name in enumerate(("gpt2", "llama"))]


@pytest.fixture(scope="module")
def told(folders, tmp_path_factory):
    """(the figures of a run with everything, its losses by document and by token, what it printed)."""
    folder = tmp_path_factory.mktemp("told")
    for k in range(12):
        (folder / f"{k:02}.txt").write_text(f"{TEXTS[k % 5]} {TEXTS[(k * 3 + 1) % 5]} {k}")
    asked = ["evaluate", *tiny.each("-m", folders), "--text", folder / "*.txt", "--rule", "prob-mean", "--folds", 2]
    asked.append("--pairs")
    done = run(*asked, "--json", folder / "out.json", "--losses", folder / "documents.parquet")
    assert done.returncode == 0, done.stderr
    again = run(*asked, "--losses", folder / "tokens.parquet", "--tokens", "--table", "csv", "--adaptive")
    assert again.returncode == 0, again.stderr
    losses = [parquet.read_table(folder / f"{name}.parquet") for name in ("documents", "tokens")]
    return json.loads((folder / "out.json").read_text()), *losses, done.stdout, again.stdout


def test_the_baseline_is_the_best_single_member_at_its_own_temperature(told, folders):
    facts, _, _, shown, _ = told
    rows = {**facts["members"], **facts["rules"]}
    single = [*map(str, folders), *(f"fitted {folder}" for folder in folders)]
    assert facts["baseline"] == min(single, key=lambda name: rows[name]["nll"])
    for row in rows.values():
        assert row["against"]["baseline"] == facts["baseline"]
        assert row["against"]["delta"] == pytest.approx(row["nll"] - rows[facts["baseline"]]["nll"])
    label = "fitted " * facts["baseline"].startswith("fitted ") + "/".join(facts["baseline"].split("/")[-2:])
    assert f"The baseline is {label}." in shown
    assert not any("adaptive" in name for name in rows)


def test_what_was_fitted_is_told(told, folders):
    facts, _, _, shown, written = told
    own = {name: row["fitted"] for name, row in facts["rules"].items() if "fitted" in row}
    assert set(own) == {f"fitted {name}" for name in (*map(str, folders), "logit-mean", "prob-mean", "power-mean")}
    for name, values in own.items():
        assert sum(values["weights"]) == pytest.approx(1)
        assert f"{values['rule_temperature']:.2f}" in shown
        assert ("order" in values) == (name == "fitted power-mean")
    table = {row["name"]: row for row in csv.DictReader(io.StringIO(written))}
    label = "/".join(folders[0].parts[-2:])
    assert {label, f"fitted {label}", "fitted adaptive prob-mean"} <= table.keys()
    assert float(table["fitted prob-mean"]["temperature"]) == own["fitted prob-mean"]["rule_temperature"]
    assert float(table["fitted power-mean"]["order"]) == own["fitted power-mean"]["order"]
    assert float(table[label]["nats"]) == pytest.approx(facts["members"][str(folders[0])]["nll"])


def test_losses_are_those_of_the_figures(told):
    facts, documents, tokens, _, _ = told
    assert (documents.num_rows, tokens.num_rows) == (facts["documents"], facts["tokens"])
    assert sum(documents["tokens"].to_pylist()) == facts["tokens"]
    assert sum(documents["bytes"].to_pylist()) == sum(tokens["bytes"].to_pylist()) == facts["bytes"]
    for name, row in {**facts["members"], **facts["rules"]}.items():
        for table in (documents, tokens):
            assert sum(table[name].to_pylist()) / facts["tokens"] == pytest.approx(row["nll"])
    own = tokens.to_pylist()
    assert [one["place"] for one in own if one["document"] == own[0]["document"]] == list(
        range(documents["tokens"][0].as_py())
    )


def test_pairs_have_p_values_by_students_t_and_holm(told):
    facts, documents, _, shown, _ = told
    rows = [*facts["members"], *facts["rules"]]
    assert len(facts["pairs"]) == len(rows) * (len(rows) - 1) // 2
    sizes = np.array(documents["tokens"].to_pylist(), dtype=float)
    for one in facts["pairs"][:6]:
        sums = np.array(documents[one["first"]].to_pylist()) - np.array(documents[one["second"]].to_pylist())
        mean, count = sums.sum() / sizes.sum(), len(sizes)
        error = math.sqrt(((sums - mean * sizes) ** 2).sum() * count / (count - 1)) / sizes.sum()
        assert one["delta"] == pytest.approx(mean)
        assert one["p"] == pytest.approx(2 * stats.t.sf(abs(mean) / error, count - 1), rel=1e-6)
    assert [one["p_holm"] for one in facts["pairs"]] == holm([one["p"] for one in facts["pairs"]])
    assert "p (Holm)" in shown


def test_holms_p_values_reject_what_his_procedure_rejects():
    generator = np.random.default_rng(0)
    for _ in range(200):
        p = generator.uniform(size=generator.integers(1, 9)) ** 3
        adjusted = holm(p.tolist())
        for level in (0.01, 0.05, 0.3):
            rejected, left = set(), len(p)
            for k in p.argsort():
                if p[k] > level / left:
                    break
                rejected.add(int(k))
                left -= 1
            assert {k for k, own in enumerate(adjusted) if own <= level} == rejected
    assert holm([math.nan, 0.02])[1] == 0.02


def test_rows_that_are_the_same_have_a_p_value_of_one():
    within = Clusters(torch.arange(6) // 2, "documents")
    assert paired(torch.ones(6), torch.ones(6), within).p == 1


def test_a_run_says_how_it_is_made_again(told):
    own = told[0]["run"]
    assert own["command"].startswith("softmeet evaluate -m ")
    assert {"python", "torch", "transformers"} <= own["versions"].keys()
    assert own["seeds"] == []
    assert own["seconds"] > 0
    assert own["cores"] > 0
    assert own["processor"] is not None
    assert [len(one["body"]) for one in own["members"]] == [64, 64]


@pytest.mark.parametrize("form", ["latex", "markdown"])
def test_tables_for_papers_stand_alone(form, folders, tmp_path):
    (tmp_path / "a_b.txt").write_text(" ".join(TEXTS) * 3)
    done = run("evaluate", *tiny.each("-m", folders), "-t", tmp_path / "a_b.txt", "--rule", "logit-mean",
               "--table", form, "--baseline", "prob-mean")  # fmt: skip
    assert done.returncode == 0, done.stderr
    if form == "latex":
        lines = done.stdout.splitlines()
        assert (lines[1], lines[-1]) == (r"\begin{tabular}{lrrrr}", r"\end{tabular}")
        assert all(line.endswith(r"\\") for line in lines if "&" in line)
        assert r"$\pm$" in done.stdout
    else:
        assert done.stdout.startswith("|  | nats/token | bits/byte | top-1 | against prob-mean |\n| --- | ---: |")
        assert "\n| prob-mean | " in done.stdout
    assert "The baseline is" not in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baseline", "meat"], "expected a baseline among"),
        (["--table", "word"], "unknown form of a table 'word'"),
        (["--tokens"], "--tokens is for --losses FILE"),
        (["--adaptive"], "give --folds N"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_read(flags, message, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("softmeet.evaluation.perplexity.evaluate_text", None)
    (tmp_path / "a.txt").write_text(" ".join(TEXTS))
    done = run("evaluate", *tiny.each("-m", folders), "-t", tmp_path / "a.txt", "--rule", "prob-mean", *flags)
    assert done.returncode == 2
    assert message in done.stderr.replace("\n", " ")
