"""The beginning of a GGUF file: what it says of its model, and where its tensors are, read without the weights.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from softmeet.errors import cannot_load
from softmeet.extras import require_extra

# Of each type of tensors, by its number: (how many weights are in a block, how many bytes it has).
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18),
}  # fmt: skip
_FLOATS, _K_QUANTS = frozenset((0, 1, 28, 30)), range(10, 15)
_SINGLE, _NEVER_WEIGHTS = 0, range(24, 29)
# Of each type of values that have one size, by its number, its format.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# What no file that people use comes near.
_MOST_DIMENSIONS, _MOST_ALIGNMENT = 4, 1 << 16

# llama.cpp's own, and to how many bytes it has the first of the tensors that it maps aligned.
_MOST_LAYERS, _MOST_EXPERTS, _ALIGNED = 512, 1024, 32
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.group_norm_epsilon")
_SCALINGS = ("none", "linear", "yarn", "longrope")
# What a text's keys and values depend on.
_SIZES = (
    "block_count", "embedding_length", "attention.head_count", "attention.key_length", "attention.value_length",
)  # fmt: skip
# How many samples of a file tell it from others, and the bytes of each.
_SAMPLES, _SAMPLE = 256, 4096
# Longer lists than one number a layer.
_LONG = 1024


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: its shape as torch has it, the number of its type, its first byte, and how many it has."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class GgufFile:
    """What a GGUF file says of itself before its weights; made by :func:`read_gguf`.

    Attributes:
        path: the file.
        said: its metadata, by key, arrays as lists.
        tensors: where each tensor is, by name.
        size: the bytes of the file; of one in several parts, of all of them.

    Example:
        >>> GgufFile(Path("a.gguf"), {"general.architecture": "qwen2", "qwen2.context_length": 4096}, {}, 0).context
        4096
    """

    path: Path
    said: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    size: int

    @property
    def architecture(self) -> str:
        """The kind of model, as llama.cpp calls it."""
        return str(self.said["general.architecture"])

    def own(self, key: str) -> Any:
        """Return what is said under a key of the architecture's own, such as ``block_count``; None if nothing is."""
        return self.said.get(f"{self.architecture}.{key}")

    @property
    def context(self) -> int | None:
        """The number of tokens of the texts that the model was trained on; None if it is not said."""
        found = self.own("context_length")
        return found if isinstance(found, int) and found > 0 else None

    @property
    def template(self) -> str | None:
        """The chat template of its tokenizer; None if it has none."""
        found = self.said.get("tokenizer.chat_template")
        return found if isinstance(found, str) else None

    @cached_property
    def is_quantised(self) -> bool:
        """Whether some weights are stored in blocks with a common scale."""
        return any(one.kind not in _FLOATS for one in self.tensors.values())

    @property
    def quantization(self) -> str:
        """What most weights are stored in, such as Q4_0; where the file says how they were mixed, that, as Q4_K_M.

        Raises:
            InvalidInputError: if the package that knows the names is not installed.
        """
        require_extra("naming what a GGUF file is stored in", "gguf", "gguf")
        from gguf import GGMLQuantizationType, LlamaFileType

        said, sizes = self.said.get("general.file_type"), Counter[int]()
        if said in set(LlamaFileType):
            return LlamaFileType(said).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for one in self.tensors.values():
            sizes[one.kind] += math.prod(one.shape)
        return GGMLQuantizationType(sizes.most_common(1)[0][0]).name

    @property
    def is_of_k_quants(self) -> bool:
        """Whether most weights are in blocks of 256 with scales within (Q2_K to Q6_K)."""
        some = sum(math.prod(one.shape) for one in self.tensors.values() if one.kind in _K_QUANTS)
        return 2 * some > sum(math.prod(one.shape) for one in self.tensors.values())

    @property
    def bytes_a_token(self) -> int:
        """The bytes of a token's keys and values in half precision; 0 if what is said does not tell."""
        layers, width, heads, key, value = (_most(self.own(name)) for name in _SIZES)
        few = _most(self.own("attention.head_count_kv") or heads)
        each = width // heads if heads else 0
        return 2 * layers * few * ((key or each) + (value or each)) if width else 0

    def without_lists(self) -> GgufFile:
        """Return the same without long lists, such as the tokens, which take much memory."""
        kept = {key: one for key, one in self.said.items() if not (isinstance(one, list) and len(one) > _LONG)}
        return replace(self, said=kept)


def _most(said: Any) -> int:
    """Return a number above 0, or the largest of a list of them; 0 of anything else."""
    whole = isinstance(said, list) and all(isinstance(one, int) for one in said)
    found = max(said, default=0) if whole else said
    return found if isinstance(found, int) and found > 0 else 0


def _opened(path: Path) -> BinaryIO:
    """Open a file to read; OSError if it is none, such as a FIFO, which nobody may ever write to."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(0, "it is no regular file")
    return path.open("rb")


def begins_as_gguf(path: Path) -> bool:
    """Return whether a file begins as GGUF files do, whatever it is called, as ollama's are called by their hash."""
    try:
        with _opened(path) as held:
            return held.read(4) == b"GGUF"
    except OSError:
        return False


def fingerprint(path: Path) -> str:
    """Return 16 hexadecimal digits that tell a file from others: of its size, its first MB and samples of the rest.

    It takes milliseconds, however large the file is; a change of a few weights may escape it.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    try:
        with _opened(path) as held:
            size, found = os.fstat(held.fileno()).st_size, hashlib.sha256()
            found.update(size.to_bytes(8, "little"))
            found.update(held.read(1 << 20))
            for k in range(_SAMPLES):
                held.seek(max(0, size - _SAMPLE) * k // (_SAMPLES - 1))
                found.update(held.read(_SAMPLE))
    except OSError as error:
        raise cannot_load(path, f"{error.strerror}: check the path") from error
    return found.hexdigest()[:16]


class _Reading:
    """The bytes of a file, read from the beginning on; what is behind its end is a ValueError."""

    def __init__(self, held: mmap.mmap) -> None:
        self._held, self.at = held, 0

    def number(self, kind: str) -> Any:
        (found,) = struct.unpack_from(f"<{kind}", self._held, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return found

    def text(self) -> str:
        length = self.number("Q")
        start, self.at = self.at, self.at + length
        if self.at > len(self._held):
            raise ValueError(f"it has a text of {length:,} bytes where it ends")
        return self._held[start : self.at].decode()

    def _texts(self, count: int) -> list[str]:
        """Read so many texts; there are hundreds of thousands of tokens."""
        held, at, length, found = self._held, self.at, struct.Struct("<Q").unpack_from, list[str]()
        if count > len(held) // 8:
            raise ValueError(f"it ends within its metadata, at {len(held):,} bytes")
        for _ in range(count):
            start = at + 8
            at = start + length(held, at)[0]
            found.append(held[start:at].decode())
        if at > len(held):
            raise ValueError("it has a text where it ends")
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        if kind in _FORMATS:
            return self.number(_FORMATS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"it has a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            return self._texts(count)
        if inner not in _FORMATS:
            raise ValueError(f"it has a list of the unknown type {inner}")
        size = count * struct.calcsize(f"<{_FORMATS[inner]}")
        if self.at + size > len(self._held):
            raise ValueError(f"it has a list of {count:,} numbers where it ends")
        start, self.at = self.at, self.at + size
        return list(struct.unpack_from(f"<{count}{_FORMATS[inner]}", self._held, start))


def read_gguf(path: Path, name: str | None = None) -> GgufFile:
    """Read the beginning of a GGUF file, and check that all that it names is in it.

    Args:
        path: the file; of a model in several parts, the first.
        name: what messages call it; None for its path.

    Raises:
        CheckpointError: if it cannot be read, is no GGUF file of version 2 or 3, ends before its last tensor, or a part
            of it is missing.
    """
    try:
        with _opened(path) as held, mmap.mmap(held.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            said, tensors = _read(_Reading(mapped), mapped)
    except (OSError, ValueError, struct.error, OverflowError, MemoryError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if isinstance(error, struct.error | OverflowError | MemoryError):
            why = "it ends within its metadata"
        elif isinstance(error, UnicodeDecodeError):
            why = "it has a text that is no UTF-8"
        raise cannot_load(name or path, f"{why}: expected a whole GGUF file: fetch it again") from error
    found = GgufFile(path, said, tensors, sum(one.stat().st_size for one in _parts(path, said, name)))
    _require_what_llama_cpp_asserts(found, name or str(path))
    return found


def _require_what_llama_cpp_asserts(file: GgufFile, name: str) -> None:
    """Refuse what llama.cpp would end the process for.

    That is: no layers or too many; two tokens of one text, which for llama.cpp ends at a zero byte; numbers of experts
    or a norm's epsilon that cannot be; scalings of positions that it does not know; and weights that it cannot map.

    Raises:
        CheckpointError: if it is so.
    """
    layers, tokens = file.own("block_count"), file.said.get("tokenizer.ggml.tokens", [])
    if not (isinstance(layers, int) and 0 < layers <= _MOST_LAYERS):
        raise cannot_load(name, f"it says that it has {layers!r} layers: expected 1 to {_MOST_LAYERS}: fetch it again")
    if isinstance(tokens, list) and len({str(one).partition("\0")[0] for one in tokens}) < len(tokens):
        raise cannot_load(name, "two of its tokens have the same text: fetch it again")
    experts, used = (_most(file.own(f"expert_{key}")) for key in ("count", "used_count"))
    if not bool(experts) <= used <= experts <= _MOST_EXPERTS:
        raise cannot_load(name, f"it says that it uses {used:,} of {experts:,} experts: fetch it again")
    if (ahead := _most(file.own("nextn_predict_layers"))) > layers:
        raise cannot_load(
            name, f"it says that {ahead:,} of its {layers:,} layers predict further tokens: fetch it again"
        )
    for said in _wrong(file):
        raise cannot_load(name, f"it says that {said}: fetch it again")
    if min((one.start for one in file.tensors.values()), default=0) % _ALIGNED:
        raise cannot_load(name, f"its weights do not begin at a multiple of {_ALIGNED} bytes: fetch it again")


def _wrong(file: GgufFile) -> Iterator[str]:
    """Yield what a file says of its norms and positions that cannot be."""
    for key in _EPSILONS:
        if isinstance(epsilon := file.own(key), float) and not 0 <= epsilon < math.inf:
            yield f"{key} is {epsilon}: expected a number from 0 on"
    if isinstance(scaling := file.own("rope.scaling.type"), str) and scaling not in _SCALINGS:
        yield f"rope.scaling.type is {scaling!r}: expected {', '.join(_SCALINGS)}"


def require_types(file: GgufFile, name: str) -> None:
    """Refuse weights of types that llama.cpp would end the process for.

    Raises:
        CheckpointError: if there is one.
    """
    for key, one in file.tensors.items():
        if not key.endswith((".weight", ".bias")):
            continue
        # What it adds, or multiplies numbers by one by one, it takes in single precision alone.
        if one.kind in _NEVER_WEIGHTS or (len(one.shape) == 1 and one.kind != _SINGLE):
            why = f"llama.cpp cannot compute with its {key}, which is stored as type {one.kind}"
            raise cannot_load(name, f"{why}: try +engine=transformers")


def _read(reading: _Reading, mapped: mmap.mmap) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if mapped[:4] != b"GGUF":
        raise ValueError(f"it is no GGUF file, as it begins with {mapped[:4]!r}")
    reading.at = 4
    version, many, keys = (reading.number(kind) for kind in "IQQ")
    if version not in (2, 3):
        raise ValueError(f"it is of version {version if version < 1 << 16 else 'of another byte order'}, not 2 or 3")
    said = dict[str, Any]()
    for _ in range(keys):
        key = reading.text()
        said[key] = reading.value(reading.number("I"))
    if not isinstance(said.get("general.architecture"), str):
        raise ValueError("it does not say of which architecture it is")
    found = [_tensor(reading) for _ in range(many)]
    align = said.get("general.alignment", 32)
    if not (isinstance(align, int) and 0 < align <= _MOST_ALIGNMENT and align & (align - 1) == 0):
        raise ValueError(f"it says an alignment of {align!r}, which is no power of two")
    begin = -(-reading.at // align) * align
    tensors = dict[str, StoredTensor]()
    for name, shape, kind, offset in found:
        if name in tensors:
            raise ValueError(f"it has two tensors {name}")
        tensors[name] = _stored(name, shape, kind, begin + offset, len(mapped))
    return said, tensors


def _stored(name: str, shape: tuple[int, ...], kind: int, start: int, end: int) -> StoredTensor:
    """Return where a tensor is, which has to be whole before the ``end`` of the file."""
    each, size = _BLOCKS.get(kind, (1, 0))
    if shape[-1] % each:
        raise ValueError(f"its tensor {name} has rows of {shape[-1]:,} weights, which are no whole blocks")
    needed = prod(shape) // each * size
    if start + needed > end:
        raise ValueError(f"it ends before its tensor {name} does, at {end:,} of {start + needed:,} bytes")
    return StoredTensor(shape, kind, start, needed)


def _tensor(reading: _Reading) -> tuple[str, tuple[int, ...], int, int]:
    """Read (a tensor's name, its shape, the number of its type, its first byte behind the metadata)."""
    name, dimensions = reading.text(), reading.number("I")
    if not 0 < dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"its tensor {name} has {dimensions:,} dimensions")
    shape = tuple(reversed([reading.number("Q") for _ in range(dimensions)]))
    return name, shape, reading.number("I"), reading.number("Q")


def _parts(path: Path, said: Mapping[str, Any], name: str | None) -> list[Path]:
    """Return all files of a model; those of one in several parts are called NAME-00001-of-00003.gguf and so on.

    Raises:
        CheckpointError: if one is missing, or the path is not that of the first.
    """
    count = said.get("split.count", 0)
    if not (isinstance(count, int) and count > 1):
        return [path]
    stem, first = path.name.removesuffix(f"-00001-of-{count:05}.gguf"), said.get("split.no")
    if stem == path.name or first != 0:
        raise cannot_load(name or path, f"it is one of {count} parts: name the first, …-00001-of-{count:05}.gguf")
    parts = [path.with_name(f"{stem}-{k + 1:05}-of-{count:05}.gguf") for k in range(count)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise cannot_load(name or path, f"it is in {count} parts, of which {missing[0]} is missing: put it beside them")
    return parts
