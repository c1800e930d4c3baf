"""``--config FILE.yaml`` for every command, and ``softmeet config``, which shows what it resolves to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperGroup

from softmeet.cli.old_forms import modern_values
from softmeet.errors import InvalidInputError
from softmeet.rules.frozen import unknown


def apply(context: typer.Context, parameter: Any, path: Path | None) -> Path | None:
    """Make a file's values the defaults of the command's own options; a callback of ``--config``.

    Raises:
        InvalidInputError: the file is no mapping, or names an option that the command does not have.
    """
    if path is not None:
        known = _parameters(context.command)
        values = {known[name]: value for name, value in _read(path, context.command).items()}
        context.default_map = dict(context.default_map or {}) | values
    return path


def _read(path: Path, command: Any) -> dict[str, Any]:
    """Read the options that a file gives, under the names that the file has for them."""
    found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(found, dict):
        raise InvalidInputError(f"{path}: expected option names and values, such as 'rule: meet', got {found!r}")
    values, known = (
        modern_values({str(key).replace("-", "_"): value for key, value in found.items()}),
        _parameters(command),
    )
    if stray := sorted(values.keys() - known.keys()):
        raise unknown(f"{path}: softmeet {command.name} has no option {stray[0]}", stray[0], sorted(known))
    # Lists of numbers may be written as YAML has them.
    numeric = {key for key in ("trust", "weights") if isinstance(values.get(key), list)}
    return values | {key: ",".join(map(str, values[key])) for key in numeric}


def _parameters(command: Any) -> dict[str, str]:
    """Map the names of flags, as a file has them, to the names of the command's parameters."""
    return {
        flag.removeprefix("--").replace("-", "_"): str(parameter.name)
        for parameter in command.params
        if parameter.name not in ("config", "help")
        for flag in parameter.opts
        if flag.startswith("--")
    }


Config = Annotated[
    Path | None,
    typer.Option("--config", help="A YAML file of options, under the flags' names.", is_eager=True, callback=apply),
]


def config(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="Which command's options.")] = "generate",
    config: Annotated[Path | None, typer.Option(help="A YAML file of options.")] = None,
) -> None:
    """Show a command's options as a YAML file would have them, with a file's values if --config gives one."""
    group = context.parent.command if context.parent else None
    assert isinstance(group, TyperGroup)
    target = group.commands.get(command)
    if target is None:
        raise InvalidInputError(f"unknown command {command!r}: expected one of {', '.join(group.commands)}")
    values = _read(config, target) if config else {}
    defaults = {parameter.name: parameter.default for parameter in target.params}
    every = {name: values.get(name, defaults[parameter]) for name, parameter in _parameters(target).items()}
    yaml.safe_dump(every, sys.stdout, sort_keys=False)
