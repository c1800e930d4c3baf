"""The server as a Ray Serve deployment: replicas that each hold the ensembles, behind Ray's own proxy.

``softmeet serve --engine ray`` runs it. A file of one line, ``app = application({"default": ["wide"]}, {},
ServerSettings())``, is what ``serve run FILE:app`` and ``serve deploy`` take.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from softmeet.errors import InvalidInputError
from softmeet.startup import paused_collection, quick_imports

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Replicas wait for these imports, of which Ray's warn.
with paused_collection(), quick_imports(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from ray import serve
    from starlette.types import ASGIApp

    from softmeet.server.app import create_app
    from softmeet.server.ensembles import load
    from softmeet.server.errors import InternalError
    from softmeet.server.serving import ServerSettings, Serving

NAME = "softmeet"


@serve.ingress()
class Replica:
    """One replica: the ensembles, their batcher and the application, in a process of its own that Ray starts."""

    def __init__(
        self, named: dict[str, list[str]], options: Mapping[str, Any], settings: ServerSettings, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._serving = Serving(load(named, **options), settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._serving)

    def check_health(self) -> None:
        """Raise InternalError if the batcher has ended; Ray, which calls this, then replaces the replica."""
        if not self._serving.batcher.alive:
            raise InternalError("the engine has ended")


def application(
    named: dict[str, list[str]],
    options: Mapping[str, Any],
    settings: ServerSettings,
    *,
    replicas: int = 1,
    max_replicas: int | None = None,
    threads: int = 1,
    gpus: float = 0.0,
    grace: float = 30.0,
) -> serve.Application:
    """Return the application of replicas, to be given to ``serve.run``.

    Args:
        named: for each ensemble's name its members, as :func:`softmeet.server.ensembles.load` takes them.
        options: that function's further keyword arguments, ``rule`` and ``dtype`` among them; they are pickled.
        settings: of each replica; the page at /ui is left out in any case, since it works in a single process only.
        replicas: their number, or the least number where ``max_replicas`` is given.
        max_replicas: the largest number; Ray adds replicas while each has more requests than half a batch.
        threads: torch's threads of each, and the number of cores that are reserved for it.
        gpus: GPUs reserved for each; may be a fraction.
        grace: seconds, 0 or more, that a replica which Ray removes has to finish its answers.

    Raises:
        InvalidInputError: if ``max_replicas`` is less than ``replicas``.
    """
    limits, scale = settings.limits, dict[str, Any](num_replicas=replicas)
    if max_replicas is not None:
        if max_replicas < replicas:
            raise InvalidInputError(f"expected at most {replicas} replicas or more, got {max_replicas}")
        bounds = {"min_replicas": replicas, "max_replicas": max_replicas}
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": max(1, limits.rows // 2)}}
    deployment = serve.deployment(Replica).options(
        name="replicas",
        # More than a replica accepts, so that it answers 429 itself when it is full, as a single server does; Ray's
        # own limit of five would starve the batcher.
        max_ongoing_requests=limits.rows + limits.waiting + settings.max_choices,
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
        graceful_shutdown_timeout_s=grace,
        **scale,
    )
    return deployment.bind(named, options, replace(settings, ui=False), threads)
