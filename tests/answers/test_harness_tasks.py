"""Tasks of the lm-evaluation-harness, asked, and what it has written, against the harness's own figures."""

from __future__ import annotations

import json
import random
import warnings

import pytest
import tiny
import torch
from commands import facts_of, process, ran, refusal, run

pytest.importorskip("lm_eval")

from softmeet import Ensemble
from softmeet.answers import rates
from softmeet.answers.questions import spread
from softmeet.answers.samples import answered, choose_by, compare
from softmeet.errors import InvalidInputError

pytestmark = pytest.mark.slow

WORDS = ["fox", "dog", "king", "cat", "sun", "moon", "sea", "tree", "word", "hand", "road", "song"]
CHOICES = ["dog", "over", "cat", "lazy", "sun", "jump"]
FILTERS = [
    {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
    for name, pattern in (("first", "([a-zA-Z])"), ("last", "([a-zA-Z])[^a-zA-Z]*$"))
]
METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
               "metric_list": METRICS},
    "text": {"output_type": "generate_until", "doc_to_target": "{{letter}}", "filter_list": FILTERS,
             "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False},
             "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]},
    "drawn": {"output_type": "generate_until", "doc_to_target": "{{letter}}",
              "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": True, "temperature": 1.0},
              "metric_list": [{"metric": "exact_match"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}",
                "metric_list": [{"metric": "byte_perplexity"}]},
    "unsafe": {"output_type": "generate_until", "doc_to_target": "{{letter}}", "unsafe_code": True,
               "metric_list": [{"metric": "exact_match"}]},
    "bare": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
             "metric_list": METRICS, "num_fewshot": 0},
    "gone": {"output_type": "generate_until", "doc_to_target": "{{letter}}", "metric_list": METRICS,
             "dataset_kwargs": {"data_files": {"test": "nowhere.json"}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, folders):
    """Right letters are those that the one member writes first, or the other last, so that not all are wrong."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(24)
    questions = [f"The {word}" for word in WORDS]
    told = [
        Ensemble.from_pretrained([name], "logit-mean").generate(questions, max_new_tokens=5, do_sample=False)
        for name in folders
    ]
    letters = [(own[0], other.strip()[-1])[k % 3 == 0] for k, (own, other) in enumerate(zip(*told, strict=True))]
    docs = [
        {"question": question, "choices": draw.sample(CHOICES, 4), "answer": draw.randrange(4), "letter": letter}
        for question, letter in zip(questions, letters, strict=True)
    ]
    (folder / "data.json").write_text("\n".join(map(json.dumps, docs)))
    for name, settings in TASKS.items():
        shared = {
            "task": f"own_{name}", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}",
            "dataset_kwargs": {"data_files": {"test": str(folder / "data.json")}, "cache_dir": str(folder / "cache")},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(shared | settings))
    for name, other in (("both", "own_text"), ("two", "own_drawn")):
        (folder / f"{name}.yaml").write_text(json.dumps({"group": f"own_{name}", "task": ["own_choice", other]}))
    return folder


def by_harness(member, tasks, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from softmeet.evaluation.harness import harness_model

        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        model = harness_model(Ensemble.from_pretrained([member], "logit-mean"), batch_size=5)
        return simple_evaluate(model=model, tasks=[name], task_manager=manager, bootstrap_iters=0)


@pytest.fixture(scope="module")
def harness(folders, tasks):
    """The harness's own results of each member."""
    return [by_harness(member, tasks, "own_both") for member in folders]


@pytest.fixture(scope="module")
def saved(harness, tmp_path_factory):
    """What lm_eval --log_samples --output_path writes for them."""
    import copy

    from lm_eval.loggers import EvaluationTracker

    out = tmp_path_factory.mktemp("out")
    for name, found in zip(("org/one", "org/two"), copy.deepcopy(harness), strict=True):
        tracker = EvaluationTracker(output_path=str(out))
        tracker.general_config_tracker.log_experiment_args("hf", f"pretrained={name}", None, None, False)
        samples = found.pop("samples")
        tracker.save_results_aggregated(found, samples)
        for task, own in samples.items():
            tracker.save_results_samples(task, own)
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("task", "more", "metric"),
    [
        ("choice", (), "acc_norm,none"), ("text", (), "exact_match,first"),
        ("text", ("--metric", "exact_match,last"), "exact_match,last"),
    ],
)  # fmt: skip
def test_shares_are_the_harnesss(task, more, metric, folders, tasks, harness):
    asked = [tasks, "--task", f"own_{task}", *tiny.each("-m", folders), "-e", "both=gpt2 llama prob-mean", *more]
    facts = facts_of("answer", *asked, "--batch", "5")
    assert [row["name"].rpartition("/")[2] for row in facts["rows"]] == ["gpt2", "llama", "both", "any member"]
    expected = [found["results"][f"own_{task}"][metric] for found in harness]
    assert [row["right"] for row in facts["rows"][:2]] == pytest.approx(expected)
    assert facts["metrics"] == {f"own_{task}": metric}
    assert all(row["seconds"] > 0 and row["tokens"] > 0 for row in facts["rows"][:3])
    assert any(0 < share < 1 for share in expected)


@pytest.mark.filterwarnings("ignore")
def test_a_cut_file_is_gone_on_with_and_draws_are_the_same(folders, tasks, tmp_path):
    asked = ["answer", tasks, "--task", "own_two", *tiny.each("-m", folders[:1]), "--batch", "5", "--count", "1"]
    asked += ["--limit", "16", "--resume", tmp_path / "kept", "--answers"]
    torch.manual_seed(1)
    first = ran(*asked, tmp_path / "a.jsonl")
    assert "2 tasks, by acc_norm,none, exact_match,none" in first.stdout
    assert "%|" not in first.stderr
    (kept,) = (tmp_path / "kept").iterdir()
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 17
    kept.write_text("".join(lines[:8]) + lines[8][:9])
    torch.manual_seed(2)
    ran(*asked, tmp_path / "b.jsonl")
    assert len(kept.read_text().splitlines()) == 1 + 7 + 11
    told = [[json.loads(line) | {"seconds": 0} for line in (tmp_path / f"{x}.jsonl").open()] for x in "ab"]
    assert told[0] == told[1]
    assert len({one["id"] for one in told[0]}) == 16
    ran(*asked, tmp_path / "c.jsonl", "--seed", "5")
    scores = [[json.loads(line)["scores"] for line in (tmp_path / f"{x}.jsonl").open()] for x in "ac"]
    assert scores[0] != scores[1]


@pytest.mark.filterwarnings("ignore")
def test_answers_that_are_kept_are_right_by_their_metric(folders, tasks, tmp_path):
    asked = [tasks, "--task", "own_choice", *tiny.each("-m", folders[:1]), "--resume", tmp_path]
    shares = [
        facts_of("answer", *asked, "--metric", metric)["rows"][0]["right"] for metric in ("acc", "acc_norm", "acc")
    ]
    assert shares[0] == shares[2] != shares[1]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.filterwarnings("ignore")
def test_what_lm_eval_wrote_gives_the_table_of_asking(folders, tasks, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "_FEWEST", 2)
    for metric in ((), ("--metric", "acc")):
        named = "own_choice" if metric else "own_both"
        live = facts_of("answer", tasks, "--task", named, *tiny.each("-m", folders), *metric, "--batch", "5")
        paths = [next(saved.glob(f"*{x}/samples_own_choice_*")) for x in ("one", "two")] if metric else [saved]
        read = facts_of(
            "answer", *tiny.each("--from-lm-eval", paths), *metric, "--answers", tmp_path / f"{len(metric)}.jsonl"
        )
        names = dict(zip((row["name"] for row in live["rows"]), ["org__one", "org__two", "any member"], strict=True))
        assert read["best_member"] == names[live["best_member"]]
        for own, theirs in zip(read["rows"], live["rows"], strict=True):
            other = {key: value for key, value in theirs.items() if key not in ("name", "seconds", "tokens", "doubt")}
            assert {key: value for key, value in own.items() if key not in ("name", "doubt")} == other
            if metric and own["name"] != "any member":
                assert own["doubt"]["entropy"]["auroc"] == pytest.approx(theirs["doubt"]["entropy"]["auroc"])
    assert run("answer", "--from-lm-eval", saved).stdout.count("s a question") == 0


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_models_are_paired_by_question_and_the_newest_file_counts(saved, tmp_path):
    for folder in sorted(saved.iterdir()):
        (tmp_path / folder.name).mkdir()
        (file,) = folder.glob("samples_own_choice_*")
        own = lines_of(file)
        if folder.name.endswith("two"):
            own = own[2:] + own[:1]
        newer = tmp_path / folder.name / "samples_own_choice_2999-01-01T00-00-00.jsonl"
        newer.write_text("\n".join(map(json.dumps, own)))
        (tmp_path / folder.name / "samples_own_choice_2001-01-01T00-00-00.5.jsonl").write_text("{}")
    found = compare([tmp_path])
    assert (list(found.answers), found.left_out, found.reworded) == (["org__one", "org__two"], 1, 0)
    for told in found.answers.values():
        assert [one.id for one in told] == [f"own_choice/{k}" for k in (0, *range(2, 12))]
    assert len(compare([tmp_path], limit=4).answers["org__one"]) == 4
    said = run("answer", "--from-lm-eval", tmp_path)
    assert "questions that not all were asked are left out: 1" in said.stderr
    for of, refused in (("prompt_hash", False), ("doc_hash", True)):
        newer.write_text("\n".join(json.dumps(one | {of: "other"}) for one in own))
        if refused:
            with pytest.raises(InvalidInputError, match="one question with the id own_choice/0"):
                compare([tmp_path])
        else:
            assert compare([tmp_path]).reworded == 11
    newer.write_text(json.dumps(own[0]) + "\nno json")
    with pytest.raises(InvalidInputError, match=r"line 2 of .*2999"):
        compare([tmp_path])
    newer.write_text(json.dumps(own[0] | {"doc_id": 99}))
    with pytest.raises(InvalidInputError, match="but there are none"):
        compare([tmp_path])
    with pytest.raises(InvalidInputError, match="which is not there"):
        compare([tmp_path / "x"])


def test_samples_are_answers_by_the_metric_that_is_named_or_the_usual_one():
    responses = [(-1.5, False), (-0.5, True), (-2.0, False)]
    one = {"doc_id": 3, "filter": "none", "metrics": ["f1", "acc", "acc_norm", "share"], "filtered_resps": responses,
           "f1": (1, 1), "acc": 1.0, "acc_norm": 0.0, "share": 0.5}  # fmt: skip
    assert choose_by("t", [one], None) == ("acc_norm", "none")
    assert choose_by("t", [one | {"acc_norm": 0.5}], None) == ("acc", "none")
    assert choose_by("t", [one | {"metrics": ["share", "own"], "own": True}], None) == ("own", "none")
    for name in ("f1", "share", "gone", "acc,other"):
        with pytest.raises(InvalidInputError, match=rf"acc,none, acc_norm,none, got {name}; .*f1,none, share,none"):
            choose_by("t", [one], name)
    found = answered("t", one, ("acc", "none"))
    assert (found.id, found.answer, found.right, found.scores) == ("t/3", "B", True, (-1.5, -0.5, -2.0))
    assert found.doubt is not None
    in_file = one | {"filtered_resps": [[str(x), str(y)] for x, y in responses]}
    assert answered("t", in_file, ("acc", "none")) == found
    mutual = one | {"metrics": ["acc", "acc_mutual_info"], "filtered_resps": responses[:2] + responses[:2]}
    assert answered("t", mutual, ("acc", "none")).scores == (-1.5, -0.5)
    assert answered("t", one | {"filtered_resps": responses * 9}, ("acc", "none")).answer == "1"
    written = answered("t", one | {"filtered_resps": ["so 12"]}, ("acc_norm", "none"))
    assert (written.answer, written.right, written.scores, written.doubt) == ("so 12", False, (), None)
    whole = answered("t", one | {"filtered_resps": [(-3.0, True)]}, ("acc", "none"))
    assert (whole.answer, whole.scores, whole.doubt) == ("True", (-3.0,), None)


def test_no_question_is_taken_twice():
    assert [spread(range(4), limit) for limit in (None, 2, 4, 9)] == [
        [0, 1, 2, 3], [0, 2], [0, 1, 2, 3], [0, 1, 2, 3],
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "expected one task in"),
        (("--task", "own_chioce"), "unknown task 'own_chioce' in"),
        (("--task", "own_chioce"), "did you mean own_choice?"),
        (("--task", "own_gone"), "the task own_gone cannot be loaded"),
        (("--task", "own_choice", "--metric", "exact_match"), "acc,none, acc_norm,none, got exact_match"),
        (("--task", "own_text", "--metric", "exact_match,third"), "exact_match,last, got exact_match,third"),
        (("--task", "own_rolling"), "softmeet evaluate measures those"),
        (("--task", "own_unsafe"), "allow that by --run-code"),
        (("--task", "own_bare", "--count", "2"), "leave --count 2 out"),
        (("--task", "own_choice", "--how", "letter"), "--how does not go with a task"),
        (("--task", "own_choice", "--shots", "x.jsonl"), "--shots does not go with a task"),
        (("--task", "own_choice", "--votes", "3"), "--votes does not go with a task"),
        (("--task", "own_choice", "--chat"), "no chat template: leave --chat out"),
        (("--task", "own_choice", "-e", "u=gpt2 llama prob-mean vocabulary=union"), "and u gives none"),
        (("--task", "own_choice", "--from-lm-eval", "x"), "-m does not go with --from-lm-eval"),
    ],
)
def test_wrong_tasks_are_refused_before_anything_is_loaded(more, message, folders, tasks, monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", None)
    assert message in refusal("answer", tasks, *tiny.each("-m", folders), *more)


@pytest.mark.filterwarnings("ignore")
def test_chat_tells_all_members_by_one_template(folders, tasks, tmp_path):
    from transformers import AutoTokenizer

    names = []
    for k, folder in enumerate([*folders, folders[1]]):
        own = AutoTokenizer.from_pretrained(folder)
        own.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}" + "!" * (k == 2)
        names.append(str(tmp_path / str(k)))
        own.save_pretrained(names[-1])
        tiny.build(("gpt2", "llama", "llama")[k], seed=min(k, 1)).save_pretrained(names[-1])
    asked = [tasks, "--task", "own_choice", "--chat", *tiny.each("-m", names[:2]), "-e", "0 1 prob-mean"]
    told = facts_of("answer", *asked)
    assert [row["tokens"] for row in told["rows"][:3]] != [
        row["tokens"] for row in facts_of("answer", *[one for one in asked if one != "--chat"])["rows"][:3]
    ]
    assert "different chat templates" in refusal(
        "answer", tasks, "--task", "own_choice", "--chat", *tiny.each("-m", names), "-e", "0 2 prob-mean"
    )


def test_wrong_flags_are_refused_before_torch_is_imported(tmp_path):
    asked = [("--task", "t", "--how", "letter"), ("--from-lm-eval", tmp_path, "-m", "x"), (tmp_path, "--votes", 2)]
    program = (
        "import sys\nfrom softmeet.cli import main\n"
        f"for more in {[list(map(str, more)) for more in asked]}:\n"
        "    sys.argv[1:] = ['answer', *more]\n"
        "    try: main.main()\n"
        "    except SystemExit: print('torch' in sys.modules, 'lm_eval' in sys.modules)"
    )
    done = process(program=("-c", program))
    assert done.stderr.count("does not go with") == 3, done.stderr
    assert done.stdout.split() == ["False", "False"] * 3
