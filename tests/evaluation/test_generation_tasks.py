"""The tasks of generation: their items, the process that runs what models write, and the benchmark that asks them."""

from __future__ import annotations

import json
import re
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
import yaml

import generation
from softmeet import Ensemble
from tasks import judging, make

pytestmark = pytest.mark.slow

ITEMS = {
    kind: [json.loads(line) for line in (generation.TASKS / f"{kind}.jsonl").read_text().splitlines()]
    for kind in generation.KINDS
}
LINES = [item for kind in generation.KINDS if kind != "functions" for item in ITEMS[kind]]


def judged(item, answer):
    judge = judging.judged_function if "tests" in item else judging.judged_line
    return judge(item, [answer])["passed"]


def test_there_are_enough_items_and_each_stands_once():
    assert {kind: len(items) for kind, items in ITEMS.items()} == {
        "functions": 63, "copying": 50, "arithmetic": 50, "extraction": 50
    }  # fmt: skip
    every = [item for items in ITEMS.values() for item in items]
    assert len({item["prompt"] for item in every}) == len({item["id"] for item in every}) == len(every) > 200
    assert all(0 < len(item["answer"]) < 100 and "\n" not in item["answer"] for item in every)
    assert all(not item["prompt"][-1].isspace() for item in every)


def test_the_items_can_be_made_again():
    for kind, items in make.items().items():
        assert make.text_of(items) == (generation.TASKS / f"{kind}.jsonl").read_text(), "benchmarks/tasks/make.py"


def test_every_function_is_right_and_its_mistake_is_found():
    for one in make.functions():
        scores = []
        for answer in (one.answer, one.wrong, "None"):
            names = {}
            exec(f"{one.prompt} {answer}", names)
            try:
                scores.append(all(eval(test, names) for test in one.tests))
            except Exception:
                scores.append(False)
        assert scores == [True, False, False], one.name
        assert all(test.startswith(f"{one.name}(") for test in one.tests)


def test_the_facts_of_other_kinds_are_right():
    for item in ITEMS["arithmetic"]:
        formula, numbers = item["prompt"].removesuffix("="), [int(n) for n in item["prompt"].split() if n.isdigit()]
        assert int(item["answer"]) == (eval(formula) if item["prompt"].endswith("=") else numbers[0] * numbers[1])
    assert all(item["answer"] in item["prompt"] for item in ITEMS["extraction"])
    for item in ITEMS["extraction"]:
        text, question, _ = item["prompt"].split("\n")
        most = re.fullmatch("Question: (Which city was|Who paid) the (warm|cold|mo|lea)(e?)st\\?", question)
        pairs = re.findall(r"(\d+) degrees in (\w+)|(\w+) paid (\d+)", text)
        ordered = sorted((int(pair[0] or pair[3]), pair[1] or pair[2]) for pair in pairs)
        assert not most or item["answer"] == ordered[-1 if most[2] in ("warm", "mo") else 0][1]
    for item in ITEMS["copying"]:
        what, text = item["prompt"].removesuffix("\nResult:").split(": ", 1)
        items = text.split(", ")
        assert item["answer"] == {
            "Copy": text, "Reverse": ", ".join(reversed(items)), "In capitals": text.upper(),
        }.get(what, ", ".join(one for one in items if one != what.removeprefix("Leave out ")))  # fmt: skip


def test_answers_are_judged_by_their_first_line():
    for item in LINES:
        gold = item["answer"]
        assert judged(item, f" {gold}") == judged(item, f" {gold}\n\nQuestion: Is it?\nAnswer: yes") == 1
        for wrong in ("", gold[:-1] + "#", f"{gold} or so", f"The answer is {gold}", f"\n{gold}"):
            assert judged(item, wrong) == 0
    title = next(item for item in ITEMS["extraction"] if item["answer"] in make.TITLES)
    assert judged(title, f' "{title["answer"]}".') == 1


@pytest.mark.parametrize(
    ("answer", "passed"),
    [(" number % 2 == 1", 1), (" number % 2 == 1\n\n\ndef is_even(", 1), (" number % 2 == 1\nThis is right.", 1),
     (" number % 2 == 0", 0), (" number % 2 == 1 is right", 0), ("", 0)],
)  # fmt: skip
def test_functions_are_judged_by_what_they_return(answer, passed):
    assert judged(next(item for item in ITEMS["functions"] if item["id"] == "is_odd"), answer) == passed


SAFE = "def f(x):\n    return x + 1\n"


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary folders are made, in a test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


HARMFUL = (
    ["while True: pass", "import time\ntime.sleep(60)", "x = [0] * 10**10", "x = []\nwhile True: x.append(' ' * 10**7)",
     "import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit", "def f(x): return x +", "input()",
     "f = lambda x: f(x)", "import ctypes\nctypes.string_at(0)", "import typing_extensions",
     "import os\nos.environ['HOME']", "open('left', 'wb', 0).write(b'text')", "x = bytearray(10**9)", "f = lambda x: x",
     "import os\nos.write(1, b'+' * 99)\nos._exit(0)", "while True: print('x' * 10**6)"]
)  # fmt: skip


def test_code_that_does_not_pass_harms_nobody(scratch):
    for code in HARMFUL:
        before = time.monotonic()
        patience = 1.0 if "sleep" in code else judging.PATIENCE
        assert not judging.passes(f"{SAFE}{code}\n", ["f(1) == 2"], seconds=1, patience=patience), code
        assert time.monotonic() - before < judging.PATIENCE, code
        assert not list(scratch.iterdir()), code
    assert judging.passes(SAFE, ["f(1) == 2"])


def test_what_is_printed_or_left_behind_changes_nothing(scratch):
    code = "import os, sys\nopen('empty', 'w')\nprint('+', 'x' * 10**6)\nprint('x', file=sys.stderr)\n"
    here = f"os.path.dirname(os.getcwd()) == {str(scratch)!r}"
    assert judging.passes(SAFE + code, ["f(1) == 2", "f(2) == 3", here])
    assert not judging.passes(SAFE + code, ["f(1) == 2", "f(2) == 2"])
    assert not list(scratch.iterdir())


def test_processes_that_code_begins_end_with_it(tmp_path):
    there = tmp_path / "there"
    code = f"import os, time\nif os.fork() == 0:\n    os.mkdir({str(there)!r} + str(os.getpid()))\n    time.sleep(60)\n"
    judging.passes(SAFE + code, ["f(1) == 2"], patience=1.0)
    for folder in tmp_path.iterdir():  # none, where the user may begin no process
        pid = int(folder.name.removeprefix("there"))
        for _ in range(100):
            state = Path(f"/proc/{pid}/stat")
            if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"process {pid} is still there")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny ensemble, saved."""
    here = tmp_path_factory.mktemp("tiny")
    members = [str(tiny.save(here / name, "llama", seed)) for seed, name in enumerate("ab")]
    Ensemble.from_pretrained(members, "prob-mean", weights=[0.3, 0.7]).save_pretrained(here / "saved")
    return here


def test_the_harness_runs_the_group(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from softmeet.evaluation.harness import EnsembleLM

        options = {
            "model": EnsembleLM(str(folder / "saved"), device="cpu", batch_size=2), "tasks": ["softmeet_tasks"],
            "limit": 2, "bootstrap_iters": 0,
            "task_manager": TaskManager(include_path=str(generation.TASKS), include_defaults=False),
        }  # fmt: skip
        with pytest.raises(ValueError, match="unsafe"):
            simple_evaluate(**options)
        found = simple_evaluate(**options, confirm_run_unsafe_code=True)
    assert found["results"]["softmeet_tasks"]["passed,none"] == 0
    for kind in generation.KINDS:
        samples = sorted(found["samples"][f"softmeet_{kind}"], key=lambda sample: sample["doc_id"])
        assert [sample["doc"]["id"] for sample in samples] == [item["id"] for item in ITEMS[kind][:2]]
        for sample, item in zip(samples, ITEMS[kind], strict=False):
            prompt, settings = sample["arguments"][0]
            assert prompt.endswith(f"\n{item['prompt']}")
            assert settings["max_gen_toks"] == 48
            assert settings["until"][0] == "\n"
            assert not settings["do_sample"]
            assert sample["passed"] == judged(item, sample["resps"][0][0])


def test_examples_in_prompts_are_right():
    shown = {kind: yaml.safe_load(_plain(f"softmeet_{kind}.yaml"))["doc_to_text"] for kind in generation.KINDS}
    names = {}
    exec(shown["functions"].removesuffix("{{prompt}}"), names)
    assert names["last_item"]([1, 2]) == names["count_spaces"]("a b c") == 2
    for line in shown["arithmetic"].splitlines()[:-1]:
        left, equals, right = line.partition(" = ")
        assert not equals or eval(left) == int(right)
    prompts = [item["prompt"].splitlines()[0] for items in ITEMS.values() for item in items]
    assert not [prompt for prompt in prompts if any(prompt in text for text in shown.values())]


def _plain(name):
    return (generation.TASKS / name).read_text().replace("!function ", "")


class Scripted:
    """A model of the harness that gives the right answer to every second question."""

    rank, world_size, tokenizer_name = 0, 1, ""

    def __new__(cls):
        from lm_eval.api.model import LM

        return type("Scripted", (LM,), {name: value for name, value in vars(cls).items() if name[0] != "_"})()

    def generate_until(self, requests, disable_tqdm=False):
        return [request.doc["answer"] if k % 2 else "" for k, request in enumerate(requests)]

    def loglikelihood(self, requests):
        raise AssertionError

    loglikelihood_rolling = loglikelihood


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_notes_answers_and_time():
    found = generation.asked(Scripted(), "copying", 5)
    assert found["ids"] == [ITEMS["copying"][k]["id"] for k in (0, 10, 20, 30, 40)]
    assert found["passed"] == [0, 1, 0, 1, 0]
    assert found["answers"][1] == ITEMS["copying"][10]["answer"]
    assert found["seconds"] >= 0


def test_figures_are_of_the_best_member_and_all_kinds():
    def found(scores):
        own = {"ids": list("pqrs"), "answers": [], "passed": scores, "seconds": 8.0}
        return dict.fromkeys(generation.KINDS, own)

    every = [generation.Subject(name, [name]) for name in "ab"] + [generation.Subject("a + b", ["a", "b"], "x")]
    scores = {"a": [1.0, 0, 0, 0], "b": [1.0, 1, 0, 0], "a + b": [1.0, 1, 1, 0]}
    rows = generation.figures(every, {name: found(own) for name, own in scores.items()})
    assert [row["rates"]["all"].mean for row in rows] == [0.25, 0.5, 0.75]
    assert rows[2]["best"] == "b"
    assert rows[2]["difference"]["all"].mean == rows[2]["difference"]["copying"].mean == 0.25
    assert [row["seconds"] for row in rows] == [2.0] * 3
    assert "best" not in generation.figures(every, {name: found(scores[name]) for name in ("a", "a + b")})[1]


def test_intervals_of_paired_differences_hold_the_truth():
    """Of 1,000 samples of pairs that depend on each other, as right answers to hard and easy questions do."""
    generator, truth, held = torch.Generator().manual_seed(1), 0.1, 0
    for _ in range(1000):
        ease = torch.rand(60, generator=generator, dtype=torch.float64) * 0.9
        draws = torch.rand(2, 60, generator=generator, dtype=torch.float64)
        found = generation.difference((draws[0] < ease + truth).double().tolist(), (draws[1] < ease).double().tolist())
        assert found.low <= found.mean <= found.high
        held += found.low <= truth <= found.high
    assert 0.93 < held / 1000 < 0.98
    same = generation.difference([1.0] * 50, [1.0] * 50)
    assert same.low < 0 < same.high
    assert generation.rate([1.0, 0.0, 0.0, 0.0]).low == pytest.approx(0.0456, abs=1e-4)
