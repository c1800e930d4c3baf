"""The Ray actor that holds an ensemble's members in a process of its own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from softmeet.startup import paused_collection, quick_imports, uncollected

with paused_collection():
    import torch

    from softmeet.scaling.packing import Packed, pack, parts, unpack

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble


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
            with uncollected(), quick_imports():
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
