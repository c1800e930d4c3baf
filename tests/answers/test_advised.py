"""``softmeet advise --questions``: right answers beside bits."""

from __future__ import annotations

import functools
import json

import pytest
import tiny
from commands import facts_of, ran, refusal

from softmeet.evaluation import advise as advising
from softmeet.evaluation.costs import milliseconds

ANIMALS = ("fox", "dog", "king", "cat", "sun", "moon")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    rows = [
        {"id": name, "question": f"The {name}?", "choices": ["the dog", "a fox"],
         "answer": "AB"[k % 2]} for k, name in enumerate(ANIMALS)
    ]  # fmt: skip
    file = tmp_path_factory.mktemp("questions") / "choices.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_members_answer_as_they_do_elsewhere_and_questions_are_the_text(folders, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(advising, "milliseconds", functools.partial(milliseconds, repeats=1))
    done = ran("advise", *folders, "--questions", questions, "--folds", 2, "--how", "letter", "--json", tmp_path / "a")
    facts = json.loads((tmp_path / "a").read_text())
    assert facts["documents"] == len(ANIMALS)
    ours, theirs = facts["answers"], facts_of("answer", questions, *tiny.each("-m", folders), "--how", "letter")
    assert [row["right"] for row in ours["rows"][:2]] == [row["right"] for row in theirs["rows"][:2]]
    assert "6 questions, answered by letter" in done.stdout
    named = [row["name"] for row in ours["rows"]]
    assert ("what is advised" in named) == (facts["verdict"] != "single")


def test_code_is_for_softmeet_answer(folders, tmp_path):
    (tmp_path / "code.jsonl").write_text(
        json.dumps({"id": 1, "question": "def f():", "answer": "1", "test": "x", "entry_point": "f"})
    )
    assert "ask such questions by softmeet answer" in refusal(
        "advise", *folders, "--questions", tmp_path / "code.jsonl"
    )
