"""Spellings of older versions, what they are today, and settings that are named in two places."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.flags import Command
from softmeet.cli.main import app
from softmeet.cli.old_forms import modern_values, modern_words
from softmeet.errors import InvalidInputError
from softmeet.server.ensembles import named


@pytest.mark.parametrize(
    ("before", "today"),
    [
        ("-m A B -t x y --bos", "-m A -m B -t x -t y --bos"),
        ("--members A B", "--member A --member B"),
        ("--members=A B", "--member A --member B"),
        ("--rules logit-mean,meet:trust=1", "--rule logit-mean --rule meet:trust=1"),
        ("--rule least-squares --metric raw", "--rule least-squares:metric=raw"),
        ("--metric=raw --rule least-squares", "--rule least-squares:metric=raw"),
        ("--rule min-cross-entropy --slack 0.1 --vertex", "--rule min-cross-entropy:slack=0.1:vertex=true"),
    ],
)
def test_an_old_form_reads_as_todays_and_warns(before, today, capsys):
    assert modern_words(before.split()) == today.split()
    assert "is an old form and ends with 0.3.0" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "words", ["-m A -m B -t x", "text -m A --rule meet:trust=1", "-t - -m A", "--rule meet --top-k 3"]
)
def test_todays_words_stay_and_nothing_is_said(words, capsys):
    assert modern_words(words.split()) == words.split()
    assert capsys.readouterr().err == ""


def test_an_argument_may_follow_an_option():
    words = ["-m", "A", "-m", "B", "a prompt"]
    assert modern_words(words, several=False) == words
    assert CliRunner().invoke(app, ["generate", "-m", "not/there", "a prompt", "--trust", "-1"]).exit_code == 1
    done = CliRunner().invoke(app, ["trace", "-m", "not/there", "-t", __file__, "an-out"])
    assert "not/there" in str(done.exception)


def test_an_option_of_a_rule_needs_its_rule():
    with pytest.raises(InvalidInputError, match="say --rule NAME:metric=raw"):
        modern_words(["--metric", "raw"])
    with pytest.raises(InvalidInputError, match="say rule: NAME:slack="):
        modern_values({"slack": 0.1})


def test_an_old_configuration_file_reads_as_todays(capsys):
    values = {"members": ["a", "b"], "rules": "meet,prob-mean", "tol": 1e-3}
    assert modern_values(values) == {"member": ["a", "b"], "rule": ["meet", "prob-mean"], "tol": 1e-3}
    values = {"rule": "min-cross-entropy", "vertex": True, "slack": 0.0}
    assert modern_values(values) == {"rule": "min-cross-entropy:vertex=true"}
    assert capsys.readouterr().err.count("old form") == 3


def test_every_command_reads_old_forms():
    from typer.main import get_command

    root = get_command(app)
    assert all(isinstance(command, Command) for command in root.commands.values())


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("members")
    return [word for k, name in enumerate(("gpt2", "llama")) for word in ("-m", str(tiny.save(root / name, name, k)))]


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


def test_a_setting_is_named_once(members):
    """On the command line it is an error, before anything is loaded; over a file the command line wins."""
    done = generated(["-m", "not/there"], "--rule", "meet:trust=1", "--trust", 2)
    assert isinstance(done.exception, InvalidInputError)
    assert "trust is named twice, in the rule 'meet:trust=1'" in str(done.exception)
    command = ["evaluate", "-m", "not/there", "-t", __file__, "--rule", "meet:tol=1e-5", "--tol", "1e-4"]
    done = CliRunner().invoke(app, command)
    assert "tol is named twice, in the rule 'meet:tol=1e-5' and by --tol" in str(done.exception)


def test_the_command_line_overrules_a_file(members, tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("rule: meet\ntrust: [0.7, 0.2]\n")
    own = json.loads(generated(members, "--config", file).stdout)
    assert [m["trust"] for m in own["members"]] == ["0.7", "0.2"]
    said = json.loads(generated(members, "--config", file, "--rule", "meet:trust=1").stdout)
    assert [m["trust"] for m in said["members"]] == ["1", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trust", "-1"], "trusts from 0 to inf"),
        (["--rule", "mete"], "did you mean meet"),
        (["--rule", "meet:trsut=1"], "did you mean trust"),
        (["--weights", "a,b"], "--weights as numbers"),
        (["--gate", "open"], "expected a gate"),
        (["--tol", "0"], "tol to be greater than 0"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_loaded(words, message):
    done = generated(["-m", "not/there"], *words)
    assert isinstance(done.exception, InvalidInputError)
    assert message in str(done.exception)


def test_what_is_served_is_named():
    assert named([], ["a", "b"]) == {"default": ["a", "b"]}
    both = named(["saved"], ["small=org/a", "small=org/b", "c+adapter=org/lora", "./x=y"])
    assert both == {"small": ["org/a", "org/b"], "default": ["c+adapter=org/lora", "./x=y"], "saved": ["saved"]}
    assert named([]) == {"default": ["wide"]}
    with pytest.warns(UserWarning, match=re.escape("say -m pair=a -m pair=b")):
        assert named(["pair=a,b"]) == {"pair": ["a", "b"]}
    with pytest.raises(InvalidInputError, match="twice"):
        named(["small=x"], ["small=a"])


def test_devices_are_repeated(capsys):
    from softmeet.cli.options import placement

    assert placement(None) is None
    assert placement(["cuda"]) == "cuda"
    assert placement(["cuda:0", "cuda:1"]) == ["cuda:0", "cuda:1"]
    assert capsys.readouterr().err == ""
    assert placement(["cuda:0,cuda:1"]) == ["cuda:0", "cuda:1"]
    assert "repeat it" in capsys.readouterr().err


def test_methods_that_moved_to_the_combiner_go_on_working():
    model = Ensemble.from_pretrained("wide").model
    hidden = [states[:2] for states in model.hidden_states(torch.tensor([[5, 6, 7]]))]
    with pytest.warns(DeprecationWarning, match=r"solve_rows is model.combiner.solve_rows"):
        before, solution = model.solve_rows(hidden)
    log_probs, today = model.combiner.solve_rows(hidden, model.settings.ungated())
    assert torch.equal(before, log_probs)
    assert torch.equal(solution.log_probs, today.log_probs)
    with pytest.warns(DeprecationWarning, match="own_log_probs"):
        assert torch.equal(model.own_log_probs(hidden)[0], model.combiner.own_log_probs(hidden)[0])
