"""Flags that most commands share, how they make an ensemble and an engine, and what is said on stderr."""

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
    """Read ``--device``: one place for all members, or one each; of a YAML or JSON file, what it holds.

    Raises:
        InvalidInputError: the file is not YAML, or holds neither a map nor a list.
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
    """Turn Ctrl-C into a sentence on stderr that ends with ``advice``, and the exit code ``STOPPED``."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped: {advice}")
        raise typer.Exit(STOPPED) from None


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector, which would look through a million lasting objects time and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@dataclass
class LoadingFlags:
    """Flags that say how and where members are loaded, and what they are combined over."""

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
        """Return the flags as arguments of ``Ensemble.from_pretrained``, with devices read from their file."""
        return {**vars(self), "device": placement(self.device)}

    @stoppable("members were being loaded, and nothing is changed")
    def ensemble(self, members: list[str] | None, settings: Mapping[str, Any] | None = None, **more: Any) -> Ensemble:
        """Load an ensemble with progress on stderr, and without transformers' own messages.

        Args:
            members: their names; the default family if there is none.
            settings: values of the settings' flags.
            more: further arguments of ``Ensemble.from_pretrained``.

        Raises:
            InvalidInputError, CheckpointError, VocabularyMismatchError, UnsupportedHeadError: as
                ``Ensemble.from_pretrained``.
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
    """Flags that say where a command does its work: in threads of its own process, or on a Ray cluster."""

    engine: str = flag("local", r"local: threads of this process; ray: workers of a Ray cluster (softmeet\[ray]).")
    workers: int | None = flag(None, "How many.", min=1, shown="as many as cores")
    threads: int = flag(1, "Of torch in each worker; the last bits of results depend on it.", min=1)
    ray_address: str | None = flag(None, "Of a Ray cluster.", shown=DEFAULT_CLUSTER)
    gpus: float = flag(0.0, "Of each Ray worker: part of one, or a number to spread its members over.", min=0)

    def start(self, ensemble: Ensemble | None) -> Engine:
        """Start the engine that the flags ask for.

        Args:
            ensemble: what the work refers to, if it refers to one.

        Raises:
            InvalidInputError: an unknown engine, a flag that it does not have, or Ray is not installed.
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
        InvalidInputError: it is not.
    """
    if find_spec("ray") is None:
        raise InvalidInputError("--engine ray needs one more package: pip install 'softmeet[ray]'")


def say(sentence: str) -> None:
    """Print a notice on stderr, so that stdout holds results alone."""
    err.print(sentence, style="yellow", highlight=False, soft_wrap=True, markup=False)
