"""What a user reads of the command line: help, tables, progress, statuses, and what it refuses to overwrite."""

import errno
import io
import json
import re
import time
from functools import partial
from unittest.mock import Mock

import pytest
import tiny
import yaml
from commands import run
from rich.console import Console
from rich.progress import Progress
from typer.main import get_command
from typer.testing import CliRunner

from softmeet import Ensemble, Status
from softmeet.cli import messages, tables
from softmeet.cli import progress as progress_module
from softmeet.cli.help import PANELS, default, grouped, sentence, spelling
from softmeet.cli.main import app
from softmeet.errors import InvalidInputError, TraceError
from softmeet.members.member import short
from softmeet.rules.endings import endings

WORDS = "the spring storm came early and went around the house again " * 12


def commands():
    """Every command, as (its words, the command)."""
    for name, command in get_command(app).commands.items():
        yield (name,), command


def test_help_is_a_screen_and_all_help_cuts_no_name():
    for words, command in commands():
        is_long = len(command.params) >= 12
        brief, whole = (
            run(*words, how, columns=80).stdout for how in ("--help", "--help-all" if is_long else "--help")
        )
        assert len(brief.splitlines()) <= 50, words
        assert max(map(len, whole.splitlines())) <= 80
        assert "--help-all" in brief or not is_long
        titles = re.findall("─ ([A-Z][a-z ]+) ─", whole)
        assert [title for title in titles if title != "Options"] == [title for title in PANELS if title in titles]
        for parameter in command.params:
            assert spelling(parameter).split()[0].strip(",[]").split("/")[0] in whole


def test_every_option_has_a_sentence():
    for words, command in commands():
        for _, parameters in grouped(command.params):
            for parameter in parameters:
                said = sentence(parameter)
                assert re.match(r"[A-Z].*\.$", said, re.DOTALL), (words, spelling(parameter), said)
                assert len(said.split()) > 2, (words, spelling(parameter), said)


def test_defaults_are_shown():
    by_name = {p.name: default(p) for p in dict(commands())["generate",].params}
    assert by_name["max_new_tokens"] == "1024"
    assert by_name["members"] == "small bundled models"
    assert by_name["top_p"] == "1"
    assert by_name["trust_remote_code"] == ""


def test_config_shows_no_empty_values_and_can_be_read_back(tmp_path):
    shown = run("config", "generate").stdout
    assert "\n# max_new_tokens: 1024\n" in shown
    assert None not in yaml.safe_load(shown).values()
    assert "\n# temperature: 1\n" in shown
    (tmp_path / "c.yaml").write_text(shown + "\nmax_new_tokens: 7\nseed: 3\n")
    again = run("config", "generate", "--config", tmp_path / "c.yaml").stdout
    assert (yaml.safe_load(again)["max_new_tokens"], yaml.safe_load(again)["seed"]) == (7, 3)
    assert yaml.safe_load(run("config", "fit").stdout)


def test_temperature_zero_takes_the_most_probable_token(folders):
    common = ("generate", "hello", *tiny.each("-m", folders), "--max-new-tokens", 8)
    assert run(*common, "--temperature", 0).stdout == run(*common, "--no-do-sample").stdout


@pytest.mark.parametrize(
    ("command", "rule"),
    [
        ("generate", "max-entropy"), ("generate", "meet"), ("inspect", "meet:budget=1"),
        ("evaluate", "min-cross-entropy"), ("evaluate", "meet:budget=1"),
    ],
)  # fmt: skip
def test_what_was_not_simply_solved_is_said(command, rule, folders, tmp_path):
    # A member twice agrees with itself, so that the first rule has nothing to choose; two that differ never agree.
    twice = rule == "min-cross-entropy"
    members = tiny.each("-m", folders[:1] * 2 if twice else folders)
    (tmp_path / "a.txt").write_text(WORDS)
    words = {
        "generate": ["generate", "hello", *members, "--max-new-tokens", 3],
        "inspect": ["inspect", "hello", *members],
        "evaluate": ["evaluate", *members, "-t", tmp_path / "a.txt", "--max-tokens", 5],
    }[command]
    words += ["--trust", 4, "--max-steps", 1] if rule.startswith("meet") else []
    done = run(*words, "--rule", rule)
    assert done.returncode == 0, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    facts = json.loads(run(*words, "--rule", rule, "--json", *["-"] * (command == "evaluate")).stdout)
    own = facts["rules"][rule] if command == "evaluate" else facts
    if twice:
        assert "DEGENERATE at all " in said
        assert own["statuses"] == {"DEGENERATE": sum(own["statuses"].values())}
    elif rule.startswith("meet"):
        status = Status.BUDGET if "budget" in rule else Status.NOT_CONVERGED
        assert f"{status.name} at " in said
        assert f"s: {status}" in said
        assert "this is the best point found" in str(status)
        assert own["statuses"][status.name] > 0
    else:
        assert "answered by meet at all " in said
        assert own["fallbacks"] == sum(own["statuses"].values()) > 0


def test_pages_say_what_was_not_simply_solved(folders, tmp_path, monkeypatch):
    ours = Ensemble.from_pretrained(folders, "meet:budget=1", trust=4.0)
    tokens = [report.spelled(ours.tokenizer) for report in ours.inspect("hello there and all", top=2)]
    late = sum(token["status"] == "BUDGET" for token in tokens)
    said = f"BUDGET at {'all' if late == len(tokens) else f'{late} of'} {len(tokens)} tokens: {Status.BUDGET}"
    page = tmp_path / "page.html"
    words = ["inspect", "hello there and all", *tiny.each("-m", folders), "--rule", "meet:budget=1", "--trust", 4]
    assert run(*words, "--html", page).returncode == 0
    assert said in page.read_text(encoding="utf-8")
    # On a full disk the page that is there stays.
    with monkeypatch.context() as patched:
        patched.setattr("softmeet.evaluation.files.os.fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space")))
        done = CliRunner().invoke(app, [*map(str, words), "--html", str(page), "--force"])
    assert isinstance(done.exception, TraceError)
    assert said in page.read_text(encoding="utf-8")


def test_endings():
    assert endings({"OPTIMAL": 5}, 0) == []
    assert endings({"DEGENERATE": 5}, 0)[0].startswith("DEGENERATE at all 5 tokens: every feasible distribution")
    said = endings({"OPTIMAL": 1_234, "BUDGET": 1}, 1_000, "byte")
    assert said[0].startswith("BUDGET at 1 of 1,235 bytes: ")
    assert said[1] == "answered by meet at 1,000 of 1,235 bytes, as no distribution agrees with every member there"


def test_trusts_are_shown_of_rules_that_have_them(folders):
    words = ("generate", "hello", *tiny.each("-m", folders), "--max-new-tokens", 2, "--summary")
    assert "trust" in run(*words).stderr
    assert "trust" not in run(*words, "--rule", "logit-mean").stderr
    assert json.loads(run(*words, "--rule", "logit-mean", "--json").stdout)["members"][0]["trust"] is None


def test_files_are_replaced_by_force_alone(folders, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    taken, members = tmp_path / "taken", tiny.each("-m", folders)
    for words in (
        ["inspect", "hello there", *members, "--html", taken],
        ["evaluate", *members, "-t", tmp_path / "a.txt", "--max-tokens", 12, "--rule", "logit-mean", "--json", taken],
    ):
        taken.write_text("before")
        done = run(*words)
        assert done.returncode == 2
        assert f"expected a new file, but {taken} is there: name another one, or replace it by --force" in done.stderr
        assert taken.read_text() == "before"
        assert run(*words, "--force").returncode == 0
        assert taken.read_text() != "before"


def test_a_fit_replaces_an_older_one_by_force_alone_and_warns_of_a_short_text(folders, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"{WORDS[k * 7 :]}" for k in range(9)))
    words = ["fit", *tiny.each("-m", folders), "-t", tmp_path / "a.txt", "--separator", "\\n\\n", "--max-tokens", 90]
    words += ["--evaluations", 1, "--meet-tokens", 20, "--premise-tokens", 20, "--out", tmp_path / "out"]
    first = run(*words, "--max-per-document", 10)
    assert first.returncode == 0, first.stderr
    assert "Fitted on 30 tokens only: " in first.stderr
    assert "Fitted on 30 tokens only: " in (tmp_path / "out" / "README.md").read_text()
    before = (tmp_path / "out" / "config.json").read_bytes()
    again = run(*words)
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert run(*words, "--max-per-document", 8, "--force").returncode == 0


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_break_texts_before_numbers(width):
    console = Console(file=io.StringIO(), width=width)
    rows = [("a/very-long-name-of-a-member", "0.1234 ± 0.0567", "-12.3456", "1,234", "99.9%", "a text of some words")]
    columns = ("member", "difference from the baseline", "nats a token", "tokens", "share", "what")
    tables.print_table(console, columns, [rows], texts=(0, 5), optional=5)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    for number in ("0.1234 ± 0.0567", "-12.3456", "1,234", "99.9%"):
        assert number in shown
    first = [words[0] for line in shown.splitlines() if (words := line.strip("│┃ ").split())]
    assert "a/very-long-name-of-a-member" in "".join(first)


@pytest.mark.parametrize("width", [14, 24])
def test_a_table_without_room_is_printed_line_by_line(width):
    console = Console(file=io.StringIO(), width=width)
    rows = [("a/long-name-of-a-member", "1.5", "a text"), ("b/other", "2.5", "")]
    columns = ("member", "nats a token or some such long title", "what moved")
    tables.print_table(console, columns, [rows], texts=(0, 2), optional=2)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "a/long-name-of-a-member"
    assert " ".join("".join(lines).split()).count("1.5") == 1
    assert "  what moved: a text" in lines if width == 24 else "text" in "".join(lines)
    assert "b/other" in lines
    assert sum("what" in line for line in lines) == 1


@pytest.mark.parametrize("command", ["evaluate", "inspect", "check", "generate"])
def test_names_survive_a_narrow_terminal(command, folders, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    members = tiny.each("-m", folders)
    words = {
        "generate": ["generate", "hello", *members, "--max-new-tokens", 3, "--summary"],
        "inspect": ["inspect", "hello there", *members],
        "evaluate": ["evaluate", *members, "-t", tmp_path / "a.txt", "--max-tokens", 12],
        "check": ["check", *members, "--sampled", 0],
    }[command]
    done = run(*words, columns=40)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    for name in map(short, folders):
        assert any(name in line for line in said.splitlines()), said


def test_progress_in_a_pipe_is_a_line_now_and_then(monkeypatch):
    shown = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(messages, "err", shown)
    monkeypatch.setattr(progress_module, "err", shown)
    monkeypatch.setattr(progress_module, "EVERY", 0.05)
    with progress_module.progress() as begin:
        advance = begin("fitting meet", 0, 2_000)
        for _ in range(4):
            advance(105)
            time.sleep(0.1)
    with progress_module.working("loading a") as change:
        time.sleep(0.15)
        change("loading b")
        time.sleep(0.15)
    lines = shown.file.getvalue().splitlines()
    assert any(
        re.fullmatch(r"fitting meet: \d+ of 2,000 after \d+ s, about \d+:\d+:\d+ left", line) for line in lines
    ), lines
    assert any(re.fullmatch(r"loading a: \d+ s", line) for line in lines)
    assert any(re.fullmatch(r"loading b: \d+ s", line) for line in lines)


def test_the_time_left_is_told_of_pieces_that_take_minutes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module, "Progress", partial(Progress, get_time=lambda: now[0]))
    with progress_module._shown() as bars:
        task = bars.add_task("reading the text, in bytes", total=1_000)
        assert progress_module._line(bars.tasks[0]) == "reading the text, in bytes: 0 of 1,000 after 0 s"
        for count in (500, 100, 100):  # what was stored comes first, and says nothing of the speed
            bars.advance(task, count)
            now[0] += 100
        line = "reading the text, in bytes: 700 of 1,000 after 300 s, about 0:05:00 left"
        assert progress_module._line(bars.tasks[0]) == line


@pytest.mark.parametrize("command", [["evaluate"], ["fit", "--out", "out"], ["trace", "out"], ["check"]])
def test_the_default_family_is_not_measured_in_silence(command, tmp_path, monkeypatch):
    def stop(*args, **more):
        raise InvalidInputError("stopped")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(WORDS)
    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", stop)
    done = run(*command, *([] if command == ["check"] else ["-t", "a.txt"]))
    assert done.stderr == "no member is named by -m: this measures the bundled family wide\nerror: stopped\n"
