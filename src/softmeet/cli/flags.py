"""A command's flags from objects: a parameter of a dataclass stands for its fields, ``**settings`` for all settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from softmeet.errors import InvalidInputError
from softmeet.rules.frozen import takes
from softmeet.rules.registry import rule_names
from softmeet.rules.settings import Settings

C = TypeVar("C", bound=Callable[..., Any])
# What a fit finds, and nobody says.
_NO_FLAGS = ("bands", "rule_temperature")


def flags(*but: str, only: tuple[str, ...] = ()) -> Callable[[C], C]:
    """Give a command a flag for each field of the dataclasses that it takes, and for each setting of an ensemble.

    Args:
        but: settings that it has no flag for.
        only: the settings that it has flags for; all if empty. None without ``**settings``.
    """

    def decorated(command: C) -> C:
        taken = inspect.signature(command, eval_str=True).parameters.values()
        groups: dict[str, Any] = {p.name: p.annotation for p in taken if is_dataclass(p.annotation)}
        every: list[inspect.Parameter] = []
        for p in taken:
            if p.name in groups:
                hints = get_type_hints(groups[p.name])
                every += [
                    _parameter(f.name, f.default, Annotated[hints[f.name], f.metadata["option"]])
                    for f in fields(groups[p.name])
                ]
            elif p.kind is inspect.Parameter.VAR_KEYWORD:
                chosen = [name for name in only or Settings.model_fields if name not in (*but, *_NO_FLAGS)]
                place = 1 + next((k for k, q in enumerate(every) if q.name == "members"), -1)
                every[place:place] = map(_setting, chosen)
            else:
                every.append(p)

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
    """Make a field of a dataclass that a command takes: its default, a line of help, and its flags.

    Args:
        default: of the field.
        about: the line of help.
        names: of the flag, where it is not the field's own.
        shown: the default as help shows it.
        limits: of the value, ``min`` and ``max``.
    """
    return field(default=default, metadata={"option": typer.Option(*names, help=about, show_default=shown, **limits)})


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _setting(name: str) -> inspect.Parameter:
    """A setting's flag: a number, a switch, or a text that is read later."""
    setting = Settings.model_fields[name]
    kinds = [kind for kind in (bool, int, float) if takes(setting, kind) and not takes(setting, tuple)]
    shown = str(setting.get_default() or "") or False
    about = f" Rules: {', '.join(rule_names())}." if name == "rule" else ""
    option = typer.Option(flag_of(name), help=f"{setting.description}{about}", show_default=shown)
    return _parameter(name, None, Annotated[(kinds[0] if kinds else str) | None, option])


def flag_of(name: str) -> str:
    """Give the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values of settings' flags, and refuse what no ensemble takes, before anything is loaded.

    Raises:
        InvalidInputError: a value is unusable, or named twice.
    """
    given = {name: _read(name, value) for name, value in settings.items() if value is not None}
    Settings.of(given)
    return given


def _read(name: str, value: Any) -> Any:
    """Lists of numbers have commas: ``0.3`` → 0.3, ``0.3,1,inf`` → [0.3, 1, inf]."""
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
