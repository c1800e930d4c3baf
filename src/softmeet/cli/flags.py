"""The flags of a command, and configuration files that give their values (``--config``, ``softmeet config``)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
import yaml
from typer.core import TyperCommand

from softmeet.cli.old_forms import modern_values, modern_words
from softmeet.errors import InvalidInputError
from softmeet.rules.frozen import takes, unknown
from softmeet.rules.registry import rule_names
from softmeet.rules.settings import Settings, parse_rule

C = TypeVar("C", bound=Callable[..., Any])
# Only a fit finds values for these.
_WITHOUT_FLAG = ("bands", "rule_temperature")
# Commands whose options took several values in a row before 0.2.
_TOOK_SEVERAL = ("trace", "evaluate", "fit", "pretrained")


class Command(TyperCommand):
    """A command that reads the spellings of older versions, and lets a rule overrule a configuration file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Translate older spellings to today's, then parse; the word after an option's value may be an argument."""
        has_arguments = any(p.param_type_name == "argument" for p in self.params)
        several = self.name in _TOOK_SEVERAL and not (has_arguments and args[:1] and args[0].startswith("-"))
        return super().parse_args(ctx, modern_words(args, several=several))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; settings inside ``--rule`` on the command line win over a configuration file's."""
        rule = ctx.params.get("rule")
        if isinstance(rule, str) and ":" in rule and _on_command_line(ctx, "rule"):
            for name in parse_rule(rule)[1]:
                if name in ctx.params and not _on_command_line(ctx, name):
                    ctx.params[name] = None
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line, with arguments before options, as in the examples."""
        options, *arguments = super().collect_usage_pieces(ctx)
        return [*arguments, options]


def _on_command_line(ctx: Any, name: str) -> bool:
    return getattr(ctx.get_parameter_source(name), "name", None) == "COMMANDLINE"


def flags(*but: str, only: tuple[str, ...] = ()) -> Callable[[C], C]:
    """Give a command its flags: those that :func:`flag` declares, one for each setting of an ensemble, ``--config``.

    Parameters whose type is a dataclass stand for the fields of that dataclass, and ``**settings`` for the settings.

    Args:
        but: names of settings that get no flag.
        only: names of the settings that get one; all if empty.

    Returns:
        A decorator for the command's function.
    """

    def decorated(command: C) -> C:
        taken = inspect.signature(command, eval_str=True).parameters.values()
        groups: dict[str, Any] = {p.name: p.annotation for p in taken if is_dataclass(p.annotation)}
        every: list[inspect.Parameter] = []
        for p in taken:
            if p.name in groups:
                hints = get_type_hints(groups[p.name])
                every += [_parameter(f.name, hints[f.name], f) for f in fields(groups[p.name])]
            elif p.kind is inspect.Parameter.VAR_KEYWORD:
                chosen = [name for name in only or Settings.model_fields if name not in (*but, *_WITHOUT_FLAG)]
                place = 1 + next((k for k, q in enumerate(every) if q.name == "members"), -1)
                every[place:place] = map(_setting, chosen)
            else:
                every.append(_parameter(p.name, p.annotation, p.default))
        about = "A YAML file of options, under the flags' names."
        every.append(_parameter("config", Path | None, flag(None, about, is_eager=True, callback=_apply)))

        @wraps(command)
        def run(config: Path | None = None, **values: Any) -> Any:
            made = {
                name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()
            }
            return command(**values, **made)

        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in every}
        return run  # type: ignore[return-value]

    return decorated


def flag(default: Any, about: str, *names: str, shown: str | bool = True, **limits: Any) -> Any:
    """Declare a flag, as the default of a command's parameter or of a dataclass's field.

    Args:
        default: the value where the flag is not given.
        about: one line of help.
        names: how the flag is spelled, if not as the parameter or field.
        shown: the default as help shows it; False hides it.
        limits: ``min`` and ``max`` of a number, and what else a typer.Option takes.

    Returns:
        A field for dataclasses; :func:`flags` reads it.
    """
    return field(default=default, metadata={"option": typer.Option(*names, help=about, show_default=shown, **limits)})


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    if isinstance(default, Field):
        kind, default = Annotated[kind, default.metadata["option"]], default.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _setting(name: str) -> inspect.Parameter:
    """Make a setting's parameter: a number, a switch, or a text that :func:`checked_settings` reads."""
    setting = Settings.model_fields[name]
    kinds = [kind for kind in (bool, int, float) if takes(setting, kind) and not takes(setting, tuple)]
    about = f" Rules: {', '.join(rule_names())}." if name == "rule" else ""
    shown = str(setting.get_default() or "") or False
    option = flag(None, f"{setting.description}{about}", flag_of(name), shown=shown)
    return _parameter(name, (kinds[0] if kinds else str) | None, option)


def flag_of(name: str) -> str:
    """Return how a setting's flag is spelled: ``max_steps`` → ``--max-steps``."""
    return f"--{name.replace('_', '-')}"


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values of settings' flags, and refuse what no ensemble takes, before anything is loaded.

    Args:
        settings: values by name, as typer parses them; None where a flag was not given.

    Returns:
        Those that were given, lists of numbers as lists of floats.

    Raises:
        InvalidInputError: a value is unusable, or a setting is named twice.
    """
    given = {name: _read(name, value) for name, value in settings.items() if value is not None}
    Settings.of(given)
    return given


def _read(name: str, value: Any) -> Any:
    """Split lists of numbers at commas: ``0.3`` → 0.3, ``0.3,1,inf`` → [0.3, 1, inf]."""
    if not isinstance(value, str) or not takes(Settings.model_fields[name], tuple):
        return value
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        raise InvalidInputError(
            f"expected {flag_of(name)} as numbers separated by commas, such as 0.3,0.7, got {value!r}"
        ) from None
    # One trust serves all members; one weight is that of the only member.
    return numbers[0] if len(numbers) == 1 and name == "trust" else numbers


def _apply(context: typer.Context, parameter: Any, path: Path | None) -> Path | None:
    """Make a file's values the defaults of the command's own options; the callback of ``--config``."""
    if path is not None:
        known = _parameters(context.command)
        values = {known[name]: value for name, value in _values_of(path, context.command).items()}
        context.default_map = dict(context.default_map or {}) | values
    return path


def _values_of(path: Path, command: Any) -> dict[str, Any]:
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


def config(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="Which command's options.")] = "generate",
    config: Annotated[Path | None, typer.Option(help="A YAML file of options.")] = None,
) -> None:
    """Show a command's options as a YAML file would have them, with a file's values if --config gives one."""
    commands = context.parent.command.commands  # type: ignore[union-attr]  # softmeet is a group
    if command not in commands:
        raise InvalidInputError(f"unknown command {command!r}: expected one of {', '.join(commands)}")
    target = commands[command]
    values = _values_of(config, target) if config else {}
    defaults = {parameter.name: parameter.default for parameter in target.params}
    every = {name: values.get(name, defaults[parameter]) for name, parameter in _parameters(target).items()}
    yaml.safe_dump(every, sys.stdout, sort_keys=False)
