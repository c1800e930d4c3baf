"""``softmeet chat``: talk with several models as one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from softmeet.cli import options
from softmeet.cli.flags import argument, flags, optional, switch
from softmeet.cli.messages import say
from softmeet.cli.talk import Talk, TalkFlags
from softmeet.cli.typed import CtrlC, Typed, messages_above
from softmeet.errors import InvalidInputError
from softmeet.members.files import is_files
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
    sources: bool = switch("Behind an answer, list where stretches of it stand in files:PATH.", panel="Output"),
    colors: bool = switch("Colour text by the model that finds it likelier than the others do.", panel="Output"),
    sampling: TalkFlags,
    loading: options.LoadingFlags,
    **settings: Any,
) -> None:
    """Talk with several models as one (or: softmeet run); /help says what can be typed.

    Example: softmeet chat a.gguf b.gguf
    """
    every = [*(named or ()), *(members or ())]
    options.require_models(
        every, "type it once the chat has begun, or answer once by softmeet generate {} --chat -m MODEL"
    )
    loading.refuse_over_union([], ["--one-member"] if sampling.one_member else [])
    if sources and not any(map(is_files, every)):
        raise InvalidInputError("--sources lists places in files: name them beside the models, as in files:~/project")
    if colors and sampling.one_member:
        raise InvalidInputError("--colors needs what all members say: leave out --one-member")
    ctrl_c, text = CtrlC(), None
    typed = Typed(ctrl_c)
    load = partial(loading.ensemble, every or None, settings, to_write=True, shown=not typed.at_terminal)
    if typed.at_terminal:
        require_there(every)
        say("/help says what can be typed")
        ensemble, text = while_typing(load, typed, ctrl_c)
    else:
        ensemble = load()
    _take_templates(ensemble)
    talk = Talk(ensemble, sampling, system, ctrl_c, sources=sources)
    if colors:
        talk.do_colors()
    with ctrl_c.obeyed():
        while (text := text or typed.next()) is not None:
            if not talk.obey(text):
                talk.answer(text)
            text = None


def while_typing(load: Callable[[], Ensemble], typed: Typed, ctrl_c: CtrlC) -> tuple[Ensemble, str]:
    """Load in another thread while the first text is typed, and return both.

    Args:
        load: loads the models.
        typed: tells what is typed.
        ctrl_c: ends the waiting for models, so that another text can be typed; they are loaded on.

    Raises:
        Exception: as loading raises, at once, whatever has been typed.
        typer.Exit: if nothing more is to be typed.
    """
    with ctrl_c.obeyed(), messages_above():
        pool = ThreadPoolExecutor(1)
        task = pool.submit(load)
        task.add_done_callback(lambda task: typed.end() if task.exception() else None)
        while (text := typed.next()) is not None:
            if not task.done():
                say("still loading")
            if ctrl_c.waited(task):
                return task.result(), text
            say("stopped; the models are still loading")
    if task.done():
        task.result()
        raise typer.Exit
    sys.stdout.flush()
    os._exit(0)  # without waiting for the thread that loads


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
