"""Flags that most commands share, the ensemble and the engine made from them, and messages on stderr."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from softmeet.cli.flags import checked_settings, flag
from softmeet.cli.old_forms import repeated
from softmeet.errors import InvalidInputError
from softmeet.members.zoo import DEFAULT as DEFAULT
from softmeet.members.zoo import short as short

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.scaling.base import Engine

err = Console(stderr=True)
STOPPED = 130
DEFAULT_CLUSTER = "$RAY_ADDRESS, else one of this machine"
_MEMBERS = "A hub id, folder, GGUF file, bundled name or saved ensemble; repeat it."
Members = Annotated[list[str] | None, typer.Option("--member", "-m", help=_MEMBERS, show_default="wide")]


def placement(given: list[str] | None) -> Any:
    """Return the device or devices that ``--device`` names.

    Args:
        given: the option's values, or None if it was not given.

    Returns:
        None if no value is given; one value, for all members; or a list of several values, one for each member. A
        single value that ends with .yaml, .yml or .json is a file; the map or list in it is returned.

    Raises:
        InvalidInputError: if the file is not valid YAML or JSON, or holds neither a map nor a list.
        OSError: if the file cannot be read.
    """
    places = repeated("--device", given)
    device = places[0] if places and len(places) == 1 else places or None
    if not isinstance(device, str) or not device.endswith((".yaml", ".yml", ".json")):
        return device
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
    """Enter a context in which Ctrl-C ends the command: it prints "stopped: ``advice``" and exits with the code 130.

    The text goes to stderr; the exit is the exception ``typer.Exit``. ``@stoppable(advice)`` also works as a decorator:
    the decorated function then runs in such a context.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped: {advice}")
        raise typer.Exit(STOPPED) from None


@contextmanager
def uncollected() -> Iterator[None]:
    """Enter a context without garbage collection, for imports, which make a million objects that are never freed.

    At its end, even after an error, all objects alive are exempted from later collections (``gc.freeze``), and
    collection is enabled, whether or not it was before.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@dataclass
class LoadingFlags:
    """Flags for how and where members are loaded, and whether they are combined over tokens or bytes."""

    dtype: str | None = flag(None, "float32, bfloat16, float16, float64 or auto.", shown="float32 on CPU")
    device: list[str] | None = flag(
        None,
        "Such as cpu, cuda, disk or auto (accelerate's choice), for all members, or repeated for each; or a YAML or "
        "JSON file with a place for each module, or a list of such maps and places, one per member.",
        shown="cpu",
    )
    trust_remote_code: bool = flag(False, "Run code that comes with a checkpoint.", "--trust-remote-code")
    vocabulary: str | None = flag(
        None,
        "What members are combined over: tokens, which they have to share; bytes, by an average; or auto.",
        shown="auto: bytes where tokenizers differ",
    )
    prune: float | None = flag(
        None, "Over bytes, the share of mass from which a tokenization is followed; 0 for all.", shown="0.01", min=0
    )

    def arguments(self) -> dict[str, Any]:
        """Return the flags as keyword arguments of ``Ensemble.from_pretrained``, ``device`` as :func:`placement` does.

        Raises:
            InvalidInputError, OSError: as by :func:`placement`.
        """
        return {**vars(self), "device": placement(self.device)}

    @stoppable("members were being loaded, and nothing is changed")
    def ensemble(self, members: list[str] | None, settings: Mapping[str, Any] | None = None, **more: Any) -> Ensemble:
        """Load an ensemble, with progress on stderr and without transformers' own messages.

        Args:
            members: the members' names, or one saved ensemble or bundled family; the default family if None or empty.
            settings: values of settings' flags by name, as typer parsed them (:func:`checked_settings`), None if a
                flag was not given; None in place of the dict for no settings.
            more: further keyword arguments of ``Ensemble.from_pretrained``, except ``on_progress``.

        Raises:
            InvalidInputError: if a setting or the placement is invalid.
            typer.Exit: with the code 130 after Ctrl-C.
            CheckpointError, VocabularyMismatchError, UnsupportedHeadError: as ``Ensemble.from_pretrained`` raises them.
        """
        given = checked_settings(settings or {})
        with err.status("loading softmeet"), uncollected():
            from transformers.utils import logging

            from softmeet.ensemble import Ensemble

            logging.set_verbosity_error()
            logging.disable_progress_bar()
        with err.status("loading") as progress:
            return Ensemble.from_pretrained(
                members[0] if members and len(members) == 1 else members or DEFAULT,
                on_progress=lambda name: progress.update(f"loading {escape(short(name))}"),
                **self.arguments(),
                **given,
                **more,
            )


@dataclass
class EngineFlags:
    """Flags for where a command does its work: in threads of its own process, or in workers of a Ray cluster."""

    engine: str = flag("local", r"local: threads of this process; ray: workers of a Ray cluster (softmeet\[ray]).")
    workers: int | None = flag(None, "How many.", min=1, shown="as many as cores")
    threads: int = flag(1, "Of torch in each worker; the last bits of results depend on it.", min=1)
    ray_address: str | None = flag(None, "Of a Ray cluster.", shown=DEFAULT_CLUSTER)
    gpus: float = flag(0.0, "Of each Ray worker: part of one, or a number to spread its members over.", min=0)

    def start(self, ensemble: Ensemble | None) -> Engine:
        """Return the engine that the flags ask for: a context manager with a parallel ``map``.

        Args:
            ensemble: the ensemble whose members the work runs; None if the work runs no members.

        Raises:
            InvalidInputError: if the engine is unknown or does not take a flag that was given, if Ray is not installed,
                or if a device is named for members that Ray's workers place.
        """
        on_processor = ensemble is None or all(x.device.type == "cpu" for x in ensemble.model.parameters())
        if self.engine == "local":
            if self.ray_address is not None or self.gpus:
                raise InvalidInputError("--ray-address and --gpus are options of --engine ray")
            from softmeet.scaling.local import LocalEngine, cores

            many = max(1, cores() // self.threads) if on_processor else 1
            return LocalEngine(self.workers or many, self.threads, on_stop=say)
        if self.engine != "ray":
            raise InvalidInputError(f"unknown engine {self.engine!r}: expected local or ray")
        if not on_processor:
            raise InvalidInputError("Ray's workers place the members themselves: leave out --device, and give --gpus")
        require_ray()
        from softmeet.scaling.ray_engine import RayEngine

        return RayEngine(ensemble, self.workers, self.threads, gpus=self.gpus, address=self.ray_address, on_loss=say)


def require_ray() -> None:
    """Check that Ray is installed.

    Raises:
        InvalidInputError: if it is not; the message says how to install it.
    """
    if find_spec("ray") is None:
        raise InvalidInputError("--engine ray needs one more package: pip install 'softmeet[ray]'")


def say(sentence: str) -> None:
    """Print a notice on stderr, so that stdout holds a command's results alone."""
    err.print(sentence, style="yellow", highlight=False, soft_wrap=True, markup=False)
