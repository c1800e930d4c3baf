"""Connecting to a Ray cluster, or starting one on this machine; no usage statistics are sent."""

from __future__ import annotations

import os
import socket

import ray

from softmeet.errors import InvalidInputError

# Read when a cluster starts.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def connect(address: str | None = None, cores: int = 0) -> bool:
    """Join a Ray cluster, or start one on this machine, without a dashboard, if there is no address.

    Args:
        address: of the cluster, in the form that ``ray.init`` takes; None for the environment's ``RAY_ADDRESS``.
        cores: the least number of cores that a cluster which is started here claims to have.

    Returns:
        Whether this call joined or started the cluster, so that its caller ends it by ``ray.shutdown``; False if the
        process was in a cluster already.

    Raises:
        InvalidInputError: if there is no cluster at the address.
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


def _require_listener(address: str) -> None:
    """Check that something listens at ``host:port``, since Ray would try for minutes; other forms of address pass.

    Raises:
        OSError: if nothing does.
    """
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
