"""``softmeet``, the entry point: it runs the commands, and turns errors into one line on stderr and an exit code."""

from __future__ import annotations

import io
import logging
import os
import platform
import sys
import warnings
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from softmeet import __version__, freed_memory
from softmeet.cli.advise import advise
from softmeet.cli.answer import answer
from softmeet.cli.chat import chat
from softmeet.cli.check import check
from softmeet.cli.config import config
from softmeet.cli.evaluate import evaluate
from softmeet.cli.fit import fit
from softmeet.cli.flags import Command
from softmeet.cli.generate import generate
from softmeet.cli.gone import said
from softmeet.cli.inspect import inspect
from softmeet.cli.messages import STOPPED, UNREAD, err, stoppable
from softmeet.cli.methods import methods
from softmeet.cli.models import models
from softmeet.cli.serve import serve
from softmeet.cli.terminal import HarmlessFormatter, harmless
from softmeet.cli.trace import trace
from softmeet.errors import SoftmeetError, was_interrupted

# typer's base class of errors in the use of a command, which it does not export.
_Usage: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
app = typer.Typer(
    help="Run several language models as one: what each of them expects next is mixed, and every token is drawn from "
    "the mix. For a first try: softmeet chat a.gguf b.gguf, or softmeet generate 'And the king said', which takes "
    "small bundled models. For the options of a command: softmeet COMMAND --help.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
begun = stoppable("nothing was begun")
for command in (
    chat,
    generate,
    inspect,
    check,
    begun(advise),
    begun(trace),
    begun(evaluate),
    begun(fit),
    begun(answer),
    serve,
    models,
    methods,
    config,
):
    app.command(cls=Command)(command)
app.command("run", cls=Command, hidden=True)(chat)


def _version(wanted: bool) -> None:
    """Print the version and exit, if ``--version`` was given."""
    if wanted:
        with_them = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers"))
        typer.echo(f"softmeet {__version__} (python {platform.python_version()}, {with_them}, {platform.system()})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Show the version, with those of Python, torch and transformers, and exit.",
        ),
    ] = False,
) -> None:
    """Sample from several language models as one."""


def quiet_libraries() -> None:
    """Keep warnings and notices of the libraries in use from the user, who can do nothing about them.

    Errors still come through, and so do warnings that Python's ``-W`` or ``$PYTHONWARNINGS`` asks for.
    """
    warnings.formatwarning = lambda message, *_: harmless(f"warning: {message}\n")
    # Which prints warnings of loggers that have no handler.
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(HarmlessFormatter())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.warnoptions:
        for library in ("accelerate", "huggingface_hub", "torch", "transformers"):
            warnings.filterwarnings("ignore", module=library)


def speak_utf8() -> None:
    """Have stdin, stdout and stderr hold UTF-8, as files do, in any locale, unless ``$PYTHONIOENCODING`` is set.

    Names of files that are not UTF-8 are printed as they are on stdout, but for controls, and escaped on stderr.
    """
    # Of a stream that is closed, Python makes none.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - while the process lasts
    if "PYTHONIOENCODING" in os.environ:
        return
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def main() -> None:
    """Run the command line.

    Exit with code 2 and one line on stderr after an error that the user can correct (SoftmeetError, ValueError, OSError
    or a wrong use of options), with 130 after Ctrl-C, and in silence with 141 if the reader of a pipe has gone. Other
    exceptions are raised.
    """
    freed_memory.keep()
    quiet_libraries()
    speak_utf8()
    try:
        code = _run()
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as end:
        # typer and rich turn a broken pipe into an exit of their own.
        if not isinstance(end if isinstance(end, OSError) else end.__context__, BrokenPipeError):
            raise
        code = UNREAD
    if code in (STOPPED, UNREAD):
        # A normal exit would wait for threads that are still computing, whose results nobody needs.
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    """Run the command that the words of the command line name, and return the exit code; say what was wrong."""
    try:
        code = app(standalone_mode=False)
    except BrokenPipeError:
        raise
    except _Usage as error:
        code = _misused(error)
    except (SoftmeetError, ValueError, OSError) as error:
        if was_interrupted(error):
            raise
        code = _fail(str(error))
    return code if isinstance(code, int) else 0


def _misused(error: Any) -> int:
    """Say what is wrong with the words of a command, or print its help if there are none; return the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(error.exit_code)
    path = error.ctx.command_path if getattr(error, "ctx", None) else "softmeet"
    message = error.format_message().rstrip(".")
    message = f"{message[:1].lower()}{message[1:]}"
    return _fail(f"{said(message, sys.argv)}; see {path} --help")


def _fail(message: str) -> int:
    """Print an error in one line on stderr, and return the exit code."""
    err.print(Text.assemble(("error:", "bold red"), " ", harmless(" ".join(message.split()))), soft_wrap=True)
    return 2


if __name__ == "__main__":
    main()
