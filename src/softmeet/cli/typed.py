"""What is typed into a chat: texts of one line or several, and Ctrl-C, which never leaves anything half done."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from softmeet.cli.messages import say
from softmeet.suspended import Control

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

# What ends a chat where it is all of a line, and what begins and ends a text of several lines.
_ENDS, _LINES = ("/bye", "/exit", "/quit", "exit", "quit"), '"""'


class CtrlC:
    """What Ctrl-C does in a chat: it ends what is waited for, an answer or the loading of models.

    It does so, too, if it comes before that has begun, but behind the text. An exception, as Python raises it, could
    come in the middle of anything. While a text is typed, Ctrl-C is a key, which :class:`Typed` takes.
    """

    def __init__(self) -> None:
        self._awaited: Control | None = None
        self._came = False

    def __call__(self, number: int, frame: Any) -> None:
        """Handle the signal."""
        self._came = True
        if self._awaited is not None:
            self._awaited.stop()

    def forget(self) -> None:
        """Have a Ctrl-C that has come end nothing, as a text is typed."""
        self._came = False

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Enter a context in which Ctrl-C does that."""
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def stops(self, control: Control) -> Iterator[None]:
        """Enter a context in which something under a control is waited for."""
        self._awaited = control
        if self._came:
            control.stop()
        try:
            yield
        finally:
            self._awaited = None

    def waited(self, task: Future[Any]) -> bool:
        """Wait for a task of another thread, and return whether it has ended; not so if Ctrl-C came first."""
        control = Control()
        with self.stops(control):
            while not control.stopped and wait([task], timeout=0.05).not_done:
                pass
        return task.done()


class Typed:
    """Texts that are typed at a terminal, each at a prompt where it can be edited, or that come through a pipe.

    A paste is one text, and a text of several lines stands between two marks.

    Args:
        ctrl_c: is told when a text is typed.
    """

    def __init__(self, ctrl_c: CtrlC) -> None:
        self.at_terminal, self._ended, self._ctrl_c = sys.stdin.isatty(), False, ctrl_c
        self._prompt: PromptSession[str] | None = None
        self._history: History | None = None

    def next(self) -> str | None:
        """Return the next text; None at the end. Ctrl-C leaves what is typed, and ends nothing."""
        while True:
            self._ctrl_c.forget()
            try:
                text = (self._edited() if self.at_terminal else _piped()).strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                say("/bye or Ctrl-D ends the program")
                continue
            if text.startswith(_LINES) and (text := text.removeprefix(_LINES).removesuffix(_LINES).strip()):
                return text
            if text:
                return None if text in _ENDS else text

    def end(self) -> None:
        """Have a text that is being typed be the end; from any thread."""
        self._ended = True
        if (prompt := self._prompt) and (loop := prompt.app.loop):
            with suppress(RuntimeError):  # as the prompt has just ended
                loop.call_soon_threadsafe(self._leave)

    def _begin(self) -> None:
        """Have a Ctrl-C that has come while the prompt was made be none of the text's; leave it if all is ended."""
        self._ctrl_c.forget()
        self._leave()

    def _leave(self) -> None:
        """Leave the prompt if all is ended."""
        if self._ended and self._prompt and self._prompt.app.is_running and not self._prompt.app.is_done:
            self._prompt.app.exit(exception=EOFError)

    def _edited(self) -> str:
        """Return a text that is typed at a prompt.

        Each prompt is a new one, as Ctrl-C during an answer has a terminal forget what was typed: which may be the end
        of a paste, for which the old one would wait. Ctrl-C right behind a text leaves it.
        """
        from prompt_toolkit import PromptSession
        from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
        from prompt_toolkit.keys import Keys

        self._prompt = PromptSession(
            "> ", multiline=True, key_bindings=_keys(), history=self._history, reserve_space_for_menu=0,
            enable_suspend=True, **terminal(),
        )  # fmt: skip
        self._history = self._prompt.history
        text = self._prompt.prompt(pre_run=self._begin, handle_sigint=False)
        # What has come behind the text is a key, though it would be a signal now.
        keys = self._prompt.input
        ahead = get_typeahead(keys)
        with keys.raw_mode():
            while more := keys.read_keys():
                ahead += more
        if any(typed.key == Keys.ControlC for typed in ahead):
            raise KeyboardInterrupt
        store_typeahead(keys, ahead)
        return text


def terminal() -> dict[str, Any]:
    """Return where a prompt reads and is shown: at the terminal, where stdout and stderr are files, too."""
    from prompt_toolkit.input import create_input
    from prompt_toolkit.output import create_output

    # Who asks a terminal for the cursor's place waits where it does not answer, and takes Ctrl-C for a key meanwhile.
    os.environ["PROMPT_TOOLKIT_NO_CPR"] = "1"
    shown = next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)
    with suppress(OSError):  # as on Windows
        shown = shown or open("/dev/tty", "w")  # noqa: PTH123, SIM115 - as long as the prompt lasts
    return {"input": create_input(), "output": create_output(shown)}


@contextmanager
def messages_above() -> Iterator[None]:
    """Enter a context in which what other threads print stands above the prompt."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield
        return
    from prompt_toolkit.patch_stdout import patch_stdout

    with patch_stdout(raw=True):
        yield


def _keys() -> KeyBindings:
    """Return what Enter does, which ends a text, but within marks a line, and Tab, which is one."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("tab")(lambda event: event.current_buffer.insert_text("\t"))

    @keys.add("enter")
    def enter(event: Any) -> None:
        buffer = event.current_buffer
        if _is_open(buffer.text.strip()):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    return keys


def _piped() -> str:
    """Return a line, or all lines between two marks."""
    text = input().strip()
    while _is_open(text):
        text += "\n" + input().rstrip()
    return text


def _is_open(text: str) -> bool:
    """Return whether a text begins with a mark, and no other one ends it."""
    return text.startswith(_LINES) and not text.removeprefix(_LINES).endswith(_LINES)
