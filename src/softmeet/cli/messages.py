"""Messages on stderr, and the end of a command by Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from softmeet.cli.terminal import PlainConsole

err = PlainConsole(stderr=True)
# The exit code after Ctrl-C, and where the reader of a pipe has gone: 128 and the signal's number, as shells have it.
STOPPED, UNREAD = 130, 141


def say(sentence: str) -> None:
    """Print a notice on stderr, so that stdout holds a command's results alone."""
    err.print(sentence, style="yellow", highlight=False, soft_wrap=True)


@contextmanager
def stoppable(advice: str = "") -> Iterator[None]:
    """Enter a context in which Ctrl-C ends the command: "stopped: ``advice``" is said, and the exit code is 130.

    The text goes to stderr; the exit is the exception ``typer.Exit``. Without advice, "stopped" is all that is said.
    ``@stoppable(advice)`` also works as a decorator: the decorated function then runs in such a context.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped: {advice}" if advice else "stopped")
        raise typer.Exit(STOPPED) from None
