"""The front of replicas: it takes requests and passes them on, in a process that imports neither models nor torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from ray.exceptions import RayActorError
from starlette.types import ASGIApp

from softmeet.server.envelope import guarded
from softmeet.server.metrics import Metrics
from softmeet.server.relay import Relay
from softmeet.server.security import Protection

with warnings.catch_warnings():  # Ray's imports warn
    warnings.simplefilter("ignore")
    from ray import serve
    from ray.serve.exceptions import DeploymentUnavailableError


def front_of(protection: Protection, cors: Sequence[str]) -> Callable[[], ASGIApp]:
    """Return a function that builds the front of the deployment ``replicas``, to be called in the front's process.

    Args:
        protection: what a request has to have.
        cors: the origins whose pages may ask.
    """

    def build() -> ASGIApp:
        replicas = serve.get_deployment_handle("replicas").options(stream=True)
        relay = Relay(replicas.remote, (RayActorError, DeploymentUnavailableError))
        return guarded(relay, protection, Metrics(), cors)

    return build
