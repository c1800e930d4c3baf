"""The engine of a Ray cluster: workers in processes of their own, on one machine or many.

The ensemble goes into Ray's object store once: every node holds one copy, which all its workers read in place. A worker
has one call at a time; the next is sent when its result has come, so that no more calls are running than there are
workers. Ray starts a worker that dies again, and repeats its call.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import ray
import torch
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

from softmeet.errors import InvalidInputError, WorkerLostError
from softmeet.scaling.base import Engine, Items, R, T
from softmeet.scaling.cluster import connect
from softmeet.scaling.packing import Packed, Stored, pack, packed_bytes, parts, unpack

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble

# A call whose worker has died once more than this is taken to be the cause, and the map fails.
_RETRIES = 2
_LOST = (RayActorError, ObjectLostError, WorkerCrashedError, OutOfMemoryError)


class RayEngine(Engine):
    """The engine that runs calls on the workers of a Ray cluster.

    Workers start when the engine is entered as a context manager, and end with it.

    Args:
        ensemble: the ensemble, in CPU memory, to which the items of ``map`` refer; None if they refer to
            none.
        workers: the number of workers; None for as many as the cluster has cores (and, if ``gpus``, GPUs) for.
        threads: the number of torch's threads in each worker, and of the CPU cores that it takes of the cluster's.
        gpus: the number of GPUs of each worker, over which its members are spread; a fraction to share one (0.25: four
            workers on one GPU), 0 to compute on the CPU.
        address: of the cluster; None for the environment's ``RAY_ADDRESS``, else a cluster on this machine, which ends
            with the engine.
        patience: the seconds to wait for a first worker to start; then ``map`` raises WorkerLostError.

    Attributes:
        sent, received: the sizes in bytes of all items sent and of all results received (or exceptions in their
            place), both as packed and without kept values.

    Raises:
        InvalidInputError: if ``gpus`` is above 1 and not whole; on entering, if there is no cluster at the address, or
            it has no room for a single worker.
    """

    def __init__(
        self,
        ensemble: Ensemble | None,
        workers: int | None = None,
        threads: int = 1,
        *,
        gpus: float = 0,
        address: str | None = None,
        patience: float = 120.0,
    ) -> None:
        if gpus > 1 and gpus != int(gpus):
            raise InvalidInputError(f"expected a part of one device or a whole number of them a worker, got {gpus:g}")
        self._ensemble, self._wanted, self.threads, self._gpus = ensemble, workers, threads, gpus
        self._address, self._patience = address, patience
        self._parts, self._actors, self._own_cluster = parts(ensemble), list[Any](), False
        self._numbers = (0, 0)
        self.sent = self.received = 0

    def __enter__(self) -> Self:
        super().__enter__()
        # A cluster started here claims enough cores for all workers that were asked for, so that all of them start.
        self._own_cluster = connect(self._address, (self._wanted or 0) * self.threads)
        try:
            self.workers = self._wanted or self._room()
            self._packed = ray.put(pack(self._ensemble)[0])
            self._actors = [self._begin() for _ in range(self.workers)]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._packed = [], None
        if self._own_cluster:
            ray.shutdown()
        super().__exit__()

    def _room(self) -> int:
        """Return the number of workers for which the cluster has cores and GPUs."""
        found = ray.cluster_resources()
        room = int(found.get("CPU", 0) // self.threads)
        if self._gpus:
            room = min(room, int(found.get("GPU", 0) / self._gpus))
        if room < 1:
            raise InvalidInputError(
                f"expected a cluster with {self.threads} cores and {self._gpus:g} devices for a worker, found "
                f"{found.get('CPU', 0):g} and {found.get('GPU', 0):g}: ask for fewer --threads or --gpus"
            )
        return room

    def _begin(self) -> Any:
        """Start a worker, which Ray starts again whenever it dies, with the call that it was at."""
        devices = int(self._gpus) if self._gpus >= 1 else int(self._gpus > 0)
        wanted = {"num_cpus": self.threads, "num_gpus": self._gpus, "scheduling_strategy": "SPREAD"}
        again = {"max_restarts": -1, "max_task_retries": _RETRIES}
        return ray.remote(Worker).options(**wanted, **again).remote(self._packed, self.threads, devices)

    def keep(self, values: Sequence[T]) -> list[T]:
        """Put values in Ray's object store; return a :class:`Stored` for each, its stand-in as in :meth:`Engine.keep`.

        Values are any that cloudpickle can pickle. A worker unpacks each value that it needs once, as its own copy.
        """
        first = self._numbers[1]
        self._numbers = first, first + len(values)
        stored: list[Any] = [Stored(first + k, ray.put(pack(x, self._parts)[0])) for k, x in enumerate(values)]
        return stored

    def map(self, function: Callable[..., R], items: Items) -> Iterator[tuple[int, R]]:
        """Call ``function(*item)`` for each item; yield (index, result) as calls finish, as in :meth:`Engine.map`.

        Items come in order, but a worker prefers those whose index modulo the number of workers is its own number: it
        probably had these in the last ``map``, too, and keeps their values.

        Raises:
            WorkerLostError: if workers have died three times at the same item, or if no worker starts within
                ``patience`` seconds.
            Exception: if a call raised one: that exception.
        """
        left, ahead, running = enumerate(items), dict[int, tuple[Any, ...]](), dict[Any, tuple[int, int]]()

        def send(number: int) -> None:
            """Send a worker that is idle an item, if one is left."""
            ahead.update(itertools.islice(left, max(0, self.workers - len(ahead))))
            if ahead:
                k = next((k for k in ahead if k % self.workers == number), min(ahead))
                running[self._call(number, function, ahead.pop(k))] = number, k

        self._require_worker()
        for number in range(self.workers):
            send(number)
        while running:
            (done,), _ = ray.wait(list(running))
            number, k = running.pop(done)
            try:
                well, packed = ray.get(done)
            except _LOST as error:
                reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
                raise WorkerLostError(
                    f"the same piece of work ({k}) lost {_RETRIES + 1} workers: {reason}; see the logs of Ray, and "
                    "give each worker more memory"
                ) from error
            # Its next call is under way while the caller deals with this one's answer.
            send(number)
            self.received += packed_bytes(packed)
            answer = unpack(packed, self._parts, copy=True)
            if not well:
                raise answer
            yield k, answer

    def _call(self, number: int, function: Callable[..., Any], item: tuple[Any, ...]) -> Any:
        """Send a worker a call, and return Ray's reference of its answer."""
        packed, stored = pack((function, item), self._parts)
        self.sent += packed_bytes(packed)
        names = [(s.number, self._numbers[0]) for s in stored]
        return self._actors[number].call.remote(packed, names, *(s.reference for s in stored))

    def _require_worker(self) -> None:
        """Wait until a worker has started.

        Raises:
            WorkerLostError: if none has within ``patience`` seconds.
        """
        if not ray.wait([actor.process.remote() for actor in self._actors], timeout=self._patience)[0]:
            raise WorkerLostError(
                f"no worker was ready within {self._patience:g} s: the cluster has "
                f"{ray.available_resources().get('CPU', 0):g} free cores, and a worker needs {self.threads}"
            )


class Worker:
    """A process that holds an ensemble, whose weights stay in the node's object store, and calls functions with it.

    Args:
        packed: the ensemble or None, as packed by :func:`pack`; its arrays are views of shared memory.
        threads: the number of torch's threads.
        devices: the number of GPUs over which the members are spread; 0 to compute on the CPU.
    """

    def __init__(self, packed: Packed, threads: int, devices: int) -> None:
        torch.set_num_threads(threads)
        ensemble: Ensemble | None = None
        if packed[1]:  # tensors: it is no packed None, for which nothing has to be imported
            ensemble = unpack(packed)
        if devices and ensemble is not None:
            spread(ensemble, [torch.device("cuda", k) for k in range(devices)])
        self._parts = parts(ensemble)
        self._stored: dict[int, Any] = {}

    def process(self) -> int:
        """Return the worker's process id; the answer shows that the worker has started."""
        return os.getpid()

    def call(self, packed: Packed, stored: list[tuple[int, int]], *values: Packed) -> tuple[bool, Packed]:
        """Call a function, and return its result or its exception.

        Args:
            packed: (function, tuple of arguments), packed by :func:`pack`.
            stored: for each stored value among the arguments, (its number, the least number of a value that is still
                needed): kept values with smaller numbers are dropped.
            values: the stored values, packed by :func:`pack`, in the order of ``stored``.

        Returns:
            (whether the call succeeded; the result, or else the exception, packed).
        """
        try:
            kept = [self._value(*name, value) for name, value in zip(stored, values, strict=True)]
            function, arguments = unpack(packed, self._parts, kept)
            return True, pack(function(*arguments))[0]
        except Exception as error:
            return False, pack(error)[0]

    def _value(self, number: int, first: int, packed: Packed) -> Any:
        """Return the stored value ``number``, unpacked once, and drop values with numbers below ``first``."""
        self._stored = {k: value for k, value in self._stored.items() if k >= first}
        if number not in self._stored:
            self._stored[number] = unpack(packed, self._parts)
        return self._stored[number]


def spread(ensemble: Ensemble, devices: Sequence[torch.device]) -> None:
    """Deal the members of an ensemble, in place, out to the devices, and update its heads.

    Members that share weights go to one device.
    """
    bases = {id(next(member.parameters())): None for member in ensemble.model.members}
    places = dict(zip(bases, itertools.cycle(devices), strict=False))
    for member in ensemble.model.members:
        member.to(places[id(next(member.parameters()))])
    ensemble.model.find_heads_again()
