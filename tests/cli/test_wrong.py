"""What is wrong on the command line, or has another form today, is one line that says what to do."""

import shlex

import pytest
from commands import process, run

MEMBERS = "members are named by -m, and an option is repeated for each value, -m A -m B"
WRONG = [
    ("generate x --trust -1", "expected trusts from 0 to inf"),
    ("generate x --trust 0.3,-1,1", "expected trusts from 0 to inf"),
    ("generate x --trust much", "expected --trust as numbers separated by commas"),
    ("generate x --rule mete", "did you mean meet?"),
    ("generate x --rule vote", "unknown rule 'vote': expected one of meet, max-entropy"),
    ("generate x -f /absent.txt", "[Errno 2] No such file or directory"),
    ("generate x --top-p 1.5", "--top-p"),
    ("generate x --min-p 2", "--min-p"),
    ("generate x --temperature -1", "--temperature"),
    ("generate x --repetition-penalty 0", "0 is not above 0"),
    ("generate x --tol 0", "tol"),
    ("generate x --gate unsur:0.5", "unsure"),
    ("generate x --gate open", "expected a gate"),
    ("generate x --weights a,b", "--weights as numbers"),
    ("generate x --rule meet:trsut=1", "did you mean trust"),
    ("evaluate -t x --engine rai", "did you mean ray?"),
    ("evaluate -t x --workers 0", "--workers"),
    ("trace out -t x --store float17", "did you mean float16?"),
    ("generat x", "generate"),
    ("generate x --trsut 1", "--trust"),
    ("generate --no-such-flag", "--no-such-flag"),
    ("config evalute", "did you mean evaluate?"),
    ("fit -t x", "missing option '--out'; see softmeet fit --help"),
    ("generate wide/gpt2", "expected a text, but wide/gpt2 is the name of a model"),
    ("inspect wide/gpt2 wide/llama", "expected a text, but wide/gpt2 is the name of a model"),
    ("inspect 'the king' --text queen wide/gpt2", "expected models alone, got 'the king'"),
    ("inspect --text no/such.txt wide/gpt2", "no file no/such.txt"),
    ("run wide/gpt2 'Why so?'", "answer once by softmeet generate 'Why so?' --chat"),
]
# Forms that are gone, and those of other programs.
TODAY = [
    ("study real out", "it is python benchmarks/study.py in a clone of softmeet"),
    ("generate x --members A B", "--member"),
    ("evaluate -t x --rules A,B", "--rule"),
    ("evaluate -t x -m A B", MEMBERS),
    ("check A B", MEMBERS),
    ("generate x --metric raw", "it is an option of a rule, --rule NAME:metric=…"),
    ("generate x --slack=0.1", "it is an option of a rule, --rule NAME:slack=…"),
    ("generate x --vertex", "it is an option of a rule, --rule NAME:vertex=…"),
    ("generate x --model A", "members are named by -m, or --member;"),
    ("generate x --temp 0.5", ": it is --temperature;"),
    ("generate x -n 5", "no such option: -n: it is --max-new-tokens"),
    ("generate x -ngl 5", "no such option: -ngl: it is said behind a GGUF file"),
    ("serve wide --ctx-size 100", "file.gguf+context=N"),
    ("eval -t x", "answers to questions by softmeet answer"),
    ("pull org/a", "fetched when it is first named"),
    ("serve narrow,wide", "say -m narrow -m wide"),
    ("serve both=narrow,wide", "say -m both=narrow -m both=wide"),
    ("serve narrow --allow rule,trust", "expected --allow as some of rule, trust"),
]
UTF8 = "expected UTF-8 in a text on the command line, but byte 0 (line 1) is not"
NO_TEXTS = [
    (words, UTF8) for words in ("generate good \udcff\udcfe", "inspect \udcff", "evaluate -t x --separator \udcff")
]
# What only members tell.
LOADED = [
    ("generate ''", "expected a prompt of at least one token"),
    ("generate x -m /absent/a", "cannot load /absent/a: there is no such folder"),
    ("generate x --weights 1,1", "expected one weight per member, 3 in all, got 2"),
]


@pytest.mark.parametrize(("words", "said"), WRONG + TODAY + NO_TEXTS + LOADED)
def test_what_is_wrong_is_refused_in_one_line_and_if_it_can_be_before_anything_is_loaded(words, said, monkeypatch):
    if (words, said) not in LOADED:
        monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", None)
    done = run(*shlex.split(words), columns=200)
    assert done.returncode == 2
    assert done.stdout in ("", "\n")
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rule: [meet", "error: expected YAML in {}"),
        ("rulle: meet", "no option rulle"),
        ("members: [a]", "did you mean member?"),
        ("vertex: true", "it is an option of a rule, --rule NAME:vertex=…"),
    ],
)
def test_so_is_a_configuration_file(line, said, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(line)
    for command in (["generate", "x"], ["config", "generate"]):
        done = run(*command, "--config", path)
        assert done.returncode == 2
        assert said.format(path) in done.stderr


def test_so_it_is_in_a_process_of_its_own():
    done = process("config", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown command 'nothing': expected one of chat, generate, inspect")
    assert len(done.stderr.splitlines()) == 1


def test_a_file_of_a_model_in_place_of_a_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    done = run("generate", tmp_path / "a.gguf")
    assert done.returncode == 2
    assert f"expected a text, but {tmp_path / 'a.gguf'} is the name of a model" in done.stderr.replace("\n", "")
