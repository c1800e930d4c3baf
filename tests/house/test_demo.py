"""The demo as somebody meets it: what it prints, and that the commands which it prints work."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from rich.console import Console
from serving import http, serve, tiny_ensemble

import demo
from softmeet.evaluation.intervals import Difference

SCRIPT = Path(__file__).parents[2] / "examples" / "demo.py"
WIDTH = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def printed(folder):
    """What a short demo prints into a pipe, in a folder of its own."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tokens", "5", "--per-book", "8"], cwd=folder, capture_output=True, text=True,
        check=False, timeout=900, env={"PATH": "", "COLUMNS": str(WIDTH)},
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line[:16]) == (0, "weights by size:")
    return done.stdout


@pytest.fixture(scope="module")
def commands(printed):
    found = {line.split("/softmeet ")[1].split()[0]: line.strip() for line in printed.splitlines() if line[:2] == "  "
             and "/softmeet " in line}  # fmt: skip
    assert list(found) == ["inspect", "evaluate", "serve"]
    return found


@pytest.mark.slow
def test_it_scores_continues_and_ends_in_plain_text(printed, commands):
    rows = [re.split(r" *│ *", line)[1:-1] for line in printed.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == [f"narrow/opt-{k}" for k in "abcd"] + ["logit-mean", "prob-mean", "meet:trust=1"]
    average = float(rows[4][1])
    for _, nats, difference in [*rows[:4], *rows[5:]]:
        mean, low, high = map(float, re.findall(r"[-+]\d\.\d{3}", difference))
        assert low < mean < high
        assert mean == pytest.approx(float(nats) - average, abs=0.0011)
    assert "scored 80 of 80 tokens" in printed
    assert "over 80 tokens" in printed
    assert printed.count(demo.PROMPT) == 5
    assert re.search(r"took \d+ seconds", printed)
    assert "\x1b" not in printed
    assert [line for line in printed.splitlines() if len(line) > WIDTH and line.strip() not in commands.values()] == []


@pytest.mark.slow
def test_the_printed_commands_work(folder, commands, monkeypatch):
    """In this process, and on fewer tokens; the program that they name is there, and runs."""
    monkeypatch.chdir(folder)
    (program,) = {command.split()[0] for command in commands.values()}
    assert subprocess.run([program, "--version"], capture_output=True, check=True).stdout.startswith(b"softmeet ")
    for name, few in (("inspect", []), ("evaluate", ["--max-per-document", "64"])):
        done = run(*shlex.split(commands[name])[1:], *few)
        assert done.returncode == 0, done.stderr
    assert "<html" in (folder / "build/demo/page.html").read_text(encoding="utf-8")
    assert "640 tokens of 10 documents; intervals by 10 documents" in done.stdout


@pytest.mark.slow
def test_the_printed_server_serves_its_page_until_it_is_stopped(commands, interruptible):
    """In this process, at another port, as 8000 may be in use where tests run."""

    def visit(url):
        page = http.get(f"{url}/ui", follow_redirects=True)
        os.kill(os.getpid(), signal.SIGINT)
        return page

    done, page = serve(*shlex.split(commands["serve"])[2:], meanwhile=visit)
    assert page.status_code == 200
    assert done.returncode in (0, 130), done.stderr


@pytest.mark.parametrize(
    ("meet", "words"),
    [
        (Difference(-0.04, -0.05, -0.03), r"^Gain shown: .* 4\.1% \(3\.0% to 5\.1%\) .* 0\.090 nats .* 0\.040 more"),
        (Difference(-0.04, -0.09, 0.01), "^No gain shown"),
        (Difference(0.01, -0.01, 0.03), "^No gain shown"),
        (Difference(0.04, 0.03, 0.05), "^On this text meet is worse"),
    ],
)
def test_the_verdict_follows_from_the_figures(meet, words):
    assert re.search(words, demo.verdict(meet, Difference(0.09, 0.08, 0.1)))


@pytest.mark.parametrize("coloured", [True, False])
def test_text_is_coloured_on_a_terminal_unless_colours_are_off(monkeypatch, coloured):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="truecolor", no_color=not coloured, width=WIDTH)
    monkeypatch.setattr(demo, "console", console)
    demo.show_legend()
    demo.continue_prompt("meet", tiny_ensemble("gpt2", "llama"), 3)
    assert ("Colour: the members disagree" in screen.getvalue()) == coloured
    assert ("48;2;" in screen.getvalue()) == coloured
