"""How commands get their flags, and configuration files with values for them (``--config``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, dataclass_transform, get_type_hints

import typer
import yaml

from softmeet.cli.gone import today
from softmeet.cli.help import ALL, GroupedHelp, grouped, spelling
from softmeet.cli.messages import stoppable
from softmeet.errors import InvalidInputError
from softmeet.rules.frozen import takes, unknown
from softmeet.rules.registry import rule_names
from softmeet.rules.settings import Settings, parse_rule
from softmeet.rules.values import BY_SIZE

C = TypeVar("C", bound=Callable[..., Any])
# Settings without a flag: their values come from a fit.
_WITHOUT_FLAG = ("rule_temperature",)
# The settings of the rule that most users need; help lists the others with advanced options.
_OF_THE_RULE = ("rule", "trust", "weights", "pool", "gate")
# Defaults that are not the field's own: these commands make ensembles, which may be over bytes and have a gate.
_SHOWN = {"rule": "meet, or logit-mean by bytes", "gate": "auto"}
# What stands for a flag's value in help, by the name of its type.
_VALUES = {"int": "N", "float": "X", "Path": "PATH", "str": "TEXT"}


@dataclass_transform()
class Flags:
    """The base of a group of flags: each subclass is a dataclass, whose fields are declared by :func:`flag` and so on.

    ``panel`` is the group of help, one of ``help.PANELS``, that its flags stand in; by default that of its base.
    """

    panel: ClassVar[str]

    def __init_subclass__(cls, panel: str = "") -> None:
        cls.panel = panel or cls.panel
        dataclass(cls)


class Command(GroupedHelp):
    """A typer command in which ``--rule`` overrules ``--config``."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, after dropping a configuration file's values for settings that ``--rule`` itself names.

        This holds for a ``--rule NAME:setting=value`` on the command line, which would else conflict with the file's
        value. The command's own result is returned.

        Raises:
            InvalidInputError, RuleError: if that ``--rule`` cannot be parsed, as by :func:`parse_rule`.
        """
        rule = ctx.params.get("rule")
        if isinstance(rule, str) and ":" in rule and _on_command_line(ctx, "rule"):
            for name in parse_rule(rule)[1]:
                if name in ctx.params and not _on_command_line(ctx, name):
                    ctx.params[name] = None
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line in help, with arguments before ``[OPTIONS]``."""
        arguments = dict(grouped(self.params)).get("Arguments", [])
        return [*map(spelling, arguments), "[OPTIONS]"]


def _on_command_line(ctx: Any, name: str) -> bool:
    """Return whether a parameter's value was given on the command line, not by a file or a default."""
    return getattr(ctx.get_parameter_source(name), "name", None) == "COMMANDLINE"


def flags(*but: str, only: tuple[str, ...] = ()) -> Callable[[C], C]:
    """Return a decorator that gives a command its flags, in the form that typer reads.

    A command gets a flag for each parameter declared with :func:`flag`, :func:`optional` or :func:`switch`, an argument
    for each with :func:`argument`, and ``--config``; parameters with an annotation of typer's stay as they are. A
    parameter whose type is a group of :class:`Flags` is replaced with a flag for each of its fields, and is passed as
    an instance; ``**settings`` is replaced with a flag for each field of :class:`softmeet.Settings` but
    ``rule_temperature``.

    Args:
        but: names of settings that get no flag.
        only: the names of the settings that get a flag; if empty, all but ``but``.

    Returns:
        a decorator of the command's function.
    """

    def decorated(command: C) -> C:
        taken = inspect.signature(command, eval_str=True).parameters.values()
        groups: dict[str, Any] = {p.name: p.annotation for p in taken if is_dataclass(p.annotation)}
        every: list[inspect.Parameter] = []
        for p in taken:
            if p.name in groups:
                hints = get_type_hints(groups[p.name])
                every += [_parameter(f.name, hints[f.name], f, groups[p.name].panel) for f in fields(groups[p.name])]
            elif p.kind is inspect.Parameter.VAR_KEYWORD:
                chosen = [name for name in only or Settings.model_fields if name not in (*but, *_WITHOUT_FLAG)]
                place = 1 + next((k for k, q in enumerate(every) if q.name == "members"), -1)
                every[place:place] = map(_setting, chosen)
            else:
                every.append(_parameter(p.name, p.annotation, p.default))
        about = "A YAML file of options, as softmeet config prints it; options on the command line win."
        every.append(_parameter("config", Path | None, optional(about, is_eager=True, callback=_apply)))
        whole = switch("Show all options, and all about them.", panel="Output", is_eager=True, callback=_show_all)
        every.append(_parameter("help_all", bool, whole))

        @wraps(command)
        def run(config: Path | None = None, help_all: bool = False, **values: Any) -> Any:
            made = {
                name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()
            }
            with stoppable():
                return command(**values, **made)

        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in every}
        return run  # type: ignore[return-value]

    return decorated


def flag(default: Any, about: str, *names: str, shown: str | bool = True, panel: str | None = None, **more: Any) -> Any:
    """Declare a flag, as the default of a command's parameter or of a field of :class:`Flags`.

    Args:
        default: the value if the flag is not given.
        about: the sentence of help.
        names: the flag's spellings, such as ``"--text", "-t"``; by default the parameter's name, as typer spells it.
        shown: the default as help shows it; True for the value itself, False for none.
        panel: the group that help lists the flag in, one of ``help.PANELS``; by default that of the class of
            :class:`Flags` whose field it is, else ``Advanced``.
        more: ``min`` and ``max`` of a number, and any other keyword arguments of ``typer.Option``, such as
            ``metavar`` and ``callback``.

    Returns:
        a dataclass field that holds what ``typer.Option`` takes in its metadata; :func:`flags` makes a parameter of it.
    """
    option = {"help": about, "show_default": shown, "rich_help_panel": panel, **more}
    return field(default=default, metadata={"names": names, "option": option})


def optional(about: str, *names: str, **more: Any) -> Any:
    """Declare a flag that is None unless it is given, with the arguments of :func:`flag`."""
    return flag(None, about, *names, **more)


def at_least_one(about: str, *names: str, **more: Any) -> Any:
    """Declare a flag of a number from 1 on that is None unless it is given, with the arguments of :func:`flag`."""
    return flag(None, about, *names, min=1, **more)


def switch(about: str, *names: str, **more: Any) -> Any:
    """Declare a flag that is off unless it is given, and has no ``--no-``, with the arguments of :func:`flag`."""
    return flag(False, about, *names, **more)


def argument(about: str, *, default: Any = None, **more: Any) -> Any:
    """Declare a command's argument, which is given without a name, with the arguments of :func:`flag`."""
    return flag(default, about, made=typer.Argument, metavar=more.pop("metavar", None), **more)


def _parameter(name: str, kind: Any, default: Any, panel: str | None = None) -> inspect.Parameter:
    """Return a keyword-only parameter for typer, from a default that :func:`flag` made or any other."""
    if isinstance(default, Field):
        option = dict(default.metadata["option"])
        made = option.pop("made", typer.Option)
        option["rich_help_panel"] = option["rich_help_panel"] or panel
        option.setdefault("metavar", next((word for of, word in _VALUES.items() if of in str(kind)), None))
        names = default.metadata["names"] or [flag_of(name)] * (default.default is False)
        kind, default = Annotated[kind, made(*names, **option)], default.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _setting(name: str) -> inspect.Parameter:
    """Return the parameter for a setting's flag: a number, a switch, or a text that :func:`checked_settings` reads."""
    setting = Settings.model_fields[name]
    kinds = [kind for kind in (bool, int, float) if takes(setting, kind) and not takes(setting, tuple)]
    about = (
        f" The rules, explained in docs/guides/choosing-a-rule.md: {', '.join(rule_names())}." if name == "rule" else ""
    )
    shown = _SHOWN.get(name, str(setting.get_default() or "") or False)
    panel = "Mixing" if name in _OF_THE_RULE else "Advanced"
    option = optional(f"{setting.description}{about}", flag_of(name), shown=shown, panel=panel)
    return _parameter(name, (kinds[0] if kinds else str) | None, option)


def flag_of(name: str) -> str:
    """Return the spelling of a setting's flag: ``--max-steps`` for ``max_steps``."""
    return f"--{name.replace('_', '-')}"


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values of settings' flags, and check them before anything is loaded.

    Args:
        settings: each setting's value as typer parsed it, by name; None if its flag was not given.

    Returns:
        the settings that were given, by name, with values as typer parsed them; only texts of numbers between commas,
        such as ``0.3,0.7`` for ``weights``, become lists of floats (a single number for ``trust`` becomes a float).

    Raises:
        InvalidInputError: if a value is invalid, or a setting is named both by its flag and in ``--rule``.
        RuleError: if the rule comes from a package that fails to provide it.
    """
    given = {name: _read(name, value) for name, value in settings.items() if value is not None}
    Settings.of(given)
    return given


def _read(name: str, value: Any) -> Any:
    """Return a setting's value with numbers separated by commas as floats: ``0.3,1,inf`` → [0.3, 1, inf].

    A single number stays a number for ``trust`` (``0.3`` → 0.3), and becomes a list for ``weights``.
    """
    if not isinstance(value, str) or value == BY_SIZE or not takes(Settings.model_fields[name], tuple):
        return value
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        raise InvalidInputError(
            f"expected {flag_of(name)} as numbers separated by commas, such as 0.3,0.7, got {value!r}"
        ) from None
    # A single trust holds for all members; a single weight can only be a single member's, so it stays a list.
    return numbers[0] if len(numbers) == 1 and name == "trust" else numbers


def _show_all(context: typer.Context, wanted: bool) -> None:
    """Print help with all options, and exit; this is typer's callback of ``--help-all``."""
    if wanted:
        context.meta[ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


def _apply(context: typer.Context, parameter: Any, path: Path | None) -> Path | None:
    """Make a file's values the defaults of the command's options; this is typer's callback of ``--config``."""
    if path is not None:
        known = parameters_of(context.command)
        values = {known[name]: value for name, value in values_of(path, context.command).items()}
        context.default_map = dict(context.default_map or {}) | values
    return path


def values_of(path: Path, command: Any) -> dict[str, Any]:
    """Return the values that a YAML file gives to a command's options, by the flags' names with underscores.

    Raises:
        InvalidInputError: if the file is no YAML, holds no map, or names an option that the command lacks.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"expected YAML in {path}, such as 'rule: meet' on a line: {error}") from None
    if not isinstance(found, dict):
        raise InvalidInputError(f"{path}: expected option names and values, such as 'rule: meet', got {found!r}")
    values, known = {str(key).replace("-", "_"): value for key, value in found.items()}, parameters_of(command)
    if stray := sorted(values.keys() - known.keys()):
        said = f"{path}: softmeet {command.name} has no option {stray[0]}{today(f'no such option: --{stray[0]}')}"
        raise unknown(said, stray[0], sorted(known))
    # Lists of numbers may also be YAML lists; the flag takes one text.
    numeric = {key for key in ("trust", "weights") if isinstance(values.get(key), list)}
    return values | {key: ",".join(map(str, values[key])) for key in numeric}


def parameters_of(command: Any) -> dict[str, str]:
    """Map the names of flags, as a file has them, to the names of the command's parameters."""
    return {
        flag.removeprefix("--").replace("-", "_"): str(parameter.name)
        for parameter in command.params
        if parameter.name not in ("config", "help", "help_all")
        for flag in parameter.opts
        if flag.startswith("--")
    }
