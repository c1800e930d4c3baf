"""The flags of a command: one for each field of a dataclass that it takes, and ``**settings`` for all settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand

from softmeet.cli.old_forms import modern_words
from softmeet.errors import InvalidInputError
from softmeet.rules.frozen import takes
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
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def flags(*but: str, only: tuple[str, ...] = ()) -> Callable[[C], C]:
    """Give a command a flag for each :func:`flag`, and, if it takes ``**settings``, for each setting of an ensemble.

    Parameters whose type is a dataclass stand for the fields of that dataclass.

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

        @wraps(command)
        def run(**values: Any) -> Any:
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
        limits: ``min`` and ``max`` of a number.

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
