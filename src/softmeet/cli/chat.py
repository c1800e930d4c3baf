"""``softmeet chat``: talk with several models as one."""

from __future__ import annotations

import _thread
import io
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.text import Text

from softmeet.cli import options
from softmeet.cli.flags import argument, at_least_one, flags, optional, switch
from softmeet.cli.messages import say
from softmeet.cli.sampling import SamplingFlags
from softmeet.cli.tables import out
from softmeet.cli.terminal import harmless, write
from softmeet.errors import ContextError, InvalidInputError
from softmeet.members.names import require_there

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble

_HELP = """\
/system TEXT  begin anew, with this as the system's message; without TEXT, without one
/clear        forget what was said
/bye          end; so does Ctrl-D
Ctrl-C ends an answer."""
Piece = tuple[str, list[float]]
# The most tokens of an answer, unless it is said otherwise.
_TOKENS = 1024
# The colours of members, in order, by --colors.
COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red")


class Conversation:
    """A conversation with an ensemble, which remembers what was said.

    Args:
        write: streams an answer to turns, as (new text, each member's disagreement there in nats, maybe none).
        system: the system's message; None for none.
        forgot: called with the number of turns that are forgotten, as they no longer fit into a member's context.

    Attributes:
        turns: what was said, the system's message first.
    """

    def __init__(
        self,
        write: Callable[[Sequence[dict[str, str]]], Iterator[Piece]],
        system: str | None = None,
        forgot: Callable[[int], object] = lambda count: None,
    ) -> None:
        self._write, self._forgot = write, forgot
        self.turns: list[dict[str, str]] = []
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forget what was said, and have another message of the system, None for none."""
        self._system = [{"role": "system", "content": system}] if system else []
        self.turns = list(self._system)

    def clear(self) -> None:
        """Forget what was said, but for the system's message."""
        self.turns = list(self._system)

    def answer(self, text: str) -> Iterator[Piece]:
        """Answer a text, and yield what is new of the answer; one that is left off counts as far as it came.

        Raises:
            ContextError: if the text alone does not fit into a member's context.
        """
        self.turns.append({"role": "user", "content": text})
        said = ""
        try:
            for piece, nats in self._answered():
                said += piece
                yield piece, nats
        except BaseException:
            if not said:
                self.turns.pop()
            raise
        finally:
            if said:
                self.turns.append({"role": "assistant", "content": said})

    def _answered(self) -> Iterator[Piece]:
        forgotten = 0
        while True:
            try:
                for told in self._write(self.turns):
                    if forgotten:
                        self._forgot(forgotten)
                        forgotten = 0
                    yield told
            except ContextError:
                start = len(self._system)
                # A question with its answer at a time; the newest one stays.
                if len(self.turns) - start < 3:
                    raise
                del self.turns[start : start + 2]
                forgotten += 2
            else:
                return


class TalkFlags(SamplingFlags, panel="Sampling"):
    """Flags for how answers are drawn: cooler than other texts, as chats are elsewhere."""

    max_new_tokens: int | None = at_least_one("The most tokens of an answer.", shown="1024")
    temperature: float | None = optional("Higher is more random; 0 always takes the likeliest.", min=0, shown="0.7")

    def arguments(self) -> dict[str, Any]:
        """Return the flags as keyword arguments of ``Ensemble.stream``."""
        cool = self.temperature is None and self.do_sample and not self.one_member
        bounded = not (self.max_new_tokens or self.max_bytes)
        own = {"max_new_tokens": _TOKENS} if bounded else {}
        from softmeet.hf.chat import TEMPERATURE

        return super().arguments() | ({"temperature": TEMPERATURE} if cool else {}) | own


@flags()
def chat(
    *,
    named: list[str] | None = argument(
        "Two models or more: files, folders or names, as -m takes them.", metavar="MODEL..."
    ),
    members: options.Members = None,
    system: str | None = optional("The system's message before the conversation.", panel="Text"),
    colors: bool = switch("Colour text by the model likeliest to say it.", panel="Output"),
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
    typing, text = sys.stdin.isatty(), None
    load = partial(loading.ensemble, every or None, settings, to_write=True, shown=not typing)
    if typing:
        require_there(every)
        say("/help says what can be typed")
        with suppress(ImportError):  # as on Windows
            import readline  # noqa: F401 - input() then edits lines, and remembers them
        ensemble, text = _while_typing(load)
    else:
        ensemble = load()
    _take_templates(ensemble)
    talk = Conversation(
        partial(written, ensemble, sampling.arguments(), colors), system,
        lambda count: say(f"the first {count} turns no longer fit into a member's context, and are forgotten"),
    )  # fmt: skip
    if colors:
        shown = zip(COLORS, ensemble.names, strict=False)
        out().print(Text.assemble(*((f"{harmless(options.short(name))}  ", color) for color, name in shown)))
    while (text := text or _asked()) is not None:
        if not _told(talk, text):
            _print_answer(talk, text, colors=colors)
        text = None


def _while_typing(load: Callable[[], Ensemble]) -> tuple[Ensemble, str]:
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
            text = _asked(failed)
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


def written(ensemble: Ensemble, arguments: dict[str, Any], colors: bool, turns: Any) -> Iterator[Piece]:
    """Stream an answer to turns, with what each member makes of it where colours are asked for."""
    if not colors:
        yield from ((piece, []) for piece in ensemble.stream(turns, **arguments))
        return
    from softmeet.hf.streaming import by_member

    yield from by_member(ensemble.model, ensemble.tokenizer, turns, **arguments)


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


def _asked(stopped: Callable[[], bool] = lambda: False) -> str | None:
    """Return the next line that is typed; None at the end.

    Raises:
        KeyboardInterrupt: if it comes when ``stopped`` says so; else Ctrl-C ends nothing.
    """
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if stopped():
                raise
            say("/bye or Ctrl-D ends the program")
            continue
        if text:
            return None if text in ("/bye", "/exit", "/quit") else text


def _told(talk: Conversation, text: str) -> bool:
    """Do what a line that begins with a slash says; return whether it was one."""
    word, _, rest = text.partition(" ")
    if word == "/system":
        talk.begin(rest.strip() or None)
        say(
            "begun anew"
            + (", with this message of the system" if rest.strip() else ", without a message of the system")
        )
    elif word == "/clear":
        talk.clear()
        say("what was said is forgotten")
    elif word in ("/help", "/?"):
        say(_HELP)
    elif word.startswith("/") and word[1:].isalpha():
        say(f"{word} is nothing that can be typed here: /help lists what is")
    else:
        return False
    return True


def _print_answer(talk: Conversation, text: str, *, colors: bool) -> None:
    """Print an answer as it comes; Ctrl-C ends it, and what was said counts."""
    console, pieces = out(), talk.answer(text)
    try:
        for piece, nats in pieces:
            nearest = COLORS[nats.index(min(nats)) % len(COLORS)] if colors and nats else ""
            write(console, piece, nearest)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
    except InvalidInputError as error:
        say(str(error))
    console.print()
