"""``softmeet answer``: likelihoods as the lm-evaluation-harness has them, tables, resumption and refusals."""

from __future__ import annotations

import json
import shutil

import byte_members
import pytest
import tiny
import torch
from commands import facts_of, ran, refusal

from softmeet import Ensemble
from softmeet.answers.asking import Answered, Asker, Writing, _is_right, ask_all, text_likelihoods
from softmeet.answers.questions import Form, Question, read_questions, require_fit, usual
from softmeet.answers.results import figures
from softmeet.answers.room import Kept, majority, said
from softmeet.answers.subjects import subjects
from softmeet.errors import InvalidInputError, TraceError

CHOICES = [
    {"id": f"q{k}", "question": f"What does the {name} do?", "choices": ["the dog", "a fox jumps", "over", "lazy"],
     "answer": "ABCD"[k % 4], "subject": "even" if k % 2 else "odd"}
    for k, name in enumerate(("fox", "dog", "king", "cat", "sun", "moon"))
]  # fmt: skip
OPEN = [
    {"id": k, "question": f"{k} and {k}?", "answer": str(2 * k), "solution": f"{k}+{k}=#### {2 * k}"} for k in (1, 2, 3)
]


@pytest.fixture(scope="module")
def over_bytes(tmp_path_factory):
    return list(map(str, byte_members.save_two(tmp_path_factory.mktemp("bytes"))))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for name, rows in (("choices", CHOICES), ("open", OPEN)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("members", ["folders", "over_bytes"])
def test_likelihoods_of_options_are_the_harnesss(members, beside, request, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from softmeet.evaluation.harness import harness_model

    names = request.getfixturevalue(members)
    (tmp_path / "a.txt").write_text("the fox jumps over the lazy dog and the fox jumps. " * 3)
    names = [*names, f"files:{tmp_path}"] if beside else names
    ensemble = Ensemble.from_pretrained(names, "logit-mean", dtype=torch.float64)
    prompt, options = "Question: the dog\nAnswer: ", ["the fox jumps", "fox", " over the lazy dog", "q"]
    asked = [Instance("loglikelihood", {}, (prompt, option), k) for k, option in enumerate(options)]
    expected = [value for value, _ in harness_model(ensemble).loglikelihood(asked, disable_tqdm=True)]
    found = text_likelihoods(ensemble, prompt, options)
    assert [one.log_prob for one in found] == pytest.approx(expected, abs=1e-4)
    held = [reader.bytes for reader in ensemble.model.readers_of_members]
    text_likelihoods(ensemble, prompt, options)
    assert [reader.bytes for reader in ensemble.model.readers_of_members] == held


@pytest.mark.parametrize("how", ["option-byte", "option-unconditional"])
def test_where_no_option_has_a_probability_none_is_chosen(folders, files, tmp_path, how):
    ruled = f"cut={folders[0]} {folders[1]} logit-mean:plausibility=1"
    out = tmp_path / "a.jsonl"
    ran(
        "answer", files / "choices.jsonl", *(x for m in folders for x in ("-m", m)), "-e", ruled, "--how", how,
        "--answers", out, "--json", tmp_path / "a.json",
    )  # fmt: skip
    told = [json.loads(line, parse_constant=pytest.fail) for line in out.read_text().splitlines()]
    mine = [(one["answer"], one["right"], one["doubt"]) for one in told if one["name"] == "cut"]
    assert mine == [("", False, None)] * len(CHOICES)


@torch.inference_mode()
def naive(ensemble, prompt, option):
    """The log-probability of an option behind a prompt by one call of ``forward``, to which the prompt is given."""
    model = ensemble.model
    before, whole = (list(ensemble.tokenizer(text, verbose=False)["input_ids"]) for text in (prompt, prompt + option))
    told = model(input_ids=torch.tensor([whole]), given=len(before)).logits[0, len(before) - 1 : -1].double()
    return told.gather(-1, torch.tensor(whole[len(before) :])[:, None]).sum().item()


@pytest.mark.parametrize("members", ["folders", "over_bytes"])
def test_files_stand_beside_everybody_in_rows_of_their_own(members, files, tmp_path, request):
    names, project, out = request.getfixturevalue(members), tmp_path / "project", tmp_path / "a.jsonl"
    project.mkdir()
    (project / "a.txt").write_text("Question: What does the fox do?\nAnswer: a fox jumps over the dog\n" * 3)
    lines, beside = [x for m in names for x in ("-m", m)], f"files:{project}"
    ran(
        "answer", files / "choices.jsonl", *lines, "-m", beside, "-e", f"both={' '.join(names)} prob-mean",
        "-e", f"one={names[0]} {beside}+weight=0.5 logit-mean", "--how", "option", "--answers", out,
        "--json", tmp_path / "a.json",
    )  # fmt: skip
    told = {(one["name"], one["id"]): one["scores"] for one in map(json.loads, out.read_text().splitlines())}
    rows = dict.fromkeys(name for name, _ in told)
    first, more = (f"{one.name}" for one in (subjects(names, [])[0], subjects([names[0], beside], [])[1]))
    assert list(rows) == [*rows][:2] + ["both", "one"] + [f"{name} + files:project" for name in [*rows][:2]] + [
        "both + files:project"
    ]
    asked = read_questions(files / "choices.jsonl")[0]
    prompt, options = Form("option").prompt(asked), Form("option").options(asked)
    for name, rule, loaded in (
        ("both + files:project", "prob-mean", [*names, beside]), (more, "logit-mean", [names[0], beside]),
        ("one", "logit-mean", [names[0], f"{beside}+weight=0.5"]), (first, "logit-mean", [names[0]]),
    ):  # fmt: skip
        ensemble = Ensemble.from_pretrained(loaded, rule)
        expected = [naive(ensemble, prompt, option) for option in options]
        assert told[name, asked.id] == pytest.approx(expected, abs=1e-4), name
    assert told[more, asked.id] != pytest.approx(told[first, asked.id], abs=0.5)
    run_facts = json.loads((tmp_path / "a.json").read_text())["run"]
    assert run_facts["files"] == [f"{beside}+weight=0.5", beside]


def test_prompts_have_examples_of_their_subject_first_and_never_the_question_itself():
    questions = [
        Question(one["id"], one["question"], (one["answer"],), tuple(one["choices"]), "", one["subject"])
        for one in CHOICES
    ]
    prompt = Form("letter", questions, 2).prompt(questions[0])
    parts = prompt.split("\n\n")
    assert [part.split("\n")[0] for part in parts] == [f"Question: {questions[k].question}" for k in (2, 4, 0)]
    assert parts[0].endswith("A. the dog\nB. a fox jumps\nC. over\nD. lazy\nAnswer: C")
    assert parts[-1].endswith("Answer:")
    assert Form("letter").options(questions[0]) == [" A", " B", " C", " D"]
    assert Form("option").options(questions[0])[1] == " a fox jumps"
    assert "A. the dog" not in Form("option-byte", questions, 1).prompt(questions[0])


def test_questions_say_what_is_wrong_with_them(tmp_path):
    for line, message in (
        ('{"id": 1, "question": "a"}', "line 2 .* KeyError"), ("no json", "line 2"),
        ('{"id": 0, "question": "a", "answer": "b"}', "'0' again in line 2"),
        ('{"id": 1, "question": "a", "choices": ["x", "y"], "answer": "C"}', "no letter of 2 choices"),
        ('{"id": 1, "question": "a", "choices": "xy", "answer": "A"}', "no list of two texts"),
        ('{"id": 1, "question": "a", "choices": ["x", ""], "answer": "A"}', "no list of two texts"),
        ('{"id": 1, "question": " ", "answer": "A"}', "is empty"),
        ('{"id": 1, "question": "a", "answer": []}', "is empty"),
    ):  # fmt: skip
        (tmp_path / "q.jsonl").write_text('{"id": 0, "question": "a", "answer": "b"}\n' + line)
        with pytest.raises(InvalidInputError, match=message):
            read_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(InvalidInputError, match="is empty"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(InvalidInputError, match="need questions with choices, and 1 has none"):
        require_fit([Question("1", "a", ("b",))], "letter")
    assert [usual([Question("1", "a", (x,), y)]) for x, y in (("A", ("x",)), ("12", ()), ("12 km", ()))] == [
        "option-byte", "number", "match",
    ]  # fmt: skip


def test_ensembles_are_named_by_the_last_parts_of_members():
    found = subjects(["org/a", "/b/c.gguf"], ["pair=a c logit-mean:weights=0.3/0.7 vocabulary=union", "a c prob-mean"])
    assert [one.name for one in found] == ["org/a", "b/c.gguf", "pair", "a + c.gguf, prob-mean"]
    assert (found[2].members, found[2].loading) == (("org/a", "/b/c.gguf"), {"vocabulary": "union"})
    lines = ["a.gguf+engine=transformers+dtype=bfloat16", "b"]
    assert [one.name for one in subjects(lines, [f"pair={lines[0]} b prob-mean"])] == ["a.gguf", "b", "pair"]
    for given, message in (
        ("x y norule", "expected members and then a rule"),
        ("same x prob-mean", "which may be"),
        ("wide/gpt2", "members and a rule, or a saved"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            subjects(["x", "y", "a/same", "b/same"], [given])
    assert [one.name for one in subjects(["mixed"], [], ["wide/neox"])] == [
        "mixed/gpt2", "mixed/llama", "instead: wide/neox",
    ]  # fmt: skip
    with pytest.raises(InvalidInputError, match="'p' twice"):
        subjects([], ["p=x y prob-mean", "p=x y logit-mean"])


def test_the_table_the_answers_and_the_way_on(folders, files, tmp_path):
    asked = ["answer", files / "choices.jsonl", *tiny.each("-m", folders), "-e", "both=gpt2 llama prob-mean"]
    asked += ["--batch", "4", "--resume", tmp_path / "kept"]
    first = ran(*asked, "--json", tmp_path / "a.json", "--answers", tmp_path / "a.jsonl")
    facts = json.loads((tmp_path / "a.json").read_text())
    names = ["/".join(name.split("/")[-2:]) for name in folders]
    assert [row["name"] for row in facts["rows"]] == [*names, "both", "any member"]
    assert facts["best_member"] in names
    assert [("against" in row) for row in facts["rows"]] == [
        row["name"] != facts["best_member"] for row in facts["rows"]
    ]
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(answers) == 3 * len(CHOICES)
    for row in facts["rows"][:-1]:
        own = [one["right"] for one in answers if one["name"] == row["name"]]
        assert row["right"] == pytest.approx(sum(own) / len(own))
        assert row["seconds"] > 0
    assert "McNemar" in first.stdout
    for kept in (tmp_path / "kept").iterdir():
        lines = kept.read_text().splitlines(keepends=True)
        kept.write_text("".join(lines[:6]) + lines[6][:10])  # as a kill in the middle of a line leaves it
    ran(*asked, "--answers", tmp_path / "b.jsonl")
    strip = [{key: x for key, x in one.items() if key != "seconds"} for one in answers]
    others = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [{key: x for key, x in one.items() if key != "seconds"} for one in others] == strip


def test_written_answers_end_where_the_next_question_would_begin(folders):
    ensemble = Ensemble.from_pretrained(folders, "logit-mean")
    asker = Asker(ensemble, Form("match"), Writing(tokens=12, batch=1))
    (one,) = asker.ask([Question("1", "the quick brown", ("fox",))], 0)
    assert "\n" not in one.answer
    right = ensemble.generate(Form("match").prompt(Question("1", "the quick brown", ("fox",))), max_new_tokens=12,
                              do_sample=False).partition("\n")[0]  # fmt: skip
    assert one.answer == right


def test_a_model_in_place_of_all_is_neither_the_best_member_nor_any(folders):
    who = subjects([folders[0]], ["both=" + " ".join([*folders, "prob-mean"])], [folders[1]])
    right = {"gpt2": (True, False), "llama": (False, False), "both": (True, True), "instead": (True, True)}
    told = {
        one.name: [
            Answered(str(k), "x", own, 1.0, 1) for k, own in enumerate(right[one.name.split(":")[0].split("/")[-1]])
        ]
        for one in who
    }
    facts = figures([one.name for one in who if one.is_member], told)
    assert facts["best_member"] == who[0].name
    assert facts["rows"][-1]["right"] == 0.5
    assert [row["name"] for row in facts["rows"]][3].startswith("instead: ")


def test_a_question_that_is_too_long_is_named(folders):
    ensemble = Ensemble.from_pretrained(folders, "logit-mean")
    long = Question("the long one", "the dog " * 5000, ("A",), ("a", "b"))
    with pytest.raises(InvalidInputError, match="the question the long one"):
        Asker(ensemble, Form("option"), Writing()).ask([long], 0)


def test_only_batches_that_are_not_whole_are_asked_again(tmp_path):
    questions = [Question(str(k), "a", ("b",)) for k in range(5)]
    kept = Kept(tmp_path, {"a": 1})
    kept.keep([Answered(str(k), "x", True, 0.1, 1) for k in range(3)])
    asked = []

    class Told:
        def ask(self, batch, number):
            asked.append(([one.id for one in batch], number))
            return [Answered(one.id, "y", False, 0.1, 1) for one in batch]

    known = Kept(tmp_path, {"a": 1})
    found = ask_all(Told, questions, 2, known.answers, known.keep)
    assert asked == [(["2", "3"], 1), (["4"], 2)]
    assert [one.answer for one in found] == ["x", "x", "y", "y", "y"]
    assert Kept(tmp_path, {"a": 2}).answers == {}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_told_with_what_to_do(tmp_path, full_disk):
    with pytest.raises(TraceError, match=r"no room on the disk for .*jsonl: .* make room"):
        Kept(tmp_path, {"a": 1}).keep([Answered("0", "x", True, 0.1, 1)])


def test_answers_are_kept_whatever_is_in_them_and_damaged_ones_are_asked_again(tmp_path):
    told = [Answered(str(k), f"a{end}b", True) for k, end in enumerate("\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\n")]
    Kept(tmp_path, {}).keep(told)
    before = [*Kept(tmp_path, {}).answers.values()]
    (file,) = (one for one in tmp_path.iterdir() if one.suffix == ".jsonl")
    with file.open("a") as out:
        out.write('damaged\n{"id": "x"}\n{"id": "y", "answer": "", "right": null}\n' + "[" * 200_000 + '\n{"cut')
    with file.open("ab") as out:
        out.write(b" off: \xff\n\xff")
    assert before == told == [*Kept(tmp_path, {}).answers.values()]
    assert file.read_bytes().endswith(b"off: \xff\n")


def test_a_member_whose_folder_was_replaced_is_asked_again(folders, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "member")

    def seen():
        (one,) = subjects([str(folder)], [])
        return json.dumps(one.facts())

    before = seen()
    assert before == seen()
    shutil.copytree(tiny.save(tmp_path / "other", "gpt2", seed=9), folder, dirs_exist_ok=True)
    assert before != seen()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--how", "vote"], "unknown way to answer 'vote'"),
        (["-e", "wide/gpt2"], "members and a rule"),
        (["-e", "both=gpt2 llama prob-mean vocabulary=union"], "need the likelihood of a text, and both gives none"),
        (["-e", "both=gpt2 llama nothing"], "expected members and then a rule"),
        (["--answers", "/nowhere/a.jsonl"], "make /nowhere first"),
        (["--how", "match"], "are for questions without choices"),
        (["--chat"], "--chat does not go with answers by option-byte, which are not written"),
        (["--votes", "3"], "--votes does not go with answers by option-byte"),
        (["-m", "no/where.gguf"], "cannot load no/where.gguf"),
    ],
)
def test_wrong_questions_are_refused_before_anything_is_loaded(more, message, folders, files, monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", None)
    assert message in refusal("answer", files / "choices.jsonl", *tiny.each("-m", folders), *more)


def test_code_is_run_where_that_is_allowed(folders, tmp_path):
    beginning = "def double(x):\n"
    asked = {"id": "c", "question": beginning, "answer": "    return 2 * x\n", "entry_point": "double",
             "test": "def check(candidate):\n    assert candidate(3) == 6\n"}  # fmt: skip
    (tmp_path / "code.jsonl").write_text(json.dumps(asked))
    (question,) = read_questions(tmp_path / "code.jsonl")
    assert usual([question]) == "code"
    assert Form("code", [question], 3).prompt(question) == beginning
    for text, right in (("    return 2 * x\n", True), ("    return x\n", False), ("    import os; os._exit(0)", False)):
        assert _is_right("code", text, question) is right
    command = ["answer", tmp_path / "code.jsonl", *tiny.each("-m", folders), "--max-new-tokens", "4"]
    assert "allow that by --run-code" in refusal(*command)
    facts = facts_of(*command, "--run-code")
    assert [row["right"] for row in facts["rows"]] == [0, 0, 0]
    assert facts["run"]["threads"] >= 1
    assert facts["run"]["members"] == [*map(str, folders)]


def test_votes_are_of_what_answers_say():
    questions = [Question("1", "?", ("15",)), Question("2", "?", ("7",))]
    rounds = [
        [Answered("1", text, text.endswith("15"), 1.0, 2), Answered("2", other, other == "7", 1.0, 2)]
        for text, other in (("no idea", "none"), ("#### 14", "none"), ("so 15", "7"), ("15.0, that is 15", "8"))
    ]
    found = majority("number", questions, rounds)
    assert [(one.answer, one.right, one.seconds, one.tokens) for one in found] == [
        ("so 15", True, 4.0, 8), ("7", True, 4.0, 8),
    ]  # fmt: skip
    assert majority("number", questions, [rounds[0]])[0].answer == "no idea"
    assert said("match", "The Sun.\nx", questions[0]) == said("match", "sun", questions[0])


def test_the_best_member_votes_beside_ensembles(folders, files, tmp_path):
    command = ["answer", files / "open.jsonl", *tiny.each("-m", folders), "--max-new-tokens", "1"]
    both = ["-e", "both=gpt2 llama logit-mean"]
    named = [
        [row["name"] for row in facts_of(*command, *more)["rows"]]
        for more in ([], [*both, "--votes", "0"], [*both, "--votes", "4"], both)
    ]
    assert [sum("votes" in name for name in names) for names in named] == [0, 0, 1, 1]
    assert named[2][3].endswith(", 4 votes")
