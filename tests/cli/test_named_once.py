"""Settings that are named in two places, and what is said of spellings that are gone."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from softmeet.cli.main import app
from softmeet.errors import InvalidInputError
from softmeet.server.naming import named


def generated(members, *words):
    command = ["generate", "hello", *members, "--max-new-tokens", "2", "--json", *map(str, words)]
    return CliRunner().invoke(app, command)


def test_a_rule_may_hold_every_setting(members):
    by_text = json.loads(generated(members, "--rule", "meet:trust=1/0.5:pool=prob-mean:tol=1e-6", "--seed", 1).stdout)
    flags = ["--rule", "meet", "--trust", "1,0.5", "--pool", "prob-mean", "--tol", 1e-6, "--seed", 1]
    by_flags = json.loads(generated(members, *flags).stdout)
    assert [m["trust"] for m in by_text["members"]] == ["1", "0.5"]
    for key in ("completions", "members", "rule", "head_passes_per_token"):
        assert by_text[key] == by_flags[key]


def test_a_setting_is_named_once(members, monkeypatch):
    """On the command line it is an error, before anything is loaded; over a file the command line wins."""
    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", None)
    done = generated(["-m", "wide/gpt2"], "--rule", "meet:trust=1", "--trust", 2)
    assert isinstance(done.exception, InvalidInputError)
    assert "trust is named twice, in the rule 'meet:trust=1'" in str(done.exception)
    command = ["evaluate", "-m", "wide/gpt2", "-t", __file__, "--rule", "meet:tol=1e-5", "--tol", "1e-4"]
    done = CliRunner().invoke(app, command)
    assert "tol is named twice, in the rule 'meet:tol=1e-5' and by --tol" in str(done.exception)


def test_the_command_line_overrules_a_file(members, tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("rule: meet\ntrust: [0.7, 0.2]\n")
    own = json.loads(generated(members, "--config", file).stdout)
    assert [m["trust"] for m in own["members"]] == ["0.7", "0.2"]
    said = json.loads(generated(members, "--config", file, "--rule", "meet:trust=1").stdout)
    assert [m["trust"] for m in said["members"]] == ["1", "1"]


def test_what_is_served_is_named_and_files_alone_are_one_ensemble(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(f"{name}.gguf").touch()
    assert named(["a.gguf", "wide", "b.gguf"], ["c"]) == {"wide": ["wide"], "default": ["a.gguf", "b.gguf", "c"]}
    assert named(["one=a.gguf", "b.gguf"]) == {"one": ["a.gguf"], "default": ["b.gguf"]}
    assert list(named(["a/mine", "b/mine", "c/other"])) == ["a/mine", "b/mine", "other"]
    assert list(named(["wide", "narrow"], ["my=a", "my=b"])) == ["wide", "narrow", "my"]
    assert named([], ["a", "b"]) == {"default": ["a", "b"]}
    both = named(["saved"], ["small=org/a", "small=org/b", "c+adapter=org/lora", "./x=y"])
    assert both == {"small": ["org/a", "org/b"], "default": ["c+adapter=org/lora", "./x=y"], "saved": ["saved"]}
    assert named([]) == {"default": ["wide"]}
    for given, said in (
        ((["small=x"], ["small=a"]), "twice"),
        ((["duo=A", "duo=B"],), "say -m duo=A -m duo=B to combine these models"),
        ((["duo=C"], ["duo=A", "duo=B"]), "say -m duo=A -m duo=B -m duo=C to combine"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            named(*given)


def test_devices_are_repeated():
    from softmeet.cli.options import placement

    assert placement(None) is None
    assert placement(["cuda"]) == "cuda"
    assert placement(["cuda:0", "cuda:1"]) == ["cuda:0", "cuda:1"]
