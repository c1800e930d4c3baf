"""Nothing that models, files and servers write is obeyed by a terminal, and a pipe gets what models write as it is."""

import io
import logging
import re
import shlex
import time
import warnings
from types import SimpleNamespace

import byte_tokenizers
import pytest
from commands import run
from gguf_files import written

from softmeet import Ensemble
from softmeet.cli import messages, progress
from softmeet.cli.main import quiet_libraries
from softmeet.cli.terminal import PlainConsole, harmless
from softmeet.errors import CheckpointError

# What copies to the clipboard, makes a link, colours, overwrites a line, rings, and turns the direction of writing.
EVIL = "a\x1b]52;c;aGk=\x07b\x1b]8;;http://x\x1b\\c\x1b[31md\re\x9b2Jf\u202eg\x7f\tß [b]bold[/b] :smile:"
SHOWN = (
    r"a\x1b]52;c;aGk=\x07b\x1b]8;;http://x\x1b\c\x1b[31md\re\x9b2Jf\u202eg\x7f" + "\tß [b]bold[/b] :smile:"
)  # fmt: skip
# Colours that softmeet itself chooses.
_OWN = re.compile(r"\x1b\[[\d;]*m")


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


def bare(text):
    """What is printed, without softmeet's own colours, and with the spaces that rich has in place of tabs as one."""
    return re.sub(r"\s+", " ", _OWN.sub("", text))


def test_only_what_a_terminal_obeys_is_spelled():
    assert harmless(EVIL) == SHOWN
    every = [chr(k) for k in (*range(0x20), 0x7F, *range(0x80, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F))]
    assert [sign for sign in every if harmless(sign) == sign] == ["\t", "\n"]
    assert harmless("\u2066\u2069\udc9b") == r"\u2066\u2069\udc9b"
    for kept in ("café\n\tλ", "👩\u200d🔬", "\u05e9\u05dc", "\ue000", "\udce9"):
        assert harmless(kept) == kept


@pytest.fixture(scope="module")
def loaded():
    return Ensemble.from_pretrained(["wide/gpt2", "wide/llama"])


@pytest.fixture
def evil(loaded, monkeypatch):
    """An ensemble that writes EVIL, however it is asked."""
    pieces = list(EVIL)
    ensemble, drawn = "softmeet.ensemble.Ensemble.", SimpleNamespace(chosen_text=lambda: EVIL)
    monkeypatch.setattr(f"{ensemble}from_pretrained", lambda *_, **__: loaded)
    monkeypatch.setattr(f"{ensemble}stream", lambda *_, **__: iter(pieces))
    monkeypatch.setattr(f"{ensemble}stream_with_disagreement", lambda *_, **__: ((piece, 0.5) for piece in pieces))
    monkeypatch.setattr(f"{ensemble}generate", lambda _, texts, **__: [EVIL for _ in texts])
    monkeypatch.setattr(f"{ensemble}decode", lambda *_, **__: [drawn])
    told = [(piece, [0.1, 0.2], [-1.0, -2.0]) for piece in pieces]
    monkeypatch.setattr("softmeet.hf.streaming.by_member", lambda *_, **__: iter(told))


@pytest.mark.parametrize(
    ("words", "around"),
    [
        (["generate", "x", "--no-summary"], "{}\n"),
        (["generate", "x", "--no-summary", "--color"], "{}\n"),
        (["generate", "x", "y", "--no-summary"], "=== x\n{0}\n\n=== y\n{0}\n\n"),
        (["generate", "x", "--decoder", "particles:n=2", "--max-new-tokens", "3", "--no-summary"], "{}\n"),
        (["chat", "wide/gpt2", "wide/llama"], "{}\n"),
        (["chat", "wide/gpt2", "wide/llama", "--colors"], "wide/gpt2 wide/llama \n{}\n"),
    ],
)
def test_what_models_write(words, around, evil):
    stdin = "x\n" if words[0] == "chat" else ""
    done = run(*words, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert re.sub("(wide/[a-z0-9]+) +", r"\1 ", done.stdout) == around.format(EVIL)
    shown = run(*words, stdin=stdin, stdout=Terminal()).stdout.getvalue()
    assert bare(shown) == bare(around.format(SHOWN))
    assert ("\x1b[" in shown) == any(word.startswith("--color") for word in words)


def test_errors_and_notices(monkeypatch):
    def fail(*_, **__):
        messages.say(EVIL)
        raise CheckpointError(EVIL)

    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", fail)
    said = run("generate", "x").stderr
    # An error is one line: what separates words in it is a space.
    assert bare(said) == bare(f"{SHOWN} error: {harmless(' '.join(EVIL.split()))} ")
    assert r"x\x1b]52;c;aGk=\x07" in run("generate", "x", "-m", "./x\x1b]52;c;aGk=\x07").stderr
    assert r"--x\x1b[31m" in run("generate", "--x\x1b[31m").stderr


def test_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    last = logging.StreamHandler()
    monkeypatch.setattr(logging, "lastResort", last)
    quiet_libraries()
    assert warnings.formatwarning(EVIL, UserWarning, "", 1) == f"warning: {SHOWN}\n"
    assert last.format(logging.makeLogRecord({"msg": "of %s", "args": (EVIL,)})) == f"of {SHOWN}"


def test_progress_of_what_has_any_name(monkeypatch):
    console = PlainConsole(file=Terminal(), force_terminal=True, width=400)
    monkeypatch.setattr(progress, "err", console)
    name = "[/b] " + EVIL.replace("\t", " ")
    with progress.working(name), progress.progress() as begin:
        begin(name, 0, 1)(1)
        begin("a piece of minutes", 0, 9)
        time.sleep(1.2)
    printed = bare(console.file.getvalue())
    assert "0/9 0:00:01" in printed  # a clock that goes on, and none of a time that is not known
    assert "-:--:--" not in printed
    assert printed.count(bare(harmless(name))) >= 2
    assert not re.search("\x1b]|[\x07\x9b\u202e]", printed)


@pytest.mark.parametrize("columns", [200, 20])
def test_names_of_files_are_shown_and_quoted(columns, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOFTMEET_CACHE", str(tmp_path / "cache"))  # where no indexes are
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("a b;c", "d'e"):
        written(tmp_path / "more" / f"{name}.gguf", byte_tokenizers.byte_level())
    (tmp_path / "more" / "[x]\x1b]0;y\x07\u202e.gguf").write_bytes(b"GGUF")
    lines = run("models", tmp_path / "more", columns=columns).stdout
    assert not re.search("[\x07\x1b\u202e]", lines)
    assert lines.count(r"[x]\x1b]0;y\x07\u202e") >= 2
    command = shlex.split(lines.splitlines()[-1])
    assert command == ["softmeet", "chat", *(f"{tmp_path}/more/{name}.gguf" for name in ("a b;c", "d'e"))]


def test_a_text_that_is_inspected():
    done = run("inspect", f"And the king {EVIL}", "-m", "narrow", "--rule", "logit-mean")
    assert done.returncode == 0, done.stderr
    # One byte is one token of these members, and half a letter is none.
    assert bare(done.stdout).startswith("And the king " + SHOWN.partition("e\\x9b")[0])
    assert not re.search(r"[\x07\x0d\x1b\x9b\u202e]", done.stdout)
