"""The server as a Ray Serve application: replicas that each hold the ensembles, behind a front without models.

The front takes every request, passes it to the replica with the fewest running, and hands the answer back. Ray restarts
a replica that dies; its unfinished answers end with an error object, and answers of other replicas continue.

``serve run softmeet.server.replicas:app ensembles=wide replicas=2`` runs it on a cluster, as does ``softmeet serve
--engine ray``.
"""

import contextlib
import os
import warnings
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.types import Message

from softmeet.errors import InvalidInputError
from softmeet.startup import paused_collection, quick_imports

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Replicas wait for these imports, of which Ray's warn.
with paused_collection(), quick_imports(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from ray import serve

    from softmeet.server.app import create_app
    from softmeet.server.asgi import run
    from softmeet.server.ensembles import load
    from softmeet.server.errors import InternalError
    from softmeet.server.front import front_of
    from softmeet.server.naming import named
    from softmeet.server.security import Protection
    from softmeet.server.serving import ServerSettings, Serving

NAME = "softmeet"
HEADER = "x-softmeet-replica"
# The most requests that a front has open at once.
_MOST = 10_000


class Scale(BaseModel):
    """How many replicas and fronts there are, and which resources each replica gets.

    Attributes:
        replicas: the number of replicas, or the smallest number if ``max_replicas`` is given.
        max_replicas: the largest number of replicas; None keeps their number fixed.
        streams: with ``max_replicas``, the number of running requests per replica that Ray aims at: it adds replicas
            above it and removes them below it.
        threads: torch threads of each replica, and the number of cores reserved for it.
        gpus: GPUs reserved for each replica; may be a fraction.
        fronts: processes that pass requests on; if one dies, its connections break.
    """

    model_config = ConfigDict(extra="forbid")

    replicas: int = 1
    max_replicas: int | None = None
    streams: float = 32.0
    threads: int = 1
    gpus: float = 0.0
    fronts: int = 1

    def options(self) -> dict[str, Any]:
        """Return the options ``num_replicas``, or with ``max_replicas`` ``autoscaling_config``, of Ray's deployments.

        Raises:
            InvalidInputError: if ``max_replicas`` is less than ``replicas``.
        """
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        if self.max_replicas < self.replicas:
            raise InvalidInputError(f"expected at most {self.replicas} replicas or more, got {self.max_replicas}")
        bounds = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
        return {"autoscaling_config": {**bounds, "target_ongoing_requests": self.streams}}


class Replica:
    """One replica: the ensembles, their batcher and the application, in a process of its own. Ray makes it.

    Args:
        named: for each ensemble's name its members, as :func:`softmeet.server.ensembles.load` takes them.
        options: that function's further keyword arguments.
        settings: the server's settings.
        threads: the number of torch threads.
    """

    def __init__(
        self, named: dict[str, list[str]], options: dict[str, Any], settings: ServerSettings, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._serving = Serving(load(named, **options), settings)
        self._app = create_app(self._serving)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._serving.start()

    async def __call__(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """Yield the ASGI messages of the answer to one request; a header names this replica.

        Args:
            scope: the request's ASGI scope, of type ``http``.
            body: the request's whole body.
        """
        async with contextlib.aclosing(run(self._app, scope, body)) as messages:
            async for message in messages:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (HEADER.encode(), self._name.encode())]
                yield message

    def check_health(self) -> None:
        """Raise InternalError if the batcher has ended. Ray calls it regularly, and then replaces this replica."""
        if not self._serving.batcher.alive:
            raise InternalError("the engine has ended")


def application(
    named: dict[str, list[str]], options: dict[str, Any], settings: ServerSettings, scale: Scale, grace: float = 30.0
) -> serve.Application:
    """Return the Ray Serve application of replicas and fronts, to be given to ``serve.run``.

    Args:
        named: for each ensemble's name its members, as :func:`softmeet.server.ensembles.load` takes them.
        options: that function's further keyword arguments, ``rule`` and ``dtype`` among them; they are pickled.
        settings: of each replica; the page at /ui is left out in any case, since it works in a single process only.
        scale: the number of replicas and fronts, and each replica's resources.
        grace: seconds, 0 or more, that a replica which Ray removes has to finish its answers.

    Raises:
        InvalidInputError: if ``scale.max_replicas`` is less than ``scale.replicas``.
    """
    settings = replace(settings, ui=False)
    limits = settings.limits
    replicas = serve.deployment(Replica).options(
        name="replicas",
        # More than a replica accepts, so that it answers 429 itself when it is full, as a single server does.
        max_ongoing_requests=limits.rows + limits.waiting + settings.max_choices,
        ray_actor_options={"num_cpus": scale.threads, "num_gpus": scale.gpus},
        graceful_shutdown_timeout_s=grace,
        **scale.options(),
    )
    front = serve.deployment(serve.ingress(front_of(settings.protection, settings.cors))()).options(
        name="front", num_replicas=scale.fronts, max_ongoing_requests=_MOST, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(replicas.bind(named, options, settings, scale.threads))


class Arguments(Scale):
    """The arguments of ``serve run softmeet.server.replicas:app``, given as ``name=value``.

    Without ``keys`` the application answers everybody who can reach it. The fields of :class:`Scale` are arguments as
    well.

    Attributes:
        ensembles: saved ensembles or bundled families to serve, each as PATH or NAME=PATH, separated by spaces.
        rule: the rule of all ensembles, with options, as ``--rule`` of ``softmeet serve``; None for each ensemble's
            own.
        device: the place of all members; None for CPU.
        dtype: the members' floating-point type, such as ``bfloat16``; None for fp32 on CPU.
        keys: API keys, separated by commas; a request has to have one of them.
    """

    ensembles: str = "default=wide"
    rule: str | None = None
    device: str | None = None
    dtype: str | None = None
    keys: str = ""


# Ray reads the annotation of ``arguments``, so this module cannot have ``from __future__ import annotations``.
def app(arguments: Arguments) -> serve.Application:
    """Return the Ray Serve application that ``serve run`` starts from arguments of its command line.

    Raises:
        InvalidInputError: if two ensembles have the same name, or ``max_replicas`` is less than ``replicas``.
    """
    options = {"rule": arguments.rule, "device": arguments.device, "dtype": arguments.dtype}
    keys = tuple(key for key in arguments.keys.split(",") if key)
    settings = ServerSettings(protection=Protection(keys))
    return application(named(arguments.ensembles.split()), options, settings, arguments)
