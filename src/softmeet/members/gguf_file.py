"""The beginning of a GGUF file: what it says of its model, and where its tensors are, read without the weights.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from softmeet.errors import cannot_load
from softmeet.extras import require_extra

# Types of tensors by their numbers: plain numbers, blocks of 256 weights with scales within, and what no layer has.
_FLOATS, _K_QUANTS = frozenset((0, 1, 28, 30)), range(10, 15)
_SINGLE, _NEVER_WEIGHTS = 0, range(24, 29)
# llama.cpp's own, and to how many bytes it has the first of the tensors that it maps aligned.
_MOST_LAYERS, _MOST_EXPERTS, _ALIGNED = 512, 1024, 32
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.group_norm_epsilon")
TEMPLATE = "tokenizer.chat_template"
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
        """What most weights are stored in, such as Q4_0; where the file says how they were mixed, that, as Q4_K_M."""
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


def read_gguf(path: Path, name: str | None = None) -> GgufFile:
    """Read the beginning of a GGUF file, and check that all that it names is in it.

    Args:
        path: the file; of a model in several parts, the first.
        name: what messages call it; None for its path.

    Raises:
        CheckpointError: if it cannot be read, is no GGUF file of version 2 or 3, ends before its last tensor, or a part
            of it is missing.
        InvalidInputError: if the package that reads such files is not installed.
    """
    require_extra("reading GGUF files", "gguf", "gguf")
    try:
        _opened(path).close()
        with np.errstate(over="raise"):
            said, tensors = _read(path)
    except (ArithmeticError, LookupError, MemoryError, OSError, TypeError, ValueError, struct.error) as error:
        why = getattr(error, "strerror", None) or f"it is broken, or ends early ({error})"
        raise cannot_load(name or path, f"{why}: expected a whole GGUF file: fetch it again") from error
    found = GgufFile(path, said, tensors, sum(one.stat().st_size for one in _parts(path, said, name)))
    for wrong in _what_llama_cpp_asserts(found):
        raise cannot_load(name or path, f"{wrong}: fetch it again")
    return found


def _what_llama_cpp_asserts(file: GgufFile) -> Iterator[str]:
    """Yield what a file says that llama.cpp would end the process for.

    That is: no layers or too many; two tokens of one text, which for llama.cpp ends at a zero byte; numbers of experts
    or a norm's epsilon that cannot be; scalings of positions that it does not know; and weights that it cannot map.
    """
    layers, tokens = file.own("block_count"), file.said.get("tokenizer.ggml.tokens", [])
    if not (isinstance(layers, int) and 0 < layers <= _MOST_LAYERS):
        yield f"it says that it has {layers!r} layers: expected 1 to {_MOST_LAYERS}"
        return
    names = list(map(str, tokens)) if isinstance(tokens, list) else []
    if "\0" in "".join(names):
        names = [name.partition("\0")[0] for name in names]
    if len(set(names)) < len(names):
        yield "two of its tokens have the same text"
    yield from _wrong_numbers(file, layers)
    if min((one.start for one in file.tensors.values()), default=0) % _ALIGNED:
        yield f"its weights do not begin at a multiple of {_ALIGNED} bytes"


def _wrong_numbers(file: GgufFile, layers: int) -> Iterator[str]:
    """Yield what a file says of its experts, norms and positions that cannot be."""
    experts, used = (_most(file.own(f"expert_{key}")) for key in ("count", "used_count"))
    if not bool(experts) <= used <= experts <= _MOST_EXPERTS:
        yield f"it says that it uses {used:,} of {experts:,} experts"
    if (ahead := _most(file.own("nextn_predict_layers"))) > layers:
        yield f"it says that {ahead:,} of its {layers:,} layers predict further tokens"
    for key in _EPSILONS:
        if isinstance(epsilon := file.own(key), float) and not 0 <= epsilon < math.inf:
            yield f"it says that {key} is {epsilon}: expected a number from 0 on"
    if isinstance(scaling := file.own("rope.scaling.type"), str) and scaling not in _SCALINGS:
        yield f"it says that rope.scaling.type is {scaling!r}: expected {', '.join(_SCALINGS)}"


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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return what a file says, by key, and where its tensors are, as ggml's own package reads them.

    Raises:
        ValueError: if it does not say of which architecture it is; what the package raises for broken files.
    """
    import gguf

    class ListReader(gguf.GGUFReader):
        """A reader that reads a list as one part: of each token a part of its own would take seconds."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            kinds = gguf.GGUFValueType
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            inner, count = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
            start = orig_offs + 12
            if inner == kinds.STRING:
                found, end = _texts(self.data.base, start, count)  # the map itself is the quickest to slice
            else:
                found = self._get(start, self.gguf_scalar_to_np[kinds(inner)], count).tolist()
                end = start + count * np.dtype(self.gguf_scalar_to_np[kinds(inner)]).itemsize
            if len(found) < count or end > len(self.data):
                raise ValueError("it ends within its metadata")
            return end - orig_offs, [found], [0], [kinds.ARRAY]

    reader = ListReader(path)
    if reader.byte_order != "I":
        raise ValueError("it is of another byte order")
    said = {
        key: one.parts[-1] if isinstance(one.parts[-1], list) else one.contents() for key, one in reader.fields.items()
    }
    if not isinstance(said.get("general.architecture"), str):
        raise ValueError("it does not say of which architecture it is")
    tensors = {
        one.name: StoredTensor(tuple(map(int, reversed(one.shape))), int(one.tensor_type), one.data_offset, one.n_bytes)
        for one in reader.tensors
    }
    return said, tensors


def _texts(raw: Any, at: int, count: int) -> tuple[list[str], int]:
    """Read so many texts; return them, and where the last one ends."""
    length, found = struct.Struct("<Q").unpack_from, list[str]()
    for _ in range(count):
        start = at + 8
        at = start + length(raw, at)[0]
        found.append(raw[start:at].decode())
    return found, at


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


def content_of(file: GgufFile) -> tuple[Any, ...]:
    """Return what a tokenizer depends on but for its chat template, such that equal ones are equal."""
    said = sorted((key, own) for key, own in file.said.items() if key.startswith("tokenizer.") and key != TEMPLATE)
    frozen = [(key, hash(tuple(value)) if isinstance(value, list) else value) for key, value in said]
    return (file.architecture, *frozen)
