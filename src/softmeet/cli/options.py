"""Options that several commands share, and what turns them into an ensemble."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from softmeet.cli.old_forms import repeated
from softmeet.errors import InvalidInputError
from softmeet.members.zoo import DEFAULT as FAMILY
from softmeet.members.zoo import short as short

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from softmeet.ensemble import Ensemble

C = TypeVar("C", bound=Callable[..., Any])

err = Console(stderr=True)
STOPPED = 130
DEFAULT_MEMBERS = FAMILY

Members = Annotated[
    list[str] | None,
    typer.Option(
        "--member",
        "-m",
        help="A hub id, folder, GGUF file, bundled name or saved ensemble; repeat it.",
        show_default="wide",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16, float64 or auto.", show_default="float32 on CPU"),
]
Device = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        help="Such as cpu, cuda, disk or auto (accelerate's choice), for all members, or repeated for each; or a YAML "
        "or JSON file with a place for each module, or a list of such maps and places, one per member.",
        show_default="cpu",
    ),
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint.")]


def numbers(name: str, text: str | None) -> list[float] | float | None:
    """``0.3`` → 0.3; ``0.3,1,inf`` → [0.3, 1, inf].

    Raises:
        InvalidInputError: not numbers.
    """
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInputError(
            f"expected {name} as numbers separated by commas, such as 0.3,0.7, got {text!r}"
        ) from None
    return values[0] if len(values) == 1 else values


def placement(given: list[str] | None) -> Any:
    """One place for all members, or one each; a YAML or JSON file → what it holds.

    Raises:
        InvalidInputError: the file is not YAML, or holds neither a map nor a list.
    """
    places = repeated("--device", given)
    if not places:
        return None
    device = places[0] if len(places) == 1 else ""
    if not device.endswith((".yaml", ".yml", ".json")):
        return device or places
    import yaml

    try:
        found = yaml.safe_load(Path(device).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InvalidInputError(f"expected YAML or JSON in {device}: {error}") from None
    if not isinstance(found, dict | list):
        raise InvalidInputError(
            f"expected {device} to hold a device for each module, or a list with one entry per member, got {found!r}"
        )
    return found


@contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """Ctrl-C ends the command with a sentence and the exit code ``STOPPED``."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped: {advice}")
        raise typer.Exit(STOPPED) from None


@stoppable("members were being loaded, and nothing is changed")
def load_ensemble(members: list[str] | None, *, settings: Mapping[str, Any] | None = None, **loading: Any) -> Ensemble:
    """Load with progress on stderr, and without transformers' own chatter.

    Args:
        members: names; the default family if there is none.
        settings: as the flags of :func:`with_settings` give them.
        loading: of ``Ensemble.from_pretrained``.

    Raises:
        InvalidInputError, CheckpointError, VocabularyMismatchError, UnsupportedHeadError: as ``Ensemble``.
    """
    given = checked_settings(settings or {})
    with status("loading softmeet"):
        from transformers.utils import logging

        from softmeet.ensemble import Ensemble

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if "device" in loading:
        loading["device"] = placement(loading["device"])
    with err.status("loading") as progress:
        return Ensemble.from_pretrained(
            members[0] if members and len(members) == 1 else members or [FAMILY],
            on_progress=lambda name: progress.update(f"loading {escape(short(name))}"),
            **given,
            **loading,
        )


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values of flags, and refuse what no ensemble takes, before anything is loaded.

    Raises:
        InvalidInputError: a value is unusable, or named twice.
    """
    from softmeet.rules.settings import Settings

    given = {name: read_flag(name, value) for name, value in settings.items() if value is not None}
    Settings.of(given)
    return given


def read_flag(name: str, value: Any) -> Any:
    """Read a setting's flag: lists of numbers have commas."""
    from softmeet.rules.frozen import takes
    from softmeet.rules.settings import Settings

    is_list = takes(Settings.model_fields[name], tuple)
    found = numbers(flag_of(name), value) if is_list and isinstance(value, str) else value
    # One weight is the list of one member's.
    return [found] if name == "weights" and isinstance(found, float) else found


def flag_of(name: str) -> str:
    """Give the flag of a setting."""
    return f"--{name.replace('_', '-')}"


# What a fit finds, and nobody says.
_NO_FLAGS = ("bands", "rule_temperature")


def with_settings(*but: str, only: tuple[str, ...] = ()) -> Callable[[C], C]:
    """Give a command that takes ``**settings`` a flag for each setting of an ensemble.

    Args:
        but: settings that it has no flag for.
        only: the settings that it has flags for; all if empty.
    """
    from softmeet.rules.settings import Settings

    chosen = [name for name in only or Settings.model_fields if name not in (*but, *_NO_FLAGS)]

    def decorated(command: C) -> C:
        signature = inspect.signature(command, eval_str=True)
        parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        place = next((k + 1 for k, p in enumerate(parameters) if p.name == "members"), 0)
        flags = [_flag(name, Settings.model_fields[name]) for name in chosen]
        every = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*parameters[:place], *flags, *parameters[place:])
        ]
        command.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in every} | {"return": None}
        return command

    return decorated


def _help(name: str, field: FieldInfo) -> str:
    from softmeet.rules.registry import rule_names

    return f"{field.description} Rules: {', '.join(rule_names())}." if name == "rule" else str(field.description)


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """A setting's flag: a number, a switch, or a text that is read later."""
    from softmeet.rules.frozen import takes

    kinds = [kind for kind in (bool, int, float) if takes(field, kind) and not takes(field, tuple)]
    default = field.get_default()
    kind: Any = kinds[0] if kinds else str
    shown = default if default not in (None, False) else False
    option = typer.Option(flag_of(name), help=_help(name, field), show_default=str(shown) if shown else False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def say(sentence: str) -> None:
    """A notice on stderr."""
    err.print(sentence, style="yellow", highlight=False, soft_wrap=True, markup=False)


def status(message: str) -> AbstractContextManager[Any]:
    """A spinner on stderr, if it is a terminal."""
    return err.status(message)
