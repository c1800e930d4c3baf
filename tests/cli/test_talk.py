"""``softmeet chat``: what is said is remembered, and forgotten where a context is full."""

import signal
import threading
import time
from concurrent.futures import Future

import pytest
from commands import run
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from softmeet import Ensemble
from softmeet.cli import typed as typed_module
from softmeet.cli.chat import while_typing
from softmeet.cli.conversation import Conversation
from softmeet.cli.talk import Talk, TalkFlags, color_of
from softmeet.cli.typed import CtrlC, Typed
from softmeet.errors import CheckpointError, ContextError
from softmeet.suspended import Control

BOTH = ["chat", "wide/gpt2", "wide/llama", "--max-new-tokens", "6", "--seed", "1"]


def told(room=100):
    """A conversation in which each answer repeats how many turns came before, and how many turns fit."""
    forgotten = []

    def write(turns):
        if len(turns) > room:
            raise ContextError("too long")
        yield from ((f"{len(turns)}", [0.1, 0.2]), (" turns", [0.2, 0.1]))

    return Conversation(write, "be terse", forgotten.append), forgotten


def test_answers_are_remembered_and_a_message_of_the_system_begins_anew():
    talk, _ = told()
    assert ["".join(piece for piece, _ in talk.answer(text)) for text in ("a", "b")] == ["2 turns", "4 turns"]
    assert [turn["role"] for turn in talk.turns] == ["system", "user", "assistant", "user", "assistant"]
    talk.clear()
    assert talk.turns == [{"role": "system", "content": "be terse"}]
    talk.begin(None)
    assert talk.turns == []


def test_an_answer_that_is_left_off_counts_and_one_without_a_word_does_not():
    talk, _ = told()
    pieces = talk.answer("a")
    assert next(pieces)[0] == "2"
    pieces.close()
    assert talk.turns[-1] == {"role": "assistant", "content": "2"}
    talk, _ = told(room=1)
    with pytest.raises(ContextError):
        list(talk.answer("a"))
    assert talk.turns == [{"role": "system", "content": "be terse"}]


def test_the_first_turns_are_forgotten_where_a_context_is_full():
    talk, forgotten = told(room=4)
    for text in "abc":
        list(talk.answer(text))
    assert forgotten == [2]
    assert [turn["content"] for turn in talk.turns] == ["be terse", "b", "4 turns", "c", "4 turns"]


def test_a_conversation_on_the_command_line():
    done = run(*BOTH, stdin="And the king said\n/nothing\n/clear\nIn the beginning\n/bye\nnever read\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().split("\n")) >= 2
    assert "there is no /nothing" in done.stderr
    assert "wide/gpt2, wide/llama: no chat template of their own" in done.stderr
    again = run(*BOTH, stdin="And the king said\n/clear\nIn the beginning\n")
    assert again.stdout == done.stdout
    coloured = run(*BOTH, "--colors", stdin="And the king said\n/clear\nIn the beginning\n")
    assert coloured.stdout.endswith(done.stdout)


@pytest.fixture(scope="module")
def mixed():
    return Ensemble.from_pretrained("mixed")


@pytest.fixture
def talk(mixed):
    return Talk(mixed, TalkFlags(do_sample=False, max_new_tokens=6), None, CtrlC())


def test_colours_go_by_who_finds_a_text_likelier_whatever_the_weights(talk, mixed):
    turns = [{"role": "user", "content": "And the king said"}]
    plain = list(talk._written(turns))
    talk.do_colors()
    coloured = list(talk._written(turns))
    assert "".join(text for text, _ in coloured) == "".join(text for text, _ in plain)
    assert {tuple(told) for _, told in plain} == {()}
    assert {color_of(told) for _, told in coloured} == {"cyan", "magenta", ""}
    talk.obey("/set weights 0.99,0.01")
    heavy = list(talk._written(turns))
    assert heavy[0][1] == pytest.approx(coloured[0][1])  # what a member finds of a text hangs on the text alone
    assert color_of([float("nan"), -1.0]) == ""


def test_what_is_set_holds_from_then_on(talk, capsys, tmp_path):
    def said(text):
        assert talk.obey(text)
        return " ".join(capsys.readouterr().err.split())

    assert "mixed/gpt2 0.53, mixed/llama 0.47, mixed by logit-mean over bytes" in said("/show")
    assert "always the likeliest, seed none, at most 6 tokens" in said("/show")
    assert "0.25, mixed/llama 0.75" in said("/set weights 1,3")
    assert "temperature 0.5, seed none" in said("/set temperature 0.5")
    assert "temperature 0.5, seed 7" in said("/set seed 7")
    for wrong in ("/set temperature x", "/set seed -1", "/set weights 1,x", "/set weights 1", "/set colour", "/save"):
        assert "expected" in said(wrong)
    assert "begun anew" in said("/set system be terse")
    assert "system: be terse" in said("/show")
    assert "nothing was asked yet" in said("/regenerate")
    talk.answer("And the king said")
    first = capsys.readouterr().out
    assert said("/regenerate") == ""
    assert talk._sampling.seed == 8
    assert [turn["role"] for turn in talk._said.turns] == ["system", "user", "assistant"]
    assert talk._said.turns[2]["content"] != first.strip("\n")
    for name, begin in {
        "talk.json": '[\n  {\n    "role": "system"',
        "talk.md": "system:\nbe terse\n\nuser:\nAnd",
    }.items():
        assert "wrote" in said(f"/save {tmp_path / name}")
        assert (tmp_path / name).read_text().startswith(begin)
    assert "File exists" in said(f"/save {tmp_path / 'talk.md'}")


@pytest.fixture
def keyboard(monkeypatch):
    """What types keys at a terminal, and what reads texts of it."""
    with create_pipe_input() as keys:
        monkeypatch.setattr("softmeet.cli.typed.terminal", lambda: {"input": keys, "output": DummyOutput()})
        typed = Typed(CtrlC())
        typed.at_terminal = True
        yield keys.send_text, typed


def test_ctrl_c_without_an_answer_ends_nothing(keyboard):
    keys, typed = keyboard
    keys("half a line\x03hello\r\x04")
    assert (typed.next(), typed.next()) == ("hello", None)


def test_ctrl_c_while_a_prompt_is_made_stops_no_later_answer(keyboard, monkeypatch):
    keys, typed = keyboard
    made, answer = typed_module.terminal, Control()
    monkeypatch.setattr(typed_module, "terminal", lambda: typed._ctrl_c(2, None) or made())
    keys("hello\r")
    assert typed.next() == "hello"
    with typed._ctrl_c.stops(answer):
        assert not answer.stopped


SEVERAL = '"""def f():', "    return 1", '"""', "", '"""one"""', "exit", "never read"


def test_texts_of_several_lines(keyboard, monkeypatch):
    keys, typed = keyboard
    keys("\r".join(SEVERAL) + "\r")
    lines = iter(SEVERAL)
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    piped = Typed(CtrlC())
    piped.at_terminal = False
    for texts in typed, piped:
        assert [texts.next() for _ in range(3)] == ["def f():\n    return 1", "one", None]


def test_a_paste_is_one_text(keyboard):
    keys, typed = keyboard
    keys("see \x1b[200~one\r\ntwo\n\x1b[201~\r")
    assert typed.next() == "see one\ntwo"


def test_ctrl_c_stops_what_is_waited_for_and_is_nothing_elsewhere():
    ctrl_c, answer, task = CtrlC(), Control(), Future()
    with ctrl_c.stops(answer):
        ctrl_c(2, None)
    assert answer.stopped
    behind = Control()  # of a text behind which it came
    with ctrl_c.stops(behind):
        assert behind.stopped
    ctrl_c.forget()
    with ctrl_c.obeyed():
        threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
        assert not ctrl_c.waited(task)
        ctrl_c.forget()
        threading.Timer(0.1, task.set_result, [None]).start()
        assert ctrl_c.waited(task)


def test_models_are_loaded_while_the_first_text_is_typed(keyboard, capsys):
    (keys, typed), to_load = keyboard, threading.Event()

    class Stops(CtrlC):
        def waited(self, task):
            if not to_load.is_set():  # Ctrl-C while models are loaded: another text can be typed
                to_load.set()
                return False
            return super().waited(task)

    def load():
        assert to_load.wait(20)
        return "an ensemble"

    keys("hello\rhello again\r")
    assert while_typing(load, typed, Stops()) == ("an ensemble", "hello again")
    assert "stopped; the models are still loading" in capsys.readouterr().err


def test_models_that_cannot_be_loaded_end_the_typing(keyboard):
    def load():
        time.sleep(0.3)
        raise CheckpointError("no model")

    def fail():
        raise CheckpointError("no model")

    for loads in load, fail:
        with pytest.raises(CheckpointError, match="no model"):
            while_typing(loads, keyboard[1], CtrlC())


def test_what_does_not_fit_is_said_and_the_conversation_goes_on(caplog):
    done = run(*BOTH, "--rule", "logit-mean", stdin=f"{'king ' * 600}\nAnd the king said\n")
    assert caplog.messages == [
        "weights by size: 0.69 for wide/gpt2, 0.31 for wide/llama; --weights 1,1 makes them equal"
    ]
    assert done.returncode == 0, done.stderr
    assert "context" in done.stderr
    assert done.stdout.strip()
