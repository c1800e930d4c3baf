"""The server as a Ray Serve application: replicas of the ensembles, and before them what outlives each of them.

A front without models takes every request, passes it to the replica with the fewest, and hands its answer back. A
replica that dies is started again; answers that it had begun end with an error object, those of others go on.

``serve run softmeet.server.replicas:app ensembles=wide replicas=2`` runs it on a cluster, as does ``softmeet serve
--engine ray``.
"""

import contextlib
import os
import warnings
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from ray.exceptions import RayActorError
from starlette.types import ASGIApp, Message

from softmeet.errors import InvalidInputError
from softmeet.server.app import create_app
from softmeet.server.asgi import run
from softmeet.server.ensembles import load, named
from softmeet.server.errors import InternalError
from softmeet.server.metrics import Metrics
from softmeet.server.relay import Relay
from softmeet.server.security import Guard, Protection
from softmeet.server.serving import ServerSettings, Serving

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
with warnings.catch_warnings():  # of its own imports
    warnings.simplefilter("ignore")
    from ray import serve
    from ray.serve.exceptions import DeploymentUnavailableError

NAME = "softmeet"
HEADER = "x-softmeet-replica"
# Streams that the front holds open at once.
_MOST = 10_000


class Scale(BaseModel):
    """How many replicas there are, and what each takes.

    Args:
        replicas: how many at least.
        max_replicas: how many at most; None for a fixed number.
        streams: how many a replica should have at once: where there are more or fewer, replicas come or go.
        threads: of torch, and cores, of each.
        gpus: devices of each, or a part of one.
        fronts: processes that pass requests on; where one dies, its connections break.
    """

    model_config = ConfigDict(extra="forbid")

    replicas: int = 1
    max_replicas: int | None = None
    streams: float = 32.0
    threads: int = 1
    gpus: float = 0.0
    fronts: int = 1

    def options(self) -> dict[str, Any]:
        """Return the number of replicas as Ray Serve takes it.

        Raises:
            InvalidInputError: there are to be fewer at most than at least.
        """
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        if self.max_replicas < self.replicas:
            raise InvalidInputError(f"expected at most {self.replicas} replicas or more, got {self.max_replicas}")
        bounds = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
        return {"autoscaling_config": {**bounds, "target_ongoing_requests": self.streams}}


class Replica:
    """Ensembles and their batcher, in a process of their own.

    Args:
        named, options: what to serve, as :func:`softmeet.server.ensembles.load` has them.
        settings: of the server.
        threads: how many torch uses.
    """

    def __init__(
        self, named: dict[str, list[str]], options: dict[str, Any], settings: ServerSettings, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._serving = Serving(load(named, **options), settings)
        self._app = create_app(self._serving)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._serving.batcher.start()

    async def __call__(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """Yield the ASGI messages of the answer to one request, given its ASGI scope and its body."""
        async with contextlib.aclosing(run(self._app, scope, body)) as messages:
            async for message in messages:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (HEADER.encode(), self._name.encode())]
                yield message

    def check_health(self) -> None:
        """Raise InternalError where the batcher has ended: Ray then replaces this replica."""
        if not self._serving.batcher.alive:
            raise InternalError("the engine has ended")


def application(
    named: dict[str, list[str]], options: dict[str, Any], settings: ServerSettings, scale: Scale, grace: float = 30.0
) -> serve.Application:
    """Return the application, for ``serve.run``.

    Args:
        named, options: what to serve, as :func:`softmeet.server.ensembles.load` has them.
        settings: of each replica, without the page, which needs a process of its own.
        scale: how many replicas there are, and what each takes.
        grace: how many seconds a replica which is taken away has to end its answers.
    """
    settings = replace(settings, ui=False)
    limits = settings.limits
    replicas = serve.deployment(Replica).options(
        name="replicas",
        # Past its own queue a replica answers 429, as a single server does.
        max_ongoing_requests=limits.rows + limits.waiting + settings.max_choices,
        ray_actor_options={"num_cpus": scale.threads, "num_gpus": scale.gpus},
        graceful_shutdown_timeout_s=grace,
        **scale.options(),
    )
    front = serve.deployment(serve.ingress(_front(settings.protection))()).options(
        name="front", num_replicas=scale.fronts, max_ongoing_requests=_MOST, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(replicas.bind(named, options, settings, scale.threads))


def _front(protection: Protection) -> Callable[[], ASGIApp]:
    """Return what builds the front, in the process where it is to run."""

    def build() -> ASGIApp:
        replicas = serve.get_deployment_handle("replicas").options(stream=True)
        return Guard(Relay(replicas.remote, (RayActorError, DeploymentUnavailableError)), protection, Metrics())

    return build


class Arguments(Scale):
    """What ``serve run softmeet.server.replicas:app`` takes, as ``name=value``; as ``softmeet serve`` has it.

    ``ensembles`` are separated by spaces, ``keys`` by commas. Without keys the cluster's own network is all that
    protects the application.
    """

    ensembles: str = "default=wide"
    rule: str | None = None
    device: str | None = None
    dtype: str | None = None
    keys: str = ""


# Ray asks which class ``arguments`` is of: no annotation of this module may be a string.
def app(arguments: Arguments) -> serve.Application:
    """Return the application that text arguments describe."""
    options = {"rule": arguments.rule, "device": arguments.device, "dtype": arguments.dtype}
    keys = tuple(key for key in arguments.keys.split(",") if key)
    settings = ServerSettings(protection=Protection(keys))
    return application(named(arguments.ensembles.split()), options, settings, arguments)
