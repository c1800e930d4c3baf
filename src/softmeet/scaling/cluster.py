"""Reach a Ray cluster, or start one on this machine; no statistics of use are sent."""

from __future__ import annotations

import os
import socket

import ray

from softmeet.errors import InvalidInputError

# Read when a cluster starts.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def connect(address: str | None = None, cores: int = 0) -> bool:
    """Join the cluster at ``address``, else at ``$RAY_ADDRESS``, else start one of this machine, without a dashboard.

    Args:
        address: as ``ray.init`` has it.
        cores: the least that a cluster which is started claims to have.

    Returns:
        False if this process was in a cluster already: then whoever joined it leaves it.

    Raises:
        InvalidInputError: there is no cluster at the address.
    """
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if not (address := address or os.environ.get("RAY_ADDRESS")):
        # Not None, for which Ray would join whatever cluster it finds on this machine.
        ray.init("local", num_cpus=max(cores, os.cpu_count() or 1), include_dashboard=False, **quiet)
        return True
    try:
        _require_listener(address)
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"expected a Ray cluster at {address}, found none ({str(error).splitlines()[0]}): start one with "
            "ray start --head, or leave --ray-address out"
        ) from error
    return True


def leave() -> None:
    """End what :func:`connect` began."""
    ray.shutdown()


def _require_listener(address: str) -> None:
    """Fail at once where Ray would try for minutes: nobody listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
