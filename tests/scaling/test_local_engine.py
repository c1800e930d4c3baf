"""Threads of one process: Ctrl-C keeps what is under way, and a second one waits for nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny

from softmeet.cli import main as cli
from softmeet.scaling.local import LocalEngine

pytestmark = pytest.mark.usefixtures("interruptible")


def interrupted_after(begun):
    """Ctrl-C once ``begun`` is passed by all that wait there, and the caller waits for them."""
    threading.Thread(target=lambda: (begun.wait(), time.sleep(0.3), os.kill(os.getpid(), signal.SIGINT))).start()


def test_ctrl_c_begins_nothing_more_and_loses_nothing():
    begun, end, said, answers = threading.Barrier(3), threading.Event(), [], []

    def call(k):
        begun.wait(timeout=300)
        end.wait(timeout=300)
        return 10 * k

    interrupted_after(begun)
    with LocalEngine(2, on_stop=lambda sentence: (said.append(sentence), end.set())) as engine:
        found = engine.map(call, ((k,) for k in range(6)))
        with pytest.raises(KeyboardInterrupt):
            answers.extend(found)
    assert sorted(answers) == [(0, 0), (1, 10)]
    assert said == ["finishing what is under way; Ctrl-C again leaves it"]


def test_a_second_ctrl_c_leaves_what_is_under_way():
    begun, end, ended = threading.Barrier(3), threading.Event(), []

    def call(k):
        begun.wait(timeout=300)
        ended.append(end.wait(timeout=300))

    interrupted_after(begun)
    with LocalEngine(2, on_stop=lambda sentence: signal.raise_signal(signal.SIGINT)) as engine:
        with pytest.raises(KeyboardInterrupt):
            list(engine.map(call, ((k,) for k in range(6))))
        assert ended == []
        end.set()


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_while_an_answer_is_dealt_with_loses_neither_it_nor_others(workers):
    dealt, said = [], []

    def deal(answers):
        for k, answer in answers:
            if k == 3:
                signal.raise_signal(signal.SIGINT)
            dealt.append(answer)

    with LocalEngine(workers, on_stop=said.append) as engine, pytest.raises(KeyboardInterrupt):
        deal(engine.map(float, ((x,) for x in range(50))))
    assert len(said) == 1
    assert set(range(4)) <= set(dealt) <= set(range(3 + 2 * workers))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_listener_or_where_ctrl_c_is_handled_already_nothing_changes():
    def calls(engine):
        return [x for _, x in engine.map(lambda k: signal.raise_signal(signal.SIGINT) or k, ((k,) for k in range(2)))]

    with pytest.raises(KeyboardInterrupt):
        calls(LocalEngine())
    seen, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        assert calls(LocalEngine(on_stop=seen.append)) == [0, 1]
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT] * 2


def test_a_command_that_was_stopped_does_not_wait_for_its_threads(monkeypatch):
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    for code in (130, 0):
        monkeypatch.setattr(cli, "app", lambda standalone_mode, code=code: code)
        with pytest.raises(SystemExit):
            cli.main()
    assert ends == [130]


@pytest.mark.slow
def test_ctrl_c_twice_ends_an_evaluation_at_once_and_keeps_what_was_done(tmp_path):
    folders = [tiny.save(tmp_path / name, name) for name in ("gpt2", "llama")]
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    kept = tmp_path / "kept"
    running = subprocess.Popen(
        [sys.executable, "-m", "softmeet", "evaluate", *tiny.each("-m", folders), "-t", tmp_path / "a.txt",
         "--rule", "max-entropy", "--workers", "2", "--resume", kept],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    while len(list(kept.glob("evaluate-*"))) < 2:
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    # On a busy machine lines of progress come before it.
    assert any("finishing what is under way" in line for line in iter(running.stderr.readline, ""))
    running.send_signal(signal.SIGINT)
    rest = running.communicate(timeout=300)[1]
    assert running.returncode == 130
    assert "stopped: finished pieces stay in" in rest
