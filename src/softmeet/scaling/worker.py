"""The actor that runs in a process of its own and holds an ensemble's members."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from softmeet.scaling.packing import Packed, pack, parts, unpack

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble


class Worker:
    """Holds an ensemble, whose weights stay in the node's object store, and calls functions with it.

    Args:
        packed: the ensemble, or None, in two parts; the arrays are views of shared memory.
        threads: of torch.
        devices: how many hold the members' weights, in turn; 0 to compute on the processor.
    """

    def __init__(self, packed: Packed, threads: int, devices: int) -> None:
        torch.set_num_threads(threads)
        # What is imported to unpack an ensemble is a million objects, through which the collector would go many times.
        gc.disable()
        ensemble: Ensemble | None = unpack(packed)
        gc.freeze()
        gc.enable()
        if devices and ensemble is not None:
            spread(ensemble, [torch.device("cuda", k) for k in range(devices)])
        self._parts = parts(ensemble)
        self._stored: dict[int, Any] = {}
        self._first = 0

    def process(self) -> int:
        """Return the number of the worker's process, once it can work."""
        return os.getpid()

    def call(self, packed: Packed, stored: list[tuple[int, int]], *values: Packed) -> tuple[bool, Packed]:
        """Call a function.

        Args:
            packed: function and arguments.
            stored: for each stored value among the arguments its number, and the first number that is still of use.
            values: the stored values.

        Returns:
            (whether all went well, the answer or the exception, packed).
        """
        try:
            kept = [self._value(*name, value) for name, value in zip(stored, values, strict=True)]
            function, arguments = unpack(packed, self._parts, kept)
            return True, pack(function(*arguments))[0]
        except Exception as error:
            return False, pack(error)[0]

    def _value(self, number: int, first: int, packed: Packed) -> Any:
        if first > self._first:
            self._stored = {k: value for k, value in self._stored.items() if k >= first}
            self._first = first
        if number not in self._stored:
            self._stored[number] = unpack(packed, self._parts)
        return self._stored[number]


def spread(ensemble: Ensemble, devices: Sequence[torch.device]) -> None:
    """Copy member i to device i modulo their number; one device holds all of them."""
    for i, member in enumerate(ensemble.model.members):
        member.to(devices[i % len(devices)])
    ensemble.model.find_heads_again()
