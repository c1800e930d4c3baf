"""``softmeet``: the entry point; turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

from softmeet import __version__
from softmeet.cli.check import check
from softmeet.cli.command import Command
from softmeet.cli.config import config
from softmeet.cli.evaluate import evaluate
from softmeet.cli.fit import fit
from softmeet.cli.generate import generate
from softmeet.cli.inspect import inspect
from softmeet.cli.memory import keep_freed_memory
from softmeet.cli.options import STOPPED, stoppable
from softmeet.cli.serve import serve
from softmeet.cli.study import study
from softmeet.cli.trace import trace
from softmeet.errors import SoftmeetError

app = typer.Typer(
    help="Sample from several language models as one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
begun = stoppable("nothing was begun")
for command in (generate, inspect, check, begun(trace), begun(evaluate), begun(fit), serve, config):
    app.command(cls=Command)(command)
app.add_typer(study, name="study")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"softmeet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Sample from several language models as one."""


def main() -> None:
    """Run the command line; exit code 2 and one line on stderr for anything that the user can put right."""
    keep_freed_memory()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        app()
    except SystemExit as end:
        if end.code == STOPPED:
            # Threads may be amid products that nobody waits for, and Python would.
            sys.stdout.flush()
            os._exit(STOPPED)
        raise
    except (SoftmeetError, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False)
        sys.exit(2)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("[", r"\[")


if __name__ == "__main__":
    main()
