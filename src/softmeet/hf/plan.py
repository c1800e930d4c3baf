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
    """A member as it would be loaded, without its weights, and where each of its modules goes, by name."""

    name: str
    model: PreTrainedModel
    places: dict[str, Any]

    @property
    def config(self) -> PreTrainedConfig:
        """That of the language model."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def head(self) -> torch.Size:
        """The head's rows and width."""
        return self.model.get_output_embeddings().weight.shape  # type: ignore[no-any-return]

    @property
    def home(self) -> str:
        """Where it computes."""
        return str(main_device(self.places))

    def place(self, parameter: str) -> str:
        """Say where a parameter is kept: as the longest name in the map that it is under, else on the CPU."""
        best = max((m for m in self.places if not m or f"{parameter}.".startswith(f"{m}.")), key=len, default=None)
        return "cpu" if best is None else str(self.places[best])

    def cache_bytes(self, batch: int, context: int) -> int:
        """Count the bytes of keys and values; a sliding layer keeps its window."""
        c = self.config
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        kept = sum(min(context, getattr(layer, "sliding_window", context)) for layer in DynamicCache(config=c).layers)
        return int(batch * kept * 2 * heads * width * self.model.dtype.itemsize)

    def part(self, what: str, place: str, size: int) -> PlanPart:
        """Return a part of this member."""
        return PlanPart(self.name, what, place, str(self.model.dtype).removeprefix("torch."), size)


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
    given = zip(one_each(dtype, "dtype", len(expanded)), one_each(device, "device", len(expanded)), strict=True)
    shapes = [_shape(name, *own, trust_remote_code) for name, own in zip(expanded, given, strict=True)]
    limits = [getattr(shape.config, "max_position_embeddings", None) for shape in shapes]
    length = context or min((limit for limit in limits if limit is not None), default=1)
    tokens = {shape.name: shape.cache_bytes(1, 1) for shape in shapes}
    v, widths = max(shape.head[0] for shape in shapes), [shape.head[1] for shape in shapes]
    rows = min(batch, rows_at_once(v, len(shapes)))
    parts = []
    for shape in shapes:
        parts += [*_weights(shape), shape.part("cache", shape.home, shape.cache_bytes(batch, length))]
    # The solver is where the first member's head is, and each head's whitening beside it.
    room = solver_bytes(v, len(shapes), sum(widths), rows)
    parts.append(PlanPart("solver", "workspace", shapes[0].home, "float64", room))
    whitening = _FP64 * sum(2 * d**2 + d for d in widths)
    parts.append(PlanPart("solver", "whitening", shapes[0].home, "float64", whitening))
    return Plan(batch, length, rows, tokens, parts)


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
    """Build a member without memory; a strategy such as ``"auto"`` is worked out as transformers does it."""
    with torch.device("meta"):
        model = random_member(name, dtype_of(dtype, device), trust_remote_code=trust_remote_code)
    spread = device_map_of(device)
    places = {"": str(device or "cpu")} if spread is None else _get_device_map(model, spread, None, None)
    return _Shape(name, model, places)


def _weights(shape: _Shape) -> list[PlanPart]:
    """List the body's weights and the head's; offloaded ones also need room to come back to, and a head's a copy."""
    head, home = set(shape.model.get_output_embeddings().parameters()), shape.home
    found: dict[tuple[str, str], int] = defaultdict(int)
    streamed: dict[str, int] = defaultdict(int)
    for name, parameter in shape.model.named_parameters():
        place, what = shape.place(name), "head" if parameter in head else "body"
        found[what, place] += parameter.nbytes
        if place == "disk" or (place == "cpu" and home != "cpu"):
            streamed[name.rpartition(".")[0]] += parameter.nbytes
            if what == "head":
                found["head copy", home] += parameter.nbytes
    if streamed:
        found["streamed", home] = max(streamed.values())
    return [shape.part(what, place, size) for (what, place), size in found.items()]
