"""What goes where, in bytes, before anything is loaded: weights, heads, caches and the solver's room.

Shapes come from the members' configurations, built without memory on torch's meta device; a strategy such as ``"auto"``
is worked out as it is at loading, from what the machine has free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import _get_device_map

from softmeet.errors import InvalidInputError
from softmeet.hf.combining import rows_at_once
from softmeet.members import zoo
from softmeet.members.huggingface import Dtype, dtype_of, one_each, random_member
from softmeet.members.placement import Device, device_map_of, main_device

_FP64 = 8


@dataclass(frozen=True)
class PlanPart:
    """Something that takes room.

    Attributes:
        owner: a member's name, or "solver".
        what: body (all weights but the output layer's), head, head copy (of one that is offloaded, for the solver),
            cache, streamed (room for the largest module that comes back from where it is offloaded), workspace or
            whitening.
        device: or "disk".
        dtype: by name.
        bytes: how many.
    """

    owner: str
    what: str
    device: str
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Where everything goes; the interpreter, its libraries, and activations while a prompt is run are not counted.

    Attributes:
        batch, context: so many sequences of so many tokens.
        rows_at_once: the positions that one solve takes.
        cache_bytes_per_token: of one sequence, by member.
        parts: all that takes room.
    """

    batch: int
    context: int
    rows_at_once: int
    cache_bytes_per_token: dict[str, int]
    parts: list[PlanPart]

    def totals(self) -> dict[str, int]:
        """Sum the bytes of each device, and of the disk."""
        found: dict[str, int] = defaultdict(int)
        for part in self.parts:
            found[part.device] += part.bytes
        return dict(found)


@dataclass(frozen=True)
class _Shape:
    """A member as it would be loaded, without its weights."""

    name: str
    config: PreTrainedConfig
    model: PreTrainedModel
    dtype: torch.dtype
    places: dict[str, Any]

    def place(self, parameter: str) -> str:
        """Say where a parameter is kept: as the longest name in the map that it is under, else on the CPU."""
        best = max((m for m in self.places if not m or f"{parameter}.".startswith(f"{m}.")), key=len, default=None)
        return "cpu" if best is None else str(self.places[best])

    @property
    def home(self) -> str:
        """Where it computes."""
        return str(main_device(self.places))


def plan(
    names: Sequence[str | Path],
    *,
    dtype: Dtype | Sequence[Dtype] = None,
    device: Device | Sequence[Device] = None,
    batch: int = 1,
    context: int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan the memory of an ensemble.

    Args:
        names, dtype, device, trust_remote_code: as ``load_members`` has them.
        batch: sequences at once.
        context: tokens of each; the shortest member's longest if None.

    Raises:
        InvalidInputError: no name, a batch or context below 1, or not one dtype or device per member.
        CheckpointError: a configuration cannot be read.
    """
    expanded = [path for name in names for path in zoo.expand(name)]
    if not expanded or batch < 1 or (context is not None and context < 1):
        raise InvalidInputError(
            f"expected members, and a batch and a context of at least 1, got {len(expanded)}, {batch} and {context}"
        )
    given = zip(
        expanded, one_each(dtype, "dtype", len(expanded)), one_each(device, "device", len(expanded)), strict=True
    )
    shapes = [_shape(name, own_dtype, own_device, trust_remote_code) for name, own_dtype, own_device in given]
    limits = [getattr(shape.config, "max_position_embeddings", None) for shape in shapes]
    length = context or min((limit for limit in limits if limit is not None), default=1)
    tokens = {shape.name: sum(_cache_of_a_token(shape)) for shape in shapes}
    rows = min(batch, rows_at_once(max(_rows(shape) for shape in shapes), len(shapes)))
    parts = [part for shape in shapes for part in (*_weights(shape), *_caches(shape, batch, length))]
    return Plan(batch, length, rows, tokens, [*parts, *_workspace(shapes, rows)])


def solver_bytes(v: int, n: int, width: int, rows: int) -> int:
    """Estimate the bytes that combining takes: fp64 vectors over the tokens, and two squares of the heads' widths.

    Args:
        v: tokens.
        n: members, for which a row takes 4n + 4 vectors.
        width: of all heads together.
        rows: solved at once.
    """
    return _FP64 * (rows * v * (4 * n + 4) + 2 * width**2)


def _shape(name: str, dtype: Dtype, device: Device, trust_remote_code: bool) -> _Shape:
    with torch.device("meta"):
        model = random_member(name, dtype_of(dtype, device), trust_remote_code=trust_remote_code)
    return _Shape(name, model.config.get_text_config(decoder=True), model, model.dtype, _places(model, device))


def _places(model: PreTrainedModel, device: Device) -> dict[str, Any]:
    """Say where each module goes, by name; a strategy such as ``"auto"`` is worked out as transformers does it."""
    spread = device_map_of(device)
    found: dict[str, Any] = {"": str(device or "cpu")} if spread is None else _get_device_map(model, spread, None, None)
    return found


def _weights(shape: _Shape) -> list[PlanPart]:
    """List the body's weights and the head's; offloaded ones also need room to come back to, and a head's a copy."""
    head = set(shape.model.get_output_embeddings().parameters())
    found: dict[tuple[str, str], int] = defaultdict(int)
    for name, parameter in shape.model.named_parameters():
        place, what = shape.place(name), "head" if parameter in head else "body"
        found[what, place] += parameter.nbytes
        if what == "head" and _is_offloaded(shape, place):
            found["head copy", shape.home] += parameter.nbytes
    streamed = max((_own_bytes(shape, module, name) for name, module in shape.model.named_modules()), default=0)
    if streamed:
        found["streamed", shape.home] = streamed
    return [_part(shape, what, place, size) for (what, place), size in found.items()]


def _is_offloaded(shape: _Shape, place: str) -> bool:
    return place == "disk" or (place == "cpu" and shape.home != "cpu")


def _own_bytes(shape: _Shape, module: torch.nn.Module, name: str) -> int:
    """Count the bytes of a module's own parameters that are offloaded."""
    own = module.named_parameters(prefix=name, recurse=False)
    return sum(p.nbytes for key, p in own if _is_offloaded(shape, shape.place(key)))


def _cache_of_a_token(shape: _Shape) -> list[int]:
    """Count the bytes of a token's keys and values, layer by layer."""
    c = shape.config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return [2 * heads * width * shape.dtype.itemsize] * len(DynamicCache(config=c).layers)


def _caches(shape: _Shape, batch: int, context: int) -> list[PlanPart]:
    """List the caches at the full context, of which a sliding layer keeps its window."""
    layers = DynamicCache(config=shape.config).layers
    kept = [min(context, getattr(layer, "sliding_window", context)) for layer in layers]
    each = zip(kept, _cache_of_a_token(shape), strict=True)
    return [_part(shape, "cache", shape.home, batch * sum(tokens * size for tokens, size in each))]


def _rows(shape: _Shape) -> int:
    return int(shape.model.get_output_embeddings().weight.shape[0])


def _workspace(shapes: Sequence[_Shape], rows: int) -> list[PlanPart]:
    """List the solver's room, with the first member's head, and that of each head's whitening beside it."""
    widths = [int(shape.model.get_output_embeddings().weight.shape[1]) for shape in shapes]
    room = solver_bytes(max(map(_rows, shapes)), len(shapes), sum(widths), rows)
    whitening = _FP64 * sum(2 * d**2 + d for d in widths)
    place = shapes[0].home
    return [
        PlanPart("solver", "workspace", place, "float64", room),
        PlanPart("solver", "whitening", place, "float64", whitening),
    ]


def _part(shape: _Shape, what: str, place: str, size: int) -> PlanPart:
    return PlanPart(shape.name, what, place, str(shape.dtype).removeprefix("torch."), size)
