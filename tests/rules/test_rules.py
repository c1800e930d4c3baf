"""Rules of somebody's own: an instance, a name, a package; and what becomes of one that is broken."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from commands import facts_of, ran
from pydantic import Field
from serving import http, running, serving_of

import softmeet
from softmeet.errors import InvalidInputError, RuleError
from softmeet.rules import registry
from softmeet.simplex import log_normalize
from softmeet.solvers.base import Status

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "write-a-rule.md"
MEMBERS = torch.tensor([[[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]]]).log()
HEADS = [torch.eye(3), torch.eye(3)]
WORDS = "the king said unto his daughter in the beginning of the day "


def block(kind: str, index: int = 0) -> str:
    """A code block of the guide."""
    return re.findall(rf"^```{kind}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)[index]


class Minimum(softmeet.Rule):
    """The pointwise minimum."""

    name = "test-minimum"
    summary = "for tests"
    sharpness: float = Field(1.0, gt=0, description="A power.")

    def solve(self, problem):
        return log_normalize(self.sharpness * problem.log_p.amin(0))


def test_an_instance_is_a_rule():
    solution = softmeet.combine(MEMBERS, HEADS, Minimum(sharpness=2.0))
    assert torch.allclose(solution.log_probs.exp(), torch.full((1, 3), 1 / 3))
    assert solution.rule == "test-minimum:sharpness=2.0"
    assert solution.num_passes.item() == 0
    assert (solution.gap.item(), solution.gap_is_certified.item()) == (0.0, False)


def test_what_cannot_be_verified_is_never_optimal():
    """Also where the answer was changed after the rule gave it."""
    solution = softmeet.combine(MEMBERS, HEADS, Minimum())
    found = solution.verify(HEADS, MEMBERS)
    assert found.status.tolist() == [Status.UNVERIFIED]
    assert found.gap.isinf().all()
    assert found.total_variation.isnan().all()
    assert (Status.UNVERIFIED, Status.BUDGET) == (4, 5)


def test_a_rule_may_verify_itself():
    from softmeet.rules.recomputed import Recomputed

    class Checked(Minimum):
        name = "test-checked"

        def verify(self, problem, answer):
            again = self.solve(problem)
            return Recomputed(again, torch.zeros_like(answer.gap), torch.zeros_like(answer.status))

    found = softmeet.combine(MEMBERS, HEADS, Checked()).verify(HEADS, MEMBERS)
    assert found.status.tolist() == [Status.OPTIMAL]
    assert found.total_variation.max() < 1e-7


@pytest.fixture
def registered(monkeypatch):
    """A registry that forgets what a test registers."""
    monkeypatch.setattr(registry.RULES, "_registered", dict(registry.RULES._registered))
    return softmeet.register_rule


def test_a_registered_name_is_a_rule_with_options(registered):
    assert registered(Minimum) is Minimum
    registered(Minimum)  # a notebook's cell may run again
    assert "test-minimum" in softmeet.rule_names()
    assert "test-minimum" in [rule.name for rule in softmeet.RULES]
    by_text = softmeet.combine(MEMBERS, HEADS, "test-minimum:sharpness=2")
    by_option = softmeet.combine(MEMBERS, HEADS, "test-minimum", sharpness=2)
    assert by_text.rule == by_option.rule == "test-minimum:sharpness=2.0"
    with pytest.raises(InvalidInputError, match="sharpness of test-minimum to be greater than 0, got '-1'"):
        softmeet.combine(MEMBERS, HEADS, "test-minimum:sharpness=-1")
    with pytest.raises(InvalidInputError, match="did you mean test-minimum"):
        softmeet.combine(MEMBERS, HEADS, "test-minimun")


class Impostor(Minimum):
    name = "meet"


class Nameless(Minimum):
    name = "Not a name"


class Shared(Minimum):
    name = "test-shared"
    temperature: float = 1.0


class Needy(Minimum):
    name = "test-needy"
    must: float


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Minimum(), "a subclass of softmeet.Rule"),
        (dict, "a subclass of softmeet.Rule"),
        (softmeet.Rule, "a subclass of softmeet.Rule"),
        (Nameless, "small letters"),
        (Impostor, "is taken"),
        (type("Other", (Minimum,), {}), "is taken"),
        (Needy, "a default for each option"),
        (Shared, "the option 'temperature' of the rule 'test-shared' is a setting of all"),
    ],
    ids=["instance", "dict", "abstract", "name", "own", "once", "default", "shared"],
)
def test_what_is_no_rule_is_refused(registered, rule, message):
    registered(Minimum)
    with pytest.raises(InvalidInputError, match=message):
        registered(rule)


@pytest.mark.parametrize(
    ("rule", "message"),
    [(Impostor, "the name 'meet' of Impostor is taken"), (Nameless, "to have a name of small letters")],
)
def test_an_instance_has_a_name_of_its_own(rule, message):
    """What is saved by its name must not come back as another rule."""
    with pytest.raises(InvalidInputError, match=message):
        softmeet.combine(MEMBERS, HEADS, rule())


def broken(solve):
    return type("Broken", (Minimum,), {"name": "test-broken", "solve": lambda self, problem: solve(problem)})()


@pytest.mark.parametrize(
    ("solve", "message"),
    [
        (lambda problem: 1 / 0, "the rule test-broken failed: ZeroDivisionError: division by zero"),
        (lambda problem: problem.log_p, "test-broken gave torch.float64 of shape"),
        (lambda problem: problem.log_p[0] * torch.nan, "test-broken gave no distribution in row 0: .* sum to nan"),
        (lambda problem: problem.log_p[0] + 1, "test-broken gave no distribution in row 0: .* sum to 2.7"),
        (lambda problem: None, "test-broken gave None: expected floating log-probabilities of shape"),
        (lambda problem: problem.log_p[0].long(), "test-broken gave torch.int64"),
    ],
    ids=["raises", "shape", "nan", "mass", "none", "dtype"],
)
def test_a_broken_rule_is_named_in_one_sentence(solve, message):
    with pytest.raises(RuleError, match=message):
        softmeet.combine(MEMBERS, HEADS, broken(solve))
    assert softmeet.combine(MEMBERS, HEADS, "logit-mean").log_probs.isfinite().all()


def test_mass_on_ids_that_are_no_tokens_is_taken_away():
    support = torch.tensor([True, True, False])
    solution = softmeet.combine(MEMBERS, HEADS, Minimum(), support=support)
    assert torch.allclose(solution.log_probs.exp(), torch.tensor([[0.5, 0.5, 0.0]]))


def test_an_infeasible_answer_of_a_rule_falls_back():
    """A rule of one's own may say that a row has no answer; it is answered as any exact rule's."""
    from softmeet.rules.answer import closed_form

    class Never(Minimum):
        name = "test-never"

        def solve(self, problem):
            answer = closed_form(problem, problem.log_pool)
            answer.status = answer.status + int(Status.INFEASIBLE)
            return answer

    solution = softmeet.combine(MEMBERS, HEADS, Never(), trust=1.0)
    assert solution.fallback.all()
    assert torch.allclose(solution.log_probs, softmeet.combine(MEMBERS, HEADS, "meet", trust=1.0).log_probs)
    assert solution.verify(HEADS, MEMBERS).status.tolist() == [Status.OPTIMAL]


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The guide's package, built and installed into a folder of its own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    (source / "softmeet_minimum.py").write_text(block("python"))
    (source / "pyproject.toml").write_text(block("toml"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    return target


def forget(monkeypatch) -> None:
    registry.RULES.forget()
    importlib.invalidate_caches()
    sys.modules.pop("softmeet_minimum", None)


@pytest.fixture
def installed(package, monkeypatch):
    """As if the package had been installed beside softmeet."""
    monkeypatch.syspath_prepend(str(package))
    forget(monkeypatch)
    yield package
    monkeypatch.undo()
    forget(monkeypatch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("members")
    return [str(tiny.save(root / name, name, k)) for k, name in enumerate(("llama", "gpt2"))]


def test_a_package_makes_a_rule_known_everywhere(installed, folders, tmp_path):
    """In combine, the commands, fit, a checkpoint; and in the server's requests."""
    rule = "pointwise-minimum:sharpness=2.0"
    assert "pointwise-minimum" in softmeet.rule_names()
    assert softmeet.combine(MEMBERS, HEADS, rule).rule == rule
    two = ["-m", folders[0], "-m", folders[1]]
    text = tmp_path / "text.txt"
    text.write_text("|".join([WORDS * 2] * 9))
    assert (
        json.loads(ran("generate", "the king", *two, "--rule", rule, "--max-new-tokens", 3, "--json").stdout)["rule"]
        == rule
    )
    read = ["--text", text, "--separator", "|", *two, "--rule", rule]
    assert rule in facts_of("evaluate", *read, "--rule", "logit-mean", "--max-tokens", 20)["rules"]
    sizes = ["--meet-tokens", 8, "--premise-tokens", 8, "--evaluations", 1, "--select-tokens", 8, "--judge-tokens", 8]
    fitted = facts_of("fit", *read, *sizes, "--out", tmp_path / "fitted", "--max-per-document", 9)
    assert fitted["candidates"][rule]["rule"] == rule


def test_requests_may_ask_for_it_and_a_broken_rule_fails_its_own_alone(installed, registered, folders):
    registered(type(broken(lambda problem: 1 / 0)))
    with running(serving_of({"default": softmeet.Ensemble.from_pretrained(folders, "pointwise-minimum")})) as url:

        def ask(**own):
            asked = {"prompt": "the king", "max_tokens": 2, "seed": 1, "softmeet": own}
            answer = http.post(f"{url}/v1/completions", json=asked)
            return answer.status_code, answer.json()

        assert ask()[1]["softmeet"]["rule"] == "pointwise-minimum"
        other = "pointwise-minimum:sharpness=2.0"
        assert ask(rule="pointwise-minimum:sharpness=2")[1]["softmeet"]["rule"] == other
        for own, code, message in (
            ({"rule": "meet:trust=1", "trust": 2}, 400, "trust is named twice"),
            ({"rule": "meet:tol=1e-12"}, 400, "does not let requests change tol"),
            ({"rule": "test-broken"}, 500, "the rule test-broken failed: ZeroDivisionError"),
        ):
            status, found = ask(**own)
            assert (status, message in found["error"]["message"]) == (code, True)
        assert ask()[0] == 200


def test_a_checkpoint_says_which_package_is_missing(package, folders, tmp_path, monkeypatch):
    with monkeypatch.context() as here:
        here.syspath_prepend(str(package))
        forget(here)
        ensemble = softmeet.Ensemble.from_pretrained(folders, "pointwise-minimum:sharpness=2")
        ensemble.save_pretrained(tmp_path / "saved")
        again = softmeet.Ensemble.from_pretrained(tmp_path / "saved")
        assert again.model.config.rule == "pointwise-minimum:sharpness=2.0"
        assert again.model.settings.rule == ensemble.model.settings.rule
    forget(monkeypatch)
    with pytest.raises(
        InvalidInputError, match="package softmeet-minimum, which is not here: pip install softmeet-minimum"
    ):
        softmeet.Ensemble.from_pretrained(tmp_path / "saved")


# Importing softmeet imports neither of the two packages, and is enough for the Auto classes of one.
PROCESS = """
import runpy, sys, softmeet
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv.pop(1))
assert type(model).__name__ == "EnsembleForCausalLM" and model.config.rule == "pointwise-minimum"
runpy.run_module("softmeet", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_auto_classes_and_the_command_know_it_in_a_process_of_its_own(package, installed, folders, tmp_path):
    """The one start of a real process; all else runs in this one."""
    softmeet.Ensemble.from_pretrained(folders, "pointwise-minimum").save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "saved"), "generate", "the king"]
    command += ["--rule", "pointwise-minimum", "--json", *tiny.each("-m", folders), "--max-new-tokens", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rule"] == "pointwise-minimum"


def entry(folder: Path, name: str, target: str, package: str) -> None:
    """Metadata of an installed package with one entry point."""
    info = folder / f"{package.replace('-', '_')}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[softmeet.rules]\n{name} = {target}\n")


def test_broken_packages_harm_nobody_else(tmp_path, monkeypatch):
    (tmp_path / "softmeet_bad.py").write_text("raise RuntimeError('not today')\n")
    entry(tmp_path, "bad", "softmeet_bad:Bad", "bad-rules")
    entry(tmp_path, "meet", "softmeet_bad:Meet", "greedy-rules")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.RULES.forget()
    try:
        with pytest.warns(UserWarning, match="'meet' of the package greedy-rules is left out: softmeet itself"):
            names = softmeet.rule_names()
        assert names[0] == "meet"
        assert "bad" in names
        with pytest.raises(RuleError, match="'bad' of the package bad-rules cannot be loaded: RuntimeError: not today"):
            softmeet.combine(MEMBERS, HEADS, "bad")
        with pytest.warns(UserWarning, match="bad-rules"):
            assert len(softmeet.RULES) == 15
        assert softmeet.combine(MEMBERS, HEADS, "meet").log_probs.isfinite().all()
    finally:
        monkeypatch.undo()
        registry.RULES.forget()


@pytest.mark.parametrize(
    "text",
    [
        "meet",
        "meet:trust=1/0/0.3:pool=prob-mean",
        "least-squares:metric=raw",
        "min-cross-entropy:slack=0.1:vertex=true",
    ],
)
def test_a_rules_text_reads_back(text):
    from softmeet.rules.settings import parse_rule

    rule, settings = parse_rule(text)
    assert parse_rule(str(rule)) == (rule, {})
    assert set(settings) == {name for name in ("trust", "pool") if name in text}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("meet:trust", "expected option=value"),
        ("meet:trust=1:trust=2", "trust twice"),
        ("meet:trust=a", "NUMBER"),
        ("meet:trust=-1", "trusts from 0 to inf"),
        ("meet:truts=1", "did you mean trust"),
        ("meet:temprature=1", "did you mean temperature"),
        ("meet:metric=raw", "unknown option 'metric'"),
        ("meet:rule=x", "expected option=value"),
        ("meet:pool=sum", "pool to be"),
        ("meet:free_weights=maybe", "free_weights to be"),
        ("", "unknown rule ''"),
    ],
)
def test_a_bad_text_says_what_is_wrong(text, message):
    from softmeet.rules.settings import parse_rule

    with pytest.raises(InvalidInputError, match=message):
        parse_rule(text)


def test_no_code_branches_on_a_rules_name():
    """Rules say by traits what sets them apart; pools, the fallback and the default have constants of their own."""
    root = Path(softmeet.__file__).parent
    names = "|".join(rule.name for rule in softmeet.RULES if rule.name not in ("logit-mean", "prob-mean"))
    branch = re.compile(rf"""(==|!=|\bin)\s*\(?["']({names})["']|["']({names})["']\s*(==|!=)|case ["']({names})""")
    found = [
        f"{path.relative_to(root)}:{number}"
        for path in root.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if branch.search(line)
    ]
    assert not found
