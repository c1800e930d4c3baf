"""``softmeet chat``: talk with several models as one."""

from __future__ import annotations

import _thread
import io
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from softmeet.cli import options
from softmeet.cli.flags import argument, flags, optional, switch
from softmeet.cli.messages import say
from softmeet.cli.talk import Talk, TalkFlags
from softmeet.cli.typed import CtrlC, asked, edit_lines
from softmeet.errors import InvalidInputError
from softmeet.members.names import require_there

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble


@flags()
def chat(
    *,
    named: list[str] | None = argument(
        "Two models or more: files, folders or names, as -m takes them.", metavar="MODEL..."
    ),
    members: options.Members = None,
    system: str | None = optional("The system's message before the conversation.", panel="Text"),
    colors: bool = switch("Colour text by the model that finds it likelier than the others do.", panel="Output"),
    sampling: TalkFlags,
    loading: options.LoadingFlags,
    **settings: Any,
) -> None:
    """Talk with several models as one (or: softmeet run); /help says what can be typed.

    Example: softmeet chat a.gguf b.gguf
    """
    every = [*(named or ()), *(members or ())]
    if said := next((word for word in every if " " in word and "+" not in word and not Path(word).exists()), None):
        raise InvalidInputError(
            f"expected models alone, got {said!r}: type it once the chat has begun, or answer once by softmeet "
            f"generate {shlex.quote(said)} --chat -m MODEL"
        )
    loading.refuse_over_union([], ["--one-member"] if sampling.one_member else [])
    if colors and sampling.one_member:
        raise InvalidInputError("--colors needs what all members say: leave out --one-member")
    typing, text, ctrl_c = sys.stdin.isatty(), None, CtrlC()
    load = partial(loading.ensemble, every or None, settings, to_write=True, shown=not typing)
    if typing:
        require_there(every)
        say("/help says what can be typed")
        edit_lines()
        ensemble, text = _while_typing(load, ctrl_c)
    else:
        ensemble = load()
    _take_templates(ensemble)
    talk = Talk(ensemble, sampling, system, ctrl_c)
    if colors:
        talk.do_colors()
    with ctrl_c.obeyed():
        while (text := text or asked(ctrl_c)) is not None:
            if not talk.obey(text):
                talk.answer(text)
            text = None


def _while_typing(load: Callable[[], Ensemble], ctrl_c: CtrlC) -> tuple[Ensemble, str]:
    """Load while the first line is typed, and return both; what is said of loading comes after the line.

    Raises:
        Exception: as loading raises, at once, whatever has been typed.
        typer.Exit: if nothing more is to be typed.
    """

    def failed() -> bool:
        return task.done() and task.exception() is not None

    terminal, said = sys.stderr, io.StringIO()
    try:
        with ThreadPoolExecutor(1) as pool, redirect_stderr(said):
            task = pool.submit(load)
            task.add_done_callback(lambda task: _interrupt() if task.exception() else None)
            text = asked(ctrl_c, failed)
            if text is None:
                raise typer.Exit
            if not task.done():
                print("still loading", file=terminal)
            return task.result(), text
    except KeyboardInterrupt:
        if failed():
            task.result()
        raise
    finally:
        terminal.write(said.getvalue())


def _interrupt() -> None:
    """Have the main thread leave off waiting for a line."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(cast(int, threading.main_thread().ident), signal.SIGINT)
    else:
        _thread.interrupt_main()


def _take_templates(ensemble: Ensemble) -> None:
    """Have members without a chat template take a plain one, and say so."""
    from softmeet.hf.chat import chat_of, take_plain

    if chat_of(ensemble.model).missing:
        take_plain(ensemble.model)
    if plainly := chat_of(ensemble.model).plainly:
        say(
            f"{', '.join(map(options.short, plainly))}: no chat template of their own, so these are hardly made for "
            "conversations, and answers may make no sense: take chat (instruct) models; a plain template is used"
        )
