"""``softmeet config``: print a command's options as a file for ``--config``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from softmeet.cli.flags import parameters_of, values_of
from softmeet.cli.help import default, grouped, sentence
from softmeet.rules.frozen import unknown


def config(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="The command, such as evaluate.")] = "generate",
    config: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Show this file's values in place of the defaults.")
    ] = None,
) -> None:
    """Print a command's options as a YAML file, to change and to give with --config.

    Options without a default are comments.

    Example: softmeet config evaluate > my.yaml
    """
    group: Any = context.parent and context.parent.command
    commands: dict[str, Any] = {name: own for name, own in group.commands.items() if not own.hidden}
    if command not in commands:
        raise unknown(f"unknown command {command!r}", command, list(commands))
    target = commands[command]
    values = values_of(config, target) if config else {}
    names = {parameter: name for name, parameter in parameters_of(target).items()}
    for title, own in grouped(target.params):
        settable = [(names[p.name], p) for p in own if p.name in names]
        typer.echo(f"# === {title}\n" if settable else "", nl=False)
        for key, parameter in settable:
            value = values.get(key, parameter.default)
            typer.echo(textwrap.fill(sentence(parameter), 100, initial_indent="# ", subsequent_indent="# "))
            typer.echo(f"# {key}: {default(parameter)}\n" if value is None else yaml.safe_dump({key: value}))
