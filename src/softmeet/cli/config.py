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
    command: Annotated[
        list[str] | None,
        typer.Argument(help="The command, such as evaluate, or study real.", show_default="generate"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Show this file's values in place of the defaults.")
    ] = None,
) -> None:
    """Print a command's options as a YAML file for --config, with defaults; options without a default are comments.

    Example: softmeet config evaluate > my.yaml
    """
    commands, name = _commands(context.parent.command), " ".join(command or ["generate"])  # type: ignore[union-attr]
    if name not in commands:
        raise unknown(f"unknown command {name!r}", name, list(commands))
    target = commands[name]
    values = values_of(config, target) if config else {}
    names = {parameter: name for name, parameter in parameters_of(target).items()}
    for title, own in grouped(target.params):
        settable = [(names[p.name], p) for p in own if p.name in names]
        typer.echo(f"# === {title}\n" if settable else "", nl=False)
        for key, parameter in settable:
            value = values.get(key, parameter.default)
            typer.echo(textwrap.fill(sentence(parameter), 100, initial_indent="# ", subsequent_indent="# "))
            typer.echo(f"# {key}: {default(parameter)}\n" if value is None else yaml.safe_dump({key: value}))


def _commands(group: Any) -> dict[str, Any]:
    """Return the commands of a group, and of the groups in it, by the words that call them."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        inner = _commands(command) if hasattr(command, "commands") else {"": command}
        found |= {f"{name} {rest}".strip(): each for rest, each in inner.items()}
    return found
