"""``--engine``: where a command does its work."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softmeet.cli import options
from softmeet.cli.flags import flag
from softmeet.errors import InvalidInputError

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.scaling.base import Engine

HERE = "$RAY_ADDRESS, else one of this machine"
Resume = Annotated[
    Path | None,
    typer.Option("--resume", help="A folder for finished pieces; the same command goes on from there."),
]


@dataclass
class Running:
    """Where a command does its work."""

    engine: str = flag("local", "local: threads of this process; ray: workers of a Ray cluster (softmeet[ray]).")
    workers: int | None = flag(None, "How many.", min=1, shown="as many as cores")
    threads: int = flag(1, "Of torch in each worker; the last bits of results depend on it.", min=1)
    ray_address: str | None = flag(None, "Of a Ray cluster.", shown=HERE)
    gpus: float = flag(0.0, "Of each Ray worker: part of one, or a number to spread its members over.", min=0)

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
