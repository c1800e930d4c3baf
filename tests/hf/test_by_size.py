"""Weights by members' sizes: where an average has none, and what is said of them."""

from __future__ import annotations

import json
import random

import byte_members
import byte_tokenizers
import pytest
import tiny
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app
from softmeet.errors import InvalidInputError
from softmeet.hf import by_size
from softmeet.members.member import short
from softmeet.rules.settings import Settings


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two members of one tokenizer, the first with some more parameters than the second."""
    folder, tokenizer = tmp_path_factory.mktemp("members"), byte_tokenizers.byte_level()
    found = [str(byte_members.save(folder / name, kind, 0)) for name, kind in (("a", "gpt2"), ("b", tokenizer))]
    sizes = [by_size.parameters(one, Ensemble.from_pretrained(one, "logit-mean").model.members[0]) for one in found]
    return [one for _, one in sorted(zip(sizes, found, strict=True), reverse=True)], max(sizes) / min(sizes)


@pytest.fixture
def shares(folders):
    """Their weights by size."""
    return pytest.approx([folders[1] / (1 + folders[1]), 1 / (1 + folders[1])])


@pytest.fixture
def said(caplog):
    """A function that returns what has been said of weights since the last call."""

    def since():
        found = [one.getMessage() for one in caplog.records if one.name == "softmeet.weights"]
        caplog.clear()
        return found

    return since


@pytest.mark.parametrize(
    ("rule", "given", "is_by_size"),
    [
        ("logit-mean", {}, True),
        ("prob-mean", {}, True),
        ("power-mean", {}, True),
        ("logit-mean", {"vocabulary": "bytes"}, True),
        ("logit-mean", {"weights": [1, 1]}, False),
        ("prob-mean", {"vocabulary": "union"}, False),  # as published methods have it
        ("prob-mean", {"vocabulary": "union:as=gac"}, False),
        ("pointwise-max", {}, False),
        ("meet", {}, False),
        ("max-entropy", {}, False),
        ("meet", {"weights": "auto"}, True),
    ],
)
def test_an_average_without_weights_goes_by_size(rule, given, is_by_size, folders, shares, said):
    names, _ = folders
    found = Ensemble.from_pretrained(names, rule, **given).model.config.weights
    assert found == (shares if is_by_size else [0.5, 0.5])
    each = ", ".join(f"{weight:.2f} for {short(name)}" for weight, name in zip(found, names, strict=True))
    assert said() == [f"weights by size: {each}; --weights 1,1 makes them equal"] * is_by_size


def test_equal_and_unknown_sizes_are_nothing_to_speak_of(folders, monkeypatch, said):
    one = folders[0][0]
    assert Ensemble.from_pretrained([one, f"{one}+name=again"], "logit-mean").model.config.weights == [0.5, 0.5]
    packed = Ensemble.from_pretrained(one, "logit-mean").model.members[0]
    packed.quantization_method = "gptq"
    assert by_size.parameters(one, packed) == 0
    monkeypatch.setattr(by_size, "parameters", lambda name, model: 0)
    assert Ensemble.from_pretrained(folders[0], "logit-mean").model.config.weights == [0.5, 0.5]
    assert not said()
    with pytest.raises(InvalidInputError, match="does not tell how many parameters"):
        Ensemble.from_pretrained(folders[0], "logit-mean", weights="auto")


def test_a_saved_ensemble_keeps_its_weights(folders, shares, tmp_path, said):
    for name, given, weights in (("equal", {"weights": [1, 1]}, [0.5, 0.5]), ("default", {}, shares)):
        Ensemble.from_pretrained(folders[0], "logit-mean", **given).save_pretrained(tmp_path / name)
        said()
        assert json.loads((tmp_path / name / "config.json").read_text())["weights"] == weights
        for rule in (None, "prob-mean"):
            assert Ensemble.from_pretrained(tmp_path / name, rule).model.config.weights == weights
        assert not said()
    # A file that was written by hand, and names none.
    config = json.loads((tmp_path / "default" / "config.json").read_text())
    (tmp_path / "default" / "config.json").write_text(json.dumps({**config, "weights": None}))
    assert Ensemble.from_pretrained(tmp_path / "default").model.config.weights == [0.5, 0.5]
    assert Ensemble.from_pretrained(tmp_path / "equal", weights="auto").model.config.weights == shares


def test_commands_say_who_counts_how_much(folders, shares, said, tmp_path):
    (tmp_path / "a.txt").write_text("".join(random.Random(1).choices("abc \n", k=180)))
    who = [*tiny.each("-m", folders[0]), "--rule", "logit-mean"]

    def run(*words):
        return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)

    told = json.loads(run("generate", "a", *who, "--json", "--max-new-tokens", "2").stdout)
    assert [member["weight"] for member in told["members"]] == shares
    text = ["-t", tmp_path / "a.txt", "--bos"]
    told = json.loads(run("evaluate", *who, *text, "--json", "-").stdout)
    assert told["run"]["rules"]["ensemble"]["weights"] == shares
    assert [*told["rules"]] == ["uniform logit-mean", "uniform prob-mean", "prob-mean", "logit-mean"]
    both = ", ".join(f"{weight:.2f}" for weight in shares.expected)
    assert f"where a rule names none, are {both}." in " ".join(run("evaluate", *who, *text).stdout.split())
    assert len(said()) == 3
    run("fit", *who[:4], *text, "--vocabulary", "bytes", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert not said()


def test_weights_that_are_none():
    with pytest.raises(InvalidInputError, match="expected weights as numbers here, got 'auto'"):
        Settings.of({"weights": "auto"}).for_members(2)
    with pytest.raises(InvalidInputError, match="a number or a list of numbers, got 'size'"):
        Settings.of({"weights": "size"})
