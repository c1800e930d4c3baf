"""The engine of a Ray cluster: workers in processes of their own, on one machine or many.

The ensemble goes into the object store once: every node holds one copy, which all of its workers read in place. A
worker has one call at a time; the next is sent when its answer has come, so that no more is under way than there are
workers. When a worker dies, its call is made again by another one, and a worker takes its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

from softmeet.errors import InvalidInputError, WorkerLostError
from softmeet.scaling.base import Engine, Items, R, T
from softmeet.scaling.cluster import connect, leave
from softmeet.scaling.packing import Stored, pack, packed_bytes, parts, unpack
from softmeet.scaling.worker import Worker

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble

# So often a call may lose its worker before it is held to be the cause.
_TRIES = 3
_LOST = (RayActorError, ObjectLostError, WorkerCrashedError, OutOfMemoryError)


@dataclass(eq=False)
class _Slot:
    """A worker's place: its actor, the reference that it is waited for by, and the number of its item if it has one."""

    number: int
    actor: Any
    waits_for: Any
    item: int | None = None
    begun: bool = False


@dataclass
class _Round:
    """The state of one ``map``: items that are left, items under way, and how often each item has lost its worker."""

    left: Iterator[tuple[int, tuple[Any, ...]]]
    workers: int
    ahead: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    running: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    losses: Counter[int] = field(default_factory=Counter)

    def take(self, slot: int) -> int | None:
        """Choose an item for a slot, and return its number; None at the end.

        Items come in order, but that a worker prefers those that it had in the ``map`` before, whose values it keeps.
        """
        if not self.more():
            return None
        k = next((k for k in self.ahead if k % self.workers == slot), min(self.ahead))
        self.running[k] = self.ahead.pop(k)
        return k

    def more(self) -> bool:
        """Return whether an item waits for a worker."""
        while len(self.ahead) < self.workers and (found := next(self.left, None)) is not None:
            self.ahead[found[0]] = found[1]
        return bool(self.ahead)

    def give_back(self, k: int) -> None:
        """Line an item up again that has lost its worker."""
        self.losses[k] += 1
        self.ahead[k] = self.running.pop(k)


class RayEngine(Engine):
    """Runs calls on the workers of a Ray cluster.

    Args:
        ensemble: what the items of ``map`` refer to, on this machine's processor; None if they refer to none.
        workers: how many; None for all that the cluster has cores (or devices) for.
        threads: of torch in each worker, and cores that it takes.
        gpus: devices of each worker: a part of one (0.25: four workers share it), or a number, over which its members
            are spread.
        address: of a cluster; None for ``$RAY_ADDRESS``, else a cluster of this machine that ends with the engine.
        patience: seconds until a worker has to be ready.
        on_loss: called with a sentence for each worker that dies.

    Attributes:
        redone: the number, in its ``map``, of each item that was made again, in order.
        sent, received: bytes of items and of answers.

    Raises:
        InvalidInputError: there is no cluster at the address, or it has no room for a single worker; or the ensemble
            is one over bytes.
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
        if ensemble is not None:
            ensemble.model.require_tokens("Ray")
        self._ensemble, self._wanted, self.threads, self._gpus = ensemble, workers, threads, gpus
        self._address, self._patience, self._on_loss = address, patience, on_loss
        self._parts, self._slots, self._own_cluster = parts(ensemble), list[_Slot](), False
        self._numbers, self._failed_beginnings = (0, 0), 0
        self.redone: list[int] = []
        self.sent = self.received = 0

    def __enter__(self) -> Self:
        super().__enter__()
        # Workers that were asked for all begin, however few cores there are.
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
            leave()
        super().__exit__()

    def _room(self) -> int:
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
        devices = int(self._gpus) if self._gpus >= 1 else int(self._gpus > 0)
        wanted = {"num_cpus": self.threads, "num_gpus": self._gpus, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(Worker).options(**wanted).remote(self._packed, self.threads, devices)
        return _Slot(number, actor, actor.process.remote())

    def keep(self, values: Sequence[T]) -> list[T]:
        """Put values in the object store; a worker unpacks each that it meets once."""
        first = self._numbers[1]
        self._numbers = first, first + len(values)
        stored: list[Any] = [Stored(first + k, ray.put(pack(x, self._parts)[0])) for k, x in enumerate(values)]
        return stored

    def map(self, function: Callable[..., R], items: Items) -> Iterator[tuple[int, R]]:
        """Run calls as :meth:`Engine.map` says.

        Raises:
            WorkerLostError: an item lost three workers one after another, or no worker was ready in time.
        """
        this = _Round(enumerate(items), self.workers)
        try:
            while this.running or this.more():
                # Also to a worker that has had nothing to do, should another one's item need to be made again.
                for slot in self._slots:
                    self._send(slot, function, this)
                for slot in self._done():
                    found = self._settle(slot, this)
                    # Its next call is under way while the caller deals with this one's answer.
                    self._send(self._slots[slot.number], function, this)
                    if found is not None:
                        yield found
        finally:
            # What is still under way when the caller has had enough is nobody's answer.
            for slot in self._slots:
                slot.item = None

    def _send(self, slot: _Slot, function: Callable[..., Any], this: _Round) -> None:
        if slot.waits_for is not None or (k := this.take(slot.number)) is None:
            return
        packed, stored = pack((function, this.running[k]), self._parts)
        self.sent += packed_bytes(packed)
        names = [(s.number, self._numbers[0]) for s in stored]
        slot.item, slot.waits_for = k, slot.actor.call.remote(packed, names, *(s.reference for s in stored))

    def _done(self) -> list[_Slot]:
        """Wait for slots whose call or beginning has ended, in one way or another."""
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
        """Return (number, answer) of the item that a slot has done, or None where it has begun or lost its worker."""
        k, reference = slot.item, slot.waits_for
        slot.item, slot.waits_for = None, None
        try:
            said = ray.get(reference)
        except _LOST as error:
            self._lose(slot, k, this, error)
            return None
        slot.begun = True
        if k is None:
            return None
        del this.running[k]
        well, packed = said
        self.received += packed_bytes(packed)
        answer = unpack(packed, self._parts, copy=True)
        if not well:
            raise answer
        return k, answer

    def _lose(self, slot: _Slot, k: int | None, this: _Round, error: Exception) -> None:
        """Begin another worker in its place, and line its item up again."""
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        self._failed_beginnings += not slot.begun
        if k is not None:
            this.give_back(k)
            self.redone.append(k)
            self._on_loss(f"a worker died ({reason}): what it was at is done again")
        if self._failed_beginnings >= _TRIES * self.workers or (k is not None and this.losses[k] >= _TRIES):
            what = "workers do not begin" if k is None else f"the same piece of work ({k}) lost {_TRIES} workers"
            raise WorkerLostError(f"{what}: {reason}; see the logs of Ray, and give each worker more memory") from error
        ray.kill(slot.actor)  # it may only have been out of reach
        self._slots[slot.number] = self._begin(slot.number)
