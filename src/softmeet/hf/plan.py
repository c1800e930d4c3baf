"""The plan of an ensemble's memory, in bytes by device, before anything is loaded.

It covers weights, heads, caches and the solver's vectors. Shapes come from models that are built without weights, on
torch's meta device. A strategy such as ``"auto"`` is worked out as at loading, from the machine's free memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import _get_device_map

from softmeet.engine.combine import rows_at_once
from softmeet.errors import InvalidInputError
from softmeet.members import quantized
from softmeet.members.gguf_file import read_gguf
from softmeet.members.huggingface import Dtype, dtype_of, placed, random_member
from softmeet.members.member import Member
from softmeet.members.names import find_adapter
from softmeet.members.native import is_native, number, path_of
from softmeet.members.placement import Device, device_map_of, main_device

_FP64 = 8


@dataclass(frozen=True)
class PlanPart:
    """One part of an ensemble's memory, on one device.

    Attributes:
        owner: a member's name, or "solver".
        what: the kind of part: "body" (a member's weights without its output layer), "head" (its output layer),
            "adapter", "head copy" (a copy for the solver of a head that is offloaded), "cache" (keys and values),
            "streamed" (space for the largest offloaded module, loaded when it is needed), "workspace" (the solver's
            vectors) or "whitening" (matrices of the whitened heads).
        device: the device's name, such as "cpu" or "cuda:0", or "disk".
        dtype: the dtype's name, such as "float32"; of a quantised body the quantisation's, such as "int8".
        bytes: the size.
    """

    owner: str
    what: str
    device: str
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The memory that an ensemble takes, part by part.

    The Python interpreter, its libraries and activations during a prompt are not counted.

    Attributes:
        batch: the number of sequences that are generated at once.
        context: the number of tokens of each sequence.
        rows_at_once: the number of positions, at most ``batch``, that are solved together.
        cache_bytes_per_token: by member's name, the bytes of the cache for one token of one sequence.
        parts: all parts.
    """

    batch: int
    context: int
    rows_at_once: int
    cache_bytes_per_token: dict[str, int]
    parts: list[PlanPart]

    def totals(self) -> dict[str, int]:
        """Return the total bytes of all parts by device, ``"disk"`` included."""
        found: dict[str, int] = defaultdict(int)
        for part in self.parts:
            found[part.device] += part.bytes
        return dict(found)


@dataclass(frozen=True)
class _Shape:
    """A member without its weights.

    Attributes:
        name: its name.
        home: the name of the device on which it computes.
        limit: the number of tokens of its context; None if nothing limits it.
        head: the shape of the head's weight, (v, d); (v, v) for a model without an output layer that can be read.
        dtype: that of its cache, and of an adapter.
        cache_bytes: the bytes of keys and values of so many sequences of so many tokens.
        weights: its parts without caches and adapters.
        is_file: whether llama.cpp runs it, from a GGUF file.
    """

    name: str
    home: str
    limit: int | None
    head: Sequence[int]
    dtype: str
    cache_bytes: Callable[[int, int], int]
    weights: list[PlanPart]
    is_file: bool = False

    def part(self, what: str, size: int) -> PlanPart:
        """Return a part of the kind ``what``, of ``size`` bytes, on the device on which the member computes."""
        return PlanPart(self.name, what, self.home, self.dtype, size)


def plan(
    names: Sequence[str | Path],
    *,
    dtype: Dtype | Sequence[Dtype] = None,
    device: Device | Sequence[Device] = None,
    batch: int = 1,
    context: int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan the memory of an ensemble from its members' configurations, without loading weights.

    Args:
        names: the members; those of one base count its weights once.
        dtype: the weights' dtype, one for all members or one each; None for fp32 on the CPU and the checkpoints' own
            elsewhere.
        device: a device (None: the CPU), ``"disk"``, a strategy such as ``"auto"``, or a dict of places by module; one
            for all members or one each.
        batch: the number of sequences that are generated at once.
        context: the number of tokens of each sequence; None for the shortest member's context, or 1 if none is known.
        trust_remote_code: whether code that comes with a member may run.

    Raises:
        InvalidInputError: if there is no name, ``batch`` or ``context`` is below 1, or a list of dtypes or devices does
            not have one per member.
        CheckpointError: if a member's configuration cannot be read.
    """
    if not names or batch < 1 or (context is not None and context < 1):
        raise InvalidInputError(
            f"expected members, and a batch and a context of at least 1, got {len(names)}, {batch} and {context}"
        )
    members = placed(names, dtype, device)
    shapes = [
        _file(member) if is_native(member) else _shape(member, own_dtype, own_device, trust_remote_code)
        for member, own_dtype, own_device in members
    ]
    length = context or min((shape.limit for shape in shapes if shape.limit is not None), default=1)
    tokens = {shape.name: shape.cache_bytes(1, 1) for shape in shapes}
    v, widths = max(shape.head[0] for shape in shapes), [shape.head[1] for shape in shapes]
    rows = min(batch, rows_at_once(v, len(shapes)))
    parts, loaded = list[PlanPart](), set[tuple[str, ...]]()
    for shape, (member, *how) in zip(shapes, members, strict=True):
        # Members of one base are loaded once.
        base, own = (str(member.base), *map(str, how)), (str(member.weights), *map(str, how))
        parts += [] if base in loaded else shape.weights
        if member.adapter is not None and own not in loaded:
            size = (find_adapter(member.adapter) / "adapter_model.safetensors").stat().st_size
            parts.append(shape.part("adapter", size))
        loaded |= {base, own}
        parts.append(shape.part("cache", shape.cache_bytes(batch, length)))
    if not any(shape.is_file for shape in shapes):  # else they are averaged, unless a rule is named
        # The solver computes on the first member's device, and keeps each head's whitening there.
        room = solver_bytes(v, len(shapes), sum(widths), rows)
        parts.append(PlanPart("solver", "workspace", shapes[0].home, "float64", room))
        whitening = _FP64 * sum(2 * d**2 + d for d in widths)
        parts.append(PlanPart("solver", "whitening", shapes[0].home, "float64", whitening))
    return Plan(batch, length, rows, tokens, parts)


def solver_bytes(v: int, n: int, width: int, rows: int) -> int:
    """Estimate the bytes of a solve by ``meet``: 4 n + 4 fp64 vectors over v per row, and two width × width matrices.

    Args:
        v: the number of tokens.
        n: the number of members.
        width: the sum of all heads' widths d_i.
        rows: the number of rows (positions) that are solved at once.
    """
    return _FP64 * (rows * v * (4 * n + 4) + 2 * width**2)


def _file(member: Member) -> _Shape:
    """Return the shape of a GGUF file that llama.cpp runs as it is; the library makes room for all of a text."""
    file, name = read_gguf(path_of(member), member.title).without_lists(), str(member)
    return _Shape(
        name, "cpu", number(member, "context") or file.context, file.tensors["token_embd.weight"].shape, "float16",
        lambda batch, context: batch * context * file.bytes_a_token,
        [PlanPart(name, "body", "cpu", "as stored", file.size)], is_file=True,
    )  # fmt: skip


def _shape(member: Member, dtype: Dtype, device: Device, trust_remote_code: bool) -> _Shape:
    """Build a member without weights, and place its modules; transformers works out a strategy such as ``"auto"``."""
    asked = member.quantization
    if asked is not None:
        quantized.require(asked, device)
    with torch.device("meta"):
        model = random_member(str(member), dtype_of(dtype, device), trust_remote_code=trust_remote_code)
    own = getattr(model.config, "quantization_config", None) if asked is None else quantized.config_of(asked, device)
    quantizer = quantized.quantizer_of(model, own)
    spread = device_map_of(device)
    places = {"": str(device or "cpu")} if spread is None else _get_device_map(model, spread, None, quantizer)
    sizes, home = quantized.planned_bytes(model, quantizer), str(main_device(places))
    plain = str(model.dtype).removeprefix("torch.")
    weights = [
        PlanPart(str(member), what, place, asked if what == "body" and asked else plain, size)
        for (what, place), size in _weights(model, places, sizes, home).items()
    ]
    c, layer = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    limit, head = (
        getattr(c, "max_position_embeddings", None),
        [c.vocab_size] * 2 if layer is None else layer.weight.shape,
    )
    return _Shape(str(member), home, limit, head, plain, partial(_cache_bytes, c, model.dtype.itemsize), weights)


def _cache_bytes(c: PreTrainedConfig, itemsize: int, batch: int, context: int) -> int:
    """Count the bytes of keys and values for ``batch`` sequences; layers of sliding attention keep their window."""
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kept = sum(min(context, getattr(layer, "sliding_window", context)) for layer in DynamicCache(config=c).layers)
    return int(batch * kept * 2 * heads * width * itemsize)


def _weights(
    model: PreTrainedModel, places: dict[str, Any], sizes: dict[str, int], home: str
) -> dict[tuple[str, str], int]:
    """Return the bytes of "body" and "head" by device and, for offloaded weights, "streamed" and "head copy"."""
    layer = model.get_output_embeddings()
    head = set() if layer is None else set(layer.parameters())
    found, streamed = defaultdict[tuple[str, str], int](int), defaultdict[str, int](int)
    for name, parameter in model.named_parameters():
        # A parameter is where the innermost module is that has a place, else on the CPU.
        holders = [module for module in places if not module or f"{name}.".startswith(f"{module}.")]
        place, what = str(places[max(holders, key=len)]) if holders else "cpu", "head" if parameter in head else "body"
        found[what, place] += sizes[name]
        if place == "disk" or (place == "cpu" and home != "cpu"):
            streamed[name.rpartition(".")[0]] += sizes[name]
            if what == "head":
                found["head copy", home] += sizes[name]
    if streamed:
        found["streamed", home] = max(streamed.values())
    return found
