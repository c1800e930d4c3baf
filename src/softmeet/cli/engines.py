"""``--engine``: where a command does its work."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softmeet.cli import options
from softmeet.errors import InvalidInputError

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.scaling.base import Engine

Address = Annotated[
    str | None,
    typer.Option("--ray-address", help="Of a Ray cluster.", show_default="$RAY_ADDRESS, else one of this machine"),
]
Resume = Annotated[
    Path | None,
    typer.Option("--resume", help="A folder for finished pieces; the same command goes on from there."),
]


@dataclass
class Running:
    """Where a command does its work."""

    engine: Annotated[
        str,
        typer.Option("--engine", help="local: threads of this process; ray: workers of a Ray cluster (softmeet[ray])."),
    ] = "local"
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="How many.", show_default="as many as cores")
    ] = None
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="Of torch in each worker; the last bits of results depend on it.")
    ] = 1
    ray_address: Address = None
    gpus: Annotated[
        float,
        typer.Option("--gpus", min=0, help="Of each Ray worker: part of one, or a number to spread its members over."),
    ] = 0.0

    def start(self, ensemble: Ensemble | None) -> Engine:
        """Give the engine that the options ask for; ``ensemble`` is what the work refers to.

        Raises:
            InvalidInputError: an unknown engine, an option that it does not have, or Ray is not installed.
        """
        if self.engine == "local":
            if self.ray_address is not None or self.gpus:
                raise InvalidInputError("--ray-address and --gpus are options of --engine ray")
            from softmeet.scaling.local import LocalEngine, cores

            many = max(1, cores() // self.threads) if _on_processor(ensemble) else 1
            return LocalEngine(self.workers or many, self.threads, on_stop=options.say)
        if self.engine != "ray":
            raise InvalidInputError(f"unknown engine {self.engine!r}: expected local or ray")
        if not _on_processor(ensemble):
            raise InvalidInputError("Ray's workers place the members themselves: leave out --device, and give --gpus")
        require_ray()
        from softmeet.scaling.ray_engine import RayEngine

        return RayEngine(
            ensemble, self.workers, self.threads, gpus=self.gpus, address=self.ray_address, on_loss=options.say
        )


def require_ray() -> None:
    """Refuse where it is not installed.

    Raises:
        InvalidInputError: so it is.
    """
    if find_spec("ray") is None:
        raise InvalidInputError("--engine ray needs one more package: pip install 'softmeet[ray]'")


def _on_processor(ensemble: Ensemble | None) -> bool:
    return ensemble is None or all(x.device.type == "cpu" for x in ensemble.model.parameters())
