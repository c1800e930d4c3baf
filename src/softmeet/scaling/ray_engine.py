"""The engine of a Ray cluster: workers in processes of their own, on one machine or many.

The ensemble goes into Ray's object store once: every node holds one copy, which all its workers read in place. A worker
has one call at a time; the next is sent when its result has come, so that no more calls are running than there are
workers. If a worker dies, another one repeats its call, and a new worker takes its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

from softmeet.errors import InvalidInputError, WorkerLostError
from softmeet.scaling.base import Engine, Items, R, T
from softmeet.scaling.cluster import connect
from softmeet.scaling.packing import Stored, pack, packed_bytes, parts, unpack
from softmeet.scaling.worker import Worker

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble

# A call whose worker has died this often is taken to be the cause, and the map fails.
_TRIES = 3
_LOST = (RayActorError, ObjectLostError, WorkerCrashedError, OutOfMemoryError)
# The arguments of a call, after their index.
_Item = tuple[int, tuple[Any, ...]]


@dataclass(eq=False)
class _Slot:
    """The place of one worker.

    Attributes:
        number: its index among the slots.
        actor: the worker's Ray actor.
        waits_for: the reference of its running call or start; None if it is idle.
        item: the item of that call, after its index; None if there is none.
        begun: whether the worker has started.
    """

    number: int
    actor: Any
    waits_for: Any
    item: _Item | None = None
    begun: bool = False


@dataclass
class _Round:
    """The items of one ``map`` that no worker has.

    Attributes:
        left: items not yet drawn, with their indices.
        workers: the number of workers.
        ahead: items drawn that wait for a worker, by index.
        losses: how often each item has lost its worker.
    """

    left: Iterator[_Item]
    workers: int
    ahead: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    losses: Counter[int] = field(default_factory=Counter)

    def take(self, slot: int) -> _Item | None:
        """Choose an item for the worker in ``slot``, and return it after its index; None if none is left.

        Items come in order, but a worker prefers those whose index modulo the number of workers is its slot: it
        probably had these in the last ``map``, too, and keeps their values.
        """
        if not self.more():
            return None
        k = next((k for k in self.ahead if k % self.workers == slot), min(self.ahead))
        return k, self.ahead.pop(k)

    def more(self) -> bool:
        """Draw items until as many wait as there are workers, and tell whether any waits."""
        self.ahead.update(islice(self.left, max(0, self.workers - len(self.ahead))))
        return bool(self.ahead)


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
        patience: the seconds to wait for a worker to start while none is working; then ``map`` raises WorkerLostError.
        on_loss: called with a sentence to show for each worker that dies in a call, on the thread that iterates over
            ``map``.

    Attributes:
        redone: for each time that a worker died in a call, the item's index in its ``map``, in order; the call was
            repeated, unless the map failed.
        sent, received: the sizes in bytes of all items sent, repeated ones included, and of all results received (or
            exceptions in their place), both as packed and without kept values.

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
        on_loss: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        if gpus > 1 and gpus != int(gpus):
            raise InvalidInputError(f"expected a part of one device or a whole number of them a worker, got {gpus:g}")
        self._ensemble, self._wanted, self.threads, self._gpus = ensemble, workers, threads, gpus
        self._address, self._patience, self._on_loss = address, patience, on_loss
        self._parts, self._slots, self._own_cluster = parts(ensemble), list[_Slot](), False
        self._numbers, self._failed_beginnings = (0, 0), 0
        self.redone: list[int] = []
        self.sent = self.received = 0

    def __enter__(self) -> Self:
        super().__enter__()
        # A cluster started here claims enough cores for all workers that were asked for, so that all of them start.
        self._own_cluster = connect(self._address, (self._wanted or 0) * self.threads)
        try:
            self.workers = self._wanted or self._room()
            self._packed = ray.put(pack(self._ensemble)[0])
            self._slots = [self._begin(k) for k in range(self.workers)]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots, self._packed = [], None
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

    def _begin(self, number: int) -> _Slot:
        """Start a worker for slot ``number``."""
        devices = int(self._gpus) if self._gpus >= 1 else int(self._gpus > 0)
        wanted = {"num_cpus": self.threads, "num_gpus": self._gpus, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(Worker).options(**wanted).remote(self._packed, self.threads, devices)
        return _Slot(number, actor, actor.process.remote())

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

        Raises:
            WorkerLostError: if workers have died three times at the same item; if, since the engine was made, the
                number of workers that died before they had started is three times ``workers``; or if no worker starts
                within ``patience`` seconds while none is working.
            Exception: if a call raised one: that exception.
        """
        this = _Round(enumerate(items), self.workers)
        try:
            while any(slot.item for slot in self._slots) or this.more():
                # To idle workers, too: an item whose worker has died may be waiting.
                for slot in self._slots:
                    self._send(slot, function, this)
                for slot in self._done():
                    found = self._settle(slot, this)
                    # Its next call is under way while the caller deals with this one's answer.
                    self._send(self._slots[slot.number], function, this)
                    if found is not None:
                        yield found
        finally:
            # If the caller stops early, results of running calls must not count in the next map.
            for slot in self._slots:
                slot.item = None

    def _send(self, slot: _Slot, function: Callable[..., Any], this: _Round) -> None:
        """Send the slot's worker an item, if it is idle and an item is left."""
        if slot.waits_for is not None or (item := this.take(slot.number)) is None:
            return
        packed, stored = pack((function, item[1]), self._parts)
        self.sent += packed_bytes(packed)
        names = [(s.number, self._numbers[0]) for s in stored]
        slot.item, slot.waits_for = item, slot.actor.call.remote(packed, names, *(s.reference for s in stored))

    def _done(self) -> list[_Slot]:
        """Wait until at least one worker's call or start has ended or failed, and return the slots of all such workers.

        Raises:
            WorkerLostError: if no worker has started within ``patience`` seconds.
        """
        waiting = {slot.waits_for: slot for slot in self._slots if slot.waits_for is not None}
        busy = any(slot.begun and slot.waits_for is not None for slot in self._slots)
        ready, _ = ray.wait(list(waiting), timeout=None if busy else self._patience)
        if not ready:
            raise WorkerLostError(
                f"no worker was ready within {self._patience:g} s: the cluster has "
                f"{ray.available_resources().get('CPU', 0):g} free cores, and a worker needs {self.threads}"
            )
        return [waiting[reference] for reference in ready]

    def _settle(self, slot: _Slot, this: _Round) -> tuple[int, Any] | None:
        """Return (index, result) of the item that a slot has done; None if its worker has only started, or died."""
        item, reference = slot.item, slot.waits_for
        slot.item = slot.waits_for = None
        try:
            said = ray.get(reference)
        except _LOST as error:
            self._lose(slot, item, this, error)
            return None
        slot.begun = True
        if item is None:
            return None
        well, packed = said
        self.received += packed_bytes(packed)
        answer = unpack(packed, self._parts, copy=True)
        if not well:
            raise answer
        return item[0], answer

    def _lose(self, slot: _Slot, item: _Item | None, this: _Round, error: Exception) -> None:
        """Start another worker in a dead worker's slot, and make its item wait for a worker again.

        Raises:
            WorkerLostError: if the item's worker has died three times, or workers die again and again before they have
                started.
        """
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        self._failed_beginnings += not slot.begun
        what, losses = "workers do not begin", 0
        if item is not None:
            k, arguments = item
            this.ahead[k] = arguments
            this.losses[k] += 1
            what, losses = f"the same piece of work ({k}) lost {_TRIES} workers", this.losses[k]
            self.redone.append(k)
            self._on_loss(f"a worker died ({reason}): what it was at is done again")
        if self._failed_beginnings >= _TRIES * self.workers or losses >= _TRIES:
            raise WorkerLostError(f"{what}: {reason}; see the logs of Ray, and give each worker more memory") from error
        ray.kill(slot.actor)  # it may only have been out of reach
        self._slots[slot.number] = self._begin(slot.number)
