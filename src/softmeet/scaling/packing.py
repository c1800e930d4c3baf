"""Packing values for Ray in two parts: bytes that say how a value is built, and its tensors' memory as numpy arrays.

Ray's object store maps numpy arrays into every process of a node, read-only and without a copy. Pickling of torch would
copy each tensor, so tensors travel as arrays of bytes, and come back as contiguous views of these.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ray.cloudpickle import CloudPickler
from torch import Tensor, nn

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble

Packed = tuple[bytes, list[Any]]
# The alignment in bytes of memory from torch's allocator and from the object store.
_BOUNDARY = 64


def parts(ensemble: Ensemble | None) -> list[Any]:
    """List the objects of an ensemble that packed values may refer to, in the same order in every process.

    These are the ensemble, its model, members, heads, parameters and buffers; an empty list for None.
    """
    if ensemble is None:
        return []
    model = ensemble.model
    tensors = [*model.parameters(), *model.buffers()]
    return [ensemble, model, *model.members, *model.heads, *tensors]


@dataclass(frozen=True)
class Stored:
    """A stand-in, made by :meth:`RayEngine.keep`, for a value that workers keep: its number and Ray's reference to it.

    Attributes:
        number: its index among all values that the engine has ever stored.
        reference: the ``ObjectRef`` of the packed value in Ray's object store.
    """

    number: int
    reference: Any


class _Packer(CloudPickler):  # type: ignore[misc]
    """A pickler that takes tensors out as arrays, ``Stored`` values as references, and known objects as indices."""

    def __init__(self, file: io.BytesIO, known: Mapping[int, int]) -> None:
        super().__init__(file)
        self._known, self.arrays, self.stored = known, list[Any](), list[Stored]()
        # By id(): (index in arrays, tensor). Tensors are held so that no other object gets the id of one.
        self._met: dict[int, tuple[int, Tensor]] = {}

    def persistent_id(self, value: Any) -> Any:
        if (place := self._known.get(id(value))) is not None:
            return "part", place
        if isinstance(value, Stored):
            self.stored.append(value)
            return "stored", len(self.stored) - 1
        if type(value) in (Tensor, nn.Parameter) and not value.is_meta:  # quantised ones are made of others
            return self._tensor(value)
        return None

    def _tensor(self, value: Tensor) -> tuple[Any, ...]:
        if id(value) not in self._met:
            self._met[id(value)] = len(self.arrays), value
            self.arrays.append(_shifted(value.detach().cpu().contiguous()).numpy())
        kind = "parameter" if isinstance(value, nn.Parameter) else "tensor"
        return kind, self._met[id(value)][0], value.dtype, tuple(value.shape)


class _Unpacker(pickle.Unpickler):
    """The counterpart of ``_Packer``, which puts tensors, stored values and known objects back."""

    def __init__(self, packed: Packed, parts: Sequence[Any], stored: Sequence[Any], *, copy: bool) -> None:
        super().__init__(io.BytesIO(packed[0]))
        self._arrays, self._parts, self._stored, self._copy = packed[1], parts, stored, copy
        self._built: dict[int, Tensor] = {}

    def persistent_load(self, name: Any) -> Any:
        kind, place, *rest = name
        if kind == "part":
            return self._parts[place]
        if kind == "stored":
            return self._stored[place]
        if place not in self._built:
            dtype, shape = rest
            size = math.prod(shape) * dtype.itemsize
            found = _view(self._arrays[place], size, copy=self._copy).view(dtype).view(shape)
            self._built[place] = nn.Parameter(found, requires_grad=False) if kind == "parameter" else found
        return self._built[place]


def _shifted(value: Tensor) -> Tensor:
    """Return a tensor's bytes after as many zeros as it lies past a 64-byte boundary.

    So its copy can lie equally far past one, as the rounding of products depends on that.
    """
    flat, past = value.flatten().view(torch.uint8), value.data_ptr() % _BOUNDARY
    return torch.cat([flat.new_zeros(past), flat]) if past else flat


def _view(array: np.ndarray[Any, Any], size: int, *, copy: bool) -> Tensor:
    """Return an array's last ``size`` bytes as a tensor, as far past a 64-byte boundary as before :func:`_shifted`."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        # The array is read-only, and nothing writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        found = torch.from_numpy(array)
    return (found.clone() if copy or found.data_ptr() % _BOUNDARY else found)[len(found) - size :]


def packed_bytes(packed: Packed) -> int:
    """Return the size in bytes of a packed value, (pickle, arrays), the first part of the result of :func:`pack`."""
    return len(packed[0]) + sum(int(array.nbytes) for array in packed[1])


def pack(value: Any, known: Sequence[Any] = ()) -> tuple[Packed, list[Stored]]:
    """Pack a value for another process.

    Args:
        value: anything that cloudpickle can pickle.
        known: objects that the unpacking process has, too; each is packed as its index in this list.

    Returns:
        ((bytes of the pickle, arrays of the tensors' bytes, uint8), the :class:`Stored` values found inside of the
        value, in the order of pickling).
    """
    file = io.BytesIO()
    packer = _Packer(file, {id(part): k for k, part in enumerate(known)})
    packer.dump(value)
    return (file.getvalue(), packer.arrays), packer.stored


def unpack(packed: Packed, known: Sequence[Any] = (), stored: Sequence[Any] = (), *, copy: bool = False) -> Any:
    """Rebuild a value from the result of :func:`pack`.

    Args:
        packed: (bytes of the pickle, arrays of the tensors), the first part of the result of :func:`pack`.
        known: the unpacking process's own objects, in the order of the list given to :func:`pack`.
        stored: the unpacked values in place of the :class:`Stored` ones, in the order in which :func:`pack` returned
            the latter.
        copy: whether tensors are copies; if not, they are views of the arrays, and must not be written to.
    """
    return _Unpacker(packed, known, stored, copy=copy).load()
