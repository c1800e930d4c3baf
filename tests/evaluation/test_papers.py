"""What ``softmeet evaluate`` writes for papers: baselines, pairs, losses, tables, and how a run can be made again."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
from importlib.metadata import PathDistribution

import numpy as np
import pytest
import tiny
import torch
from commands import facts_of, ran, refusal, stages
from pyarrow import parquet
from scipy import stats

from softmeet.cli.paper import paper_table
from softmeet.evaluation import record
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.intervals import Clusters, paired
from softmeet.evaluation.report import holm

TEXTS = [
    "the quick brown fox",
    "jumps over the lazy dog",
    "a dog and a fox",
    "over the brown hills",
    "foxes jump and run",
]


@pytest.fixture(scope="module")
def told(folders, tmp_path_factory):
    """(the figures of a run with everything, its losses by document and by token, what it printed)."""
    folder = tmp_path_factory.mktemp("told")
    for k in range(12):
        (folder / f"{k:02}.txt").write_text(f"{TEXTS[k % 5]} {TEXTS[(k * 3 + 1) % 5]} {k}")
    asked = ["evaluate", *tiny.each("-m", folders), "--text", folder / "*.txt", "--rule", "prob-mean", "--folds", 2]
    asked += ["--pairs", "all"]
    done = ran(*asked, "--json", folder / "out.json", "--losses", folder / "documents.parquet")
    again = ran(*asked, "--losses", folder / "tokens.parquet", "--tokens", "--table", "csv", "--adaptive")
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


def test_pairs_are_of_the_rows_that_are_named(folders, tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.txt").write_text(f"{TEXTS[k]} {k}")
    label = "/".join(folders[0].parts[-2:])
    asked = ["--pairs", f"prob-mean, {label},logit-mean", "--rule", "prob-mean"]
    pairs = facts_of("evaluate", *tiny.each("-m", folders), "--text", tmp_path / "*.txt", *asked)["pairs"]
    assert [(one["first"], one["second"]) for one in pairs] == [
        ("prob-mean", str(folders[0])), ("prob-mean", "logit-mean"), (str(folders[0]), "logit-mean"),
    ]  # fmt: skip
    assert [one["p_holm"] for one in pairs] == holm([one["p"] for one in pairs])


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


def test_the_commit_is_that_of_softmeets_sources_alone(tmp_path, monkeypatch):
    def git(*asked):
        own = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *asked]
        return subprocess.run(own, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "record.py"
    source.touch()
    monkeypatch.setattr(record, "__file__", str(source))
    assert record.commit() is None
    git("init")
    assert record.commit() is None  # as of an environment within another program's checkout
    git("add", ".")
    git("commit", "-m", "a")
    assert record.commit() == git("rev-parse", "HEAD")
    source.write_text("1")
    assert record.commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setattr(PathDistribution, "read_text", lambda self, name: '{"vcs_info": {"commit_id": "abc"}}')
    assert record.commit() == "abc"


@pytest.mark.parametrize("form", ["latex", "markdown"])
def test_tables_for_papers_stand_alone(form, folders, tmp_path):
    (tmp_path / "a_b.txt").write_text(" ".join(TEXTS) * 3)
    done = ran("evaluate", *tiny.each("-m", folders), "-t", tmp_path / "a_b.txt", "--rule", "logit-mean",
               "--table", form, "--baseline", "prob-mean")  # fmt: skip
    if form == "latex":
        lines = done.stdout.splitlines()
        notes = [line for line in lines if line.startswith("% ")]
        assert notes[0].endswith("tokens of 1 document; losses in nats, less is better")
        assert "95 % intervals" in notes[1]
        assert (lines[len(notes)], lines[-1]) == (r"\begin{tabular}{lrrrr}", r"\end{tabular}")
        assert all(line.endswith(r"\\") for line in lines if "&" in line)
        assert r"$\pm$" in done.stdout
    else:
        assert done.stdout.startswith("|  | nats/token | bits/byte | top-1 | against prob-mean |\n| --- | ---: |")
        assert "\n| prob-mean | " in done.stdout
    assert "The baseline is" not in done.stdout


def tables(facts, form):
    """The tables for a paper, as rows of cells: a first row of heads, and no rules."""
    found = []
    for table in paper_table(facts, form).split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("| ") or line.endswith(r" \\")]
        sign = "|" if form == "markdown" else "&"
        rows = [[cell.strip() for cell in line.removesuffix(r"\\").strip("|").split(sign)] for line in lines]
        found.append([row for row in rows if row[0] != "---"])
    return found


@pytest.mark.parametrize("form", ["latex", "markdown"])
def test_a_table_has_columns_for_what_was_fitted_and_no_others(form, told, folders):
    facts = told[0]
    head, *rows = tables(facts, form)[0]
    assert head[5:] == ["weights", "temperature", "order"]
    assert {len(row) for row in rows} == {8}
    ordered = {row[0]: row[7] for row in rows if row[7]}
    assert ordered == {"fitted power-mean": f"{facts['rules']['fitted power-mean']['fitted']['order']:.2f}"}
    few = facts | {"baseline": str(folders[0]), "pairs": []}
    few["rules"] = {name: row for name, row in facts["rules"].items() if "power" not in name}
    assert tables(few, form)[0][0][5:] == ["weights", "temperature"]
    few["rules"] = {"prob-mean": facts["rules"]["prob-mean"]}
    assert len(tables(few, form)[0][0]) == 5


@pytest.mark.parametrize("form", ["latex", "markdown"])
def test_all_pairs_are_a_second_table(form, told):
    facts = told[0]
    first, (head, *rows) = tables(facts, form)
    assert head == ["", "against", "nats/token", "p", "p (Holm)"]
    assert len(rows) == len(facts["pairs"])
    assert {name for row in rows for name in row[:2]} == {row[0] for row in first[1:]}
    signs = {"$-$": "-", r" \times 10^{-": "e-", "}$": "", r"$\pm$": "±", "$": ""} if form == "latex" else {}
    for row, own in zip(rows, facts["pairs"], strict=True):
        for sign, plain in signs.items():
            row[2:] = [cell.replace(sign, plain) for cell in row[2:]]
        assert float(row[2].split()[0]) == pytest.approx(own["delta"], abs=1e-4)
        assert [float(cell) for cell in row[3:]] == pytest.approx([own["p"], own["p_holm"]], rel=0.06)
    assert len(tables({name: own for name, own in facts.items() if name != "pairs"}, form)) == 1


def test_csv_is_one_table_also_with_pairs(told):
    facts = told[0]
    rows = list(csv.reader(io.StringIO(paper_table(facts, "csv"))))
    assert len(rows) == 1 + len(facts["members"]) + len(facts["rules"])
    assert {len(row) for row in rows} == {10}


def test_powers_and_infinities_are_latexs():
    row = {"nll": math.inf, "bits_per_byte": math.inf, "top1": 0.0, "against": {"delta": 0.0, "ci95": [0.0, 0.0]}}
    pair = {"first": "a", "second": "b", "delta": -math.inf, "ci95": [-math.inf, math.inf], "p": 3e-5, "p_holm": 6e-11}
    facts = {"members": {"a": row, "b": row}, "rules": {}, "baseline": "a", "vocabulary": "tokens", "pairs": [pair],
             "tokens": 5, "documents": 1, "clusters": {"count": 3, "kind": "blocks"}}  # fmt: skip
    shown = paper_table(facts, "latex")
    assert r"a & $\infty$ & $\infty$ & 0.000 & 0 \\" in shown
    assert r"a & b & $-$$\infty$ & $3 \times 10^{-5}$ & $6 \times 10^{-11}$ \\" in shown


def test_what_was_stored_is_told_first_and_at_once(tmp_path):
    """So that the time left is estimated from what this run does."""

    def made(count):
        done = []
        pieces = PieceCache(tmp_path, {}).map(
            None, "double", lambda x: {"x": torch.tensor([2 * x])}, range(count), lambda x: (x,), done.append
        )
        assert [own["x"].item() for own in pieces] == [2 * x for x in range(count)]
        return done

    assert made(2) == [[], [0], [1]]
    assert made(4) == [[0, 1], [2], [3]]


@pytest.mark.parametrize("unit", ["tokens", "bytes"])
def test_what_reads_text_says_how_much_of_it_is_read(unit, folders, tmp_path, monkeypatch):
    texts, over = tmp_path / "*.txt", ["--vocabulary", unit]
    for k, text in enumerate(TEXTS[:2]):
        (tmp_path / f"{k}.txt").write_text(text[:10])
    members = tiny.each("-m", folders if unit == "tokens" else ["wide/gpt2", "wide/llama"])
    found = stages(monkeypatch, "evaluate", "texts")
    ran("trace", tmp_path / "trace", *members, "-t", texts, *over)
    asked = ["--rule", "power-mean", "--folds", 2, "--adaptive"]
    size = facts_of("evaluate", "--trace", tmp_path / "trace", *over, *asked)["tokens"]
    read = {name: (total, counts) for name, total, counts in found if not name.startswith("fitting ")}
    does = ["reading the trace", "scoring averages", "scoring averages of adaptive weights", "evaluating"]
    assert list(read) == [f"{name}, in {unit}" for name in does]
    assert {(total, sum(counts)) for total, counts in read.values()} == {(size, size)}
    assert all(total is None for name, total, _ in found if name.startswith("fitting "))
    found.clear()
    for more in ([], ["--folds", 2]):
        ran("evaluate", *members, "-t", texts, *over, "--rule", "prob-mean", *more)
    first = [f"{name}, in {unit}" for name in ("evaluating", "reading the text")]
    assert [name for name, _, _ in found if name in first] == first
    assert all((total, sum(counts)) == (size, size) for name, total, counts in found if name in first)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baseline", "meat"], "expected a row of the table, one of"),
        (["--pairs", "logit-mean,meat"], "got 'meat'"),
        (["--pairs", "logit-mean"], "expected two rows or more"),
        (["--table", "word"], "unknown form of a table 'word'"),
        (["--tokens"], "--tokens is for --losses FILE"),
        (["--adaptive"], "give --folds N"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_read(flags, message, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("softmeet.evaluation.perplexity.evaluate_text", None)
    (tmp_path / "a.txt").write_text(" ".join(TEXTS))
    assert message in refusal(
        "evaluate", *tiny.each("-m", folders), "-t", tmp_path / "a.txt", "--rule", "prob-mean", *flags
    )
