"""A warning where members of different size get equal weights."""

from __future__ import annotations

import json
import random

import pytest
import tiny
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app
from softmeet.derived import file_of
from softmeet.errors import InvalidInputError
from softmeet.hf import unequal
from softmeet.hf.remembered import known, members_hash
from softmeet.members.member import short
from softmeet.rules.settings import Settings


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path, monkeypatch):
    """Other tests advise on members like these."""
    monkeypatch.setenv("SOFTMEET_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two members, the first with some more parameters than the second."""
    folder = tmp_path_factory.mktemp("members")
    found = [tiny.save(folder / name, name, seed=k) for k, name in enumerate(("gpt2", "llama"))]
    sizes = [unequal.parameters(Ensemble.from_pretrained([str(one)], "logit-mean").model.members[0]) for one in found]
    return [str(one) for _, one in sorted(zip(sizes, found, strict=True), reverse=True)], max(sizes) / min(sizes)


@pytest.mark.parametrize(
    ("given", "tiny_size", "ratio", "warned"),
    [({}, 1, 1.0, True), ({"weights": [0.7, 0.3]}, 1, 1.0, False), ({}, 10**9, 1.0, False), ({}, 1, 1.01, False)],
)
def test_equal_weights_of_unequal_members_are_warned_of(given, tiny_size, ratio, warned, folders, monkeypatch, caplog):
    names, apart = folders
    monkeypatch.setattr(unequal, "_TINY", tiny_size)
    monkeypatch.setattr(unequal, "_RATIO", apart * ratio)
    ensemble = Ensemble.from_pretrained(names, "logit-mean", **given)
    said = [record.getMessage() for record in caplog.records if "equal weights" in record.getMessage()]
    assert len(said) == warned
    assert all(f"gpt2 has {apart:.1f} times" in one or f"llama has {apart:.1f} times" in one for one in said)
    assert ensemble.names == names
    with unequal.unwarned():
        Ensemble.from_pretrained(names, "logit-mean", **given)
    assert sum("equal weights" in record.getMessage() for record in caplog.records) == warned


WORSE = (
    "worse than {0} alone by 0.020 ± 0.010 bits a byte, as softmeet advise measured on a text of 8,148 bytes: "
    "weights of 0.83,0.17"
)


@pytest.mark.parametrize(
    ("gain", "margin", "rule", "said", "warned"),
    [
        (-0.02, 0.01, "logit-mean", "keep one", WORSE),
        (-0.02, 0.03, "logit-mean", "", None),
        (-0.0004, 0.0, "logit-mean", "", None),  # "by 0.000" is nothing to be warned of
        (0.01, 0.005, "logit-mean", "", None),
        (0.01, 0.005, "logit-mean", "keep one", "softmeet advise said of these, on a text of 8,148 bytes: keep one"),
        (-0.02, 0.01, "prob-mean", "", "has {1:.1f} times"),
        (-0.02, 0.01, "pointwise-min", "", None),
    ],
)
def test_what_was_measured_goes_before_sizes(gain, margin, rule, said, warned, folders, monkeypatch, caplog):
    names, apart = folders
    monkeypatch.setattr(unequal, "_TINY", 1)
    monkeypatch.setattr(unequal, "_RATIO", 1.0)
    with unequal.unwarned():
        model = Ensemble.from_pretrained(names, rule).model
    found = unequal.Measured(
        gain=gain, margin=margin, best=0, bytes=8148, weights=[0.83, 0.17], said=said, by="softmeet advise"
    )
    unequal.remember_equal(model, found)
    Ensemble.from_pretrained(names, rule)
    told = [record.getMessage() for record in caplog.records if record.name == "softmeet.weights"]
    assert len(told) == (warned is not None)
    assert all(str(warned).format(short(names[0]), apart) in one for one in told)
    Ensemble.from_pretrained(names[::-1], rule, weights=[0.5, 0.5])
    assert len([record for record in caplog.records if record.name == "softmeet.weights"]) == len(told)


@pytest.mark.parametrize("command", [["evaluate"], ["fit", "--out", "OUT", "--bands", "1", "--meet-tokens", "20"]])
def test_evaluate_and_fit_keep_what_they_measure_of_equal_weights(command, folders, tmp_path):
    chooser = random.Random(1)
    for k in range(9):
        (tmp_path / f"{k}.txt").write_text("".join(chooser.choices("abc \n", k=180)))
    told = [word.replace("OUT", str(tmp_path / "out")) for word in command]
    told += [*tiny.each("-m", folders[0]), "-t", str(tmp_path / "*.txt"), "--json", "-"]
    facts = json.loads(CliRunner().invoke(app, told, catch_exceptions=False).stdout)
    with unequal.unwarned():
        model = Ensemble.from_pretrained(folders[0], "logit-mean").model
    kept = known(file_of("weights.json"))[members_hash(model)]["equal"]
    assert kept["by"] == f"softmeet {command[0]}"
    assert len(kept["weights"]) == (2 if command[0] == "fit" else 0)
    if command[0] == "evaluate":
        rows = [row["bits_per_byte"] for row in facts["members"].values()]
        assert kept["gain"] == pytest.approx(min(rows) - facts["rules"]["logit-mean"]["bits_per_byte"])
        assert kept["best"] == rows.index(min(rows))
        assert kept["bytes"] == 9 * 179


def test_what_was_measured_on_more_text_stays_and_a_short_one_tells_nothing(folders):
    with unequal.unwarned():
        model = Ensemble.from_pretrained(folders[0], "logit-mean").model
    unequal.remember_equal(
        model, unequal.Measured(gain=-1, margin=0, best=0, bytes=299, weights=[], said="", by="softmeet evaluate")
    )
    assert members_hash(model) not in known(file_of("weights.json"))
    for size in (1000, 900, 1100):
        measured = {"gain": 0.1, "margin": 0.1, "best": 0, "bytes": size, "weights": [], "said": ""}
        unequal.remember_equal(model, unequal.Measured(**measured, by="softmeet evaluate"))
        assert known(file_of("weights.json"))[members_hash(model)]["equal"]["bytes"] == max(size, 1000)


@pytest.mark.parametrize("kept", ["[1]", '{"x": 1}', '{"WHO": 3}', '{"WHO": {"equal": {"gain": -1}}}'])
def test_what_is_kept_and_damaged_is_not_there(kept, folders, tmp_path, caplog):
    with unequal.unwarned():
        model = Ensemble.from_pretrained(folders[0], "logit-mean").model
    file_of("weights.json").parent.mkdir()
    file_of("weights.json").write_text(kept.replace("WHO", members_hash(model)))
    Ensemble.from_pretrained(folders[0], "logit-mean")
    assert not [record for record in caplog.records if record.name == "softmeet.weights"]


def test_weights_by_size(folders, tmp_path, monkeypatch, caplog):
    names, apart = folders
    monkeypatch.setattr(unequal, "_TINY", 1)
    monkeypatch.setattr(unequal, "_RATIO", 1.0)
    wanted = pytest.approx([apart / (1 + apart), 1 / (1 + apart)])
    found = Ensemble.from_pretrained(names, "logit-mean", weights="auto")
    assert found.model.config.weights == wanted
    assert Ensemble.from_pretrained(names, "prob-mean:weights=auto").model.config.weights == wanted
    assert not any("equal weights" in record.getMessage() for record in caplog.records)
    with unequal.unwarned():
        Ensemble.from_pretrained(names, "logit-mean").save_pretrained(tmp_path / "saved")
    again = Ensemble.from_pretrained(tmp_path / "saved", weights="auto")
    assert again.model.config.weights == wanted
    told = ["generate", "a", *tiny.each("-m", names), "--weights", "auto", "--json", "--max-new-tokens", "2"]
    facts = json.loads(CliRunner().invoke(app, told, catch_exceptions=False).stdout)
    assert [member["weight"] for member in facts["members"]] == wanted
    monkeypatch.setattr(unequal, "parameters", lambda model: None)
    with pytest.raises(InvalidInputError, match="does not tell how many parameters"):
        Ensemble.from_pretrained(names, "logit-mean", weights="auto")
    with pytest.raises(InvalidInputError, match="expected weights as numbers here, got 'auto'"):
        Settings.of({"weights": "auto"}).for_members(2)
    with pytest.raises(InvalidInputError, match="a number or a list of numbers, got 'size'"):
        Settings.of({"weights": "size"})


def test_a_saved_ensemble_and_the_bundled_ones_are_not_warned_of(folders, tmp_path, monkeypatch, caplog):
    Ensemble.from_pretrained("wide", "logit-mean")
    monkeypatch.setattr(unequal, "_TINY", 1)
    monkeypatch.setattr(unequal, "_RATIO", 1.0)
    Ensemble.from_pretrained(folders[0], "logit-mean").save_pretrained(tmp_path / "saved")
    caplog.clear()
    Ensemble.from_pretrained(tmp_path / "saved")
    assert not any("equal weights" in record.getMessage() for record in caplog.records)
