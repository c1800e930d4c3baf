"""The server as a deployment of Ray Serve: replicas that each hold the ensembles, behind Ray's proxy.

Ray's proxy passes each request to one of the replicas with few of them, and each part of an answer on as it comes. The
application in the replica is that of a single process: it checks keys before it reads a body. Ray starts another
replica where one dies, and with it end the answers that it was writing.
"""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softmeet.scaling.cluster import connect

with warnings.catch_warnings():  # Ray's imports warn
    warnings.simplefilter("ignore")
    import ray
    from ray import serve

if TYPE_CHECKING:
    from softmeet.server.serving import ServerSettings

NAME = "softmeet"
HEADER = "x-softmeet-replica"


def application(
    named: Mapping[str, list[str]],
    options: Mapping[str, Any],
    settings: ServerSettings,
    replicas: tuple[int, int] = (1, 1),
    *,
    threads: int = 1,
    gpus: float = 0.0,
    grace: float = 30.0,
) -> serve.Application:
    """Return the Ray Serve application of the server, to be given to ``serve.run``.

    Args:
        named: for each ensemble's name its members, as :func:`softmeet.server.ensembles.load` takes them.
        options: that function's further keyword arguments; they are pickled.
        settings: of each replica.
        replicas: the fewest replicas and the most; Ray adds some while each has a full batch, and removes idle ones.
        threads: torch threads of each replica, and the cores that it takes of the cluster's.
        gpus: GPUs that each replica takes of the cluster's; may be a fraction.
        grace: seconds that a replica which Ray removes has to finish its answers.
    """

    def build() -> ASGIApp:
        import torch

        from softmeet.server.app import create_app
        from softmeet.server.ensembles import load
        from softmeet.server.serving import Serving

        torch.set_num_threads(threads)
        return _Named(create_app(Serving(load(dict(named), **options), settings)))

    limits = settings.limits
    # More than a replica accepts, so that it answers 429 itself when it is full, as a single server does.
    most = limits.rows + limits.waiting + settings.max_choices
    bounds = {"min_replicas": replicas[0], "max_replicas": replicas[1], "target_ongoing_requests": limits.rows}
    return serve.deployment(serve.ingress(build)(_Replica)).options(
        name="replicas", max_ongoing_requests=most, max_queued_requests=most, autoscaling_config=bounds,
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus}, graceful_shutdown_timeout_s=grace,
    ).bind()  # fmt: skip


def run(
    application: serve.Application, cores: int, address: str | None, host: str, port: int, announce: Callable[[], None]
) -> None:
    """Deploy an application on a Ray cluster, wait for SIGINT or SIGTERM, and take it down.

    Args:
        application: as :func:`application` returns it.
        cores: those that its replicas take, which a cluster that is started here claims to have at least.
        address: the cluster's; None for ``$RAY_ADDRESS``, or else a cluster of this machine.
        host: the address that Ray's proxies listen on, on every node.
        port: their port.
        announce: called once requests are answered.
    """
    connect(address, cores)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        serve.run(application, name=NAME, route_prefix="/")
        announce()
        ended.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


class _Replica:
    """What Ray asks of a replica beside its answers."""

    app: _Named

    def check_health(self) -> None:
        """Raise InternalError if the batcher has ended. Ray calls it regularly, and then replaces this replica."""
        from softmeet.server.errors import InternalError

        if not self.app.inner.state.serving.batcher.alive:
            raise InternalError("the engine has ended")


class _Named:
    """The application, with the replica's name in a header of its answers."""

    def __init__(self, inner: Any) -> None:
        self.inner, self._name = inner, serve.get_replica_context().replica_id.unique_id.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (HEADER.encode(), self._name)]
            await send(message)

        await self.inner(scope, receive, sending)
