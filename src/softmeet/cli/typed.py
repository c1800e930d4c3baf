"""What is typed into a chat: texts of one line or several, and Ctrl-C, which never leaves anything half done."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from softmeet.cli.messages import say
from softmeet.suspended import Control

# What ends a chat where it is all of a line, and what begins and ends a text of several lines.
_ENDS, _LINES = ("/bye", "/exit", "/quit", "exit", "quit"), '"""'


class CtrlC:
    """What Ctrl-C does in a chat: it ends the answer that is being written, or the line that is being typed.

    At all other moments it does nothing. An exception, as Python raises it, could come in the middle of anything.
    """

    def __init__(self) -> None:
        self._answer: Control | None = None
        self._typing = False

    def __call__(self, number: int, frame: Any) -> None:
        """Handle the signal."""
        if self._answer is not None:
            self._answer.stop()
        elif self._typing:
            raise KeyboardInterrupt

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Enter a context in which Ctrl-C does that."""
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def answering(self, control: Control) -> Iterator[None]:
        """Enter a context in which an answer is written under a control."""
        self._answer = control
        try:
            yield
        finally:
            self._answer = None

    @contextmanager
    def typing(self) -> Iterator[None]:
        """Enter a context in which a line is typed."""
        self._typing = True
        try:
            yield
        finally:
            self._typing = False


def edit_lines() -> None:
    """Have lines edited and remembered, and a paste be one text, where Python can do so."""
    with suppress(ImportError):  # as on Windows
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")


def asked(ctrl_c: CtrlC, stopped: Callable[[], bool] = lambda: False) -> str | None:
    """Return the next text that is typed; None at the end.

    Args:
        ctrl_c: is told when a line is typed.
        stopped: whether nobody waits for a text any more.

    Raises:
        KeyboardInterrupt: if it comes when ``stopped`` says so; else Ctrl-C ends nothing.
    """
    while True:
        try:
            with ctrl_c.typing():
                text = _typed()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if stopped():
                raise
            say("/bye or Ctrl-D ends the program")
            continue
        if text:
            return None if text in _ENDS else text


def _typed() -> str:
    """Return a line, or all lines between two marks."""
    shown = sys.stdin.isatty()
    text = input("> " if shown else "").strip()
    if not text.startswith(_LINES):
        return text
    text = text.removeprefix(_LINES)
    while not text.endswith(_LINES):
        text += "\n" + input(". " if shown else "").rstrip()
    return text.removesuffix(_LINES).strip()
