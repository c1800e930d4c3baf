"""``softmeet chat``: what is said is remembered, and forgotten where a context is full."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from commands import run

from softmeet import Ensemble
from softmeet.cli.chat import Conversation, _asked, _while_typing, written
from softmeet.errors import CheckpointError, ContextError

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
    assert "/nothing is nothing that can be typed here" in done.stderr
    assert "wide/gpt2, wide/llama: no chat template of their own" in done.stderr
    again = run(*BOTH, stdin="And the king said\n/clear\nIn the beginning\n")
    assert again.stdout == done.stdout
    coloured = run(*BOTH, "--colors", stdin="And the king said\n/clear\nIn the beginning\n")
    assert coloured.stdout.endswith(done.stdout)


def test_with_colours_each_piece_comes_with_every_members_figure():
    ensemble, turns = Ensemble.from_pretrained("mixed"), [{"role": "user", "content": "And the king said"}]
    given = {"do_sample": False, "max_new_tokens": 6}
    coloured, plain = (list(written(ensemble, given, colors, turns)) for colors in (True, False))
    assert "".join(text for text, _ in coloured) == "".join(text for text, _ in plain)
    assert {len(nats) for _, nats in coloured} == {2}
    assert {nats.index(min(nats)) for _, nats in coloured} == {0, 1}
    assert {tuple(nats) for _, nats in plain} == {()}


def test_words_in_place_of_a_model_are_refused(monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", None)
    done = run("run", "wide/gpt2", "Why is the sky blue?")
    assert done.returncode == 2
    assert "answer once by softmeet generate 'Why is the sky blue?' --chat" in " ".join(done.stderr.split())


def test_ctrl_c_without_an_answer_ends_nothing(monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "hello", EOFError])

    def type_in(prompt):
        if isinstance(word := next(typed), str):
            return word
        raise word

    monkeypatch.setattr("builtins.input", type_in)
    assert (_asked(), _asked()) == ("hello", None)


def test_models_are_loaded_while_the_first_line_is_typed(monkeypatch, capsys):
    typed = threading.Event()

    def type_in(prompt):
        typed.set()
        return "hello"

    def load():
        sys.stderr.write("a warning")
        assert typed.wait(20)
        return "an ensemble"

    monkeypatch.setattr("builtins.input", type_in)
    assert _while_typing(load) == ("an ensemble", "hello")
    assert "a warning" in capsys.readouterr().err


def test_models_that_cannot_be_loaded_end_the_typing(monkeypatch, interruptible):
    typing = threading.Event()

    def load():
        assert typing.wait(20)
        raise CheckpointError("no model")

    def type_in(prompt):
        typing.set()
        for _ in range(2000):  # as none of them is cut short
            time.sleep(0.01)
        pytest.fail("nobody came")

    monkeypatch.setattr("builtins.input", type_in)
    with pytest.raises(CheckpointError, match="no model"):
        _while_typing(load)


def test_what_does_not_fit_is_said_and_the_conversation_goes_on(caplog):
    done = run(*BOTH, "--rule", "logit-mean:weights=auto", stdin=f"{'king ' * 600}\nAnd the king said\n")
    assert "mixed by logit-mean: wide/gpt2 0.69, wide/llama 0.31" in caplog.text
    assert done.returncode == 0, done.stderr
    assert "context" in done.stderr
    assert done.stdout.strip()
