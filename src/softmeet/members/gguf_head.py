"""The output layer of a GGUF file, dequantised, and the rounding of hidden states before llama.cpp multiplies by it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.errors import UnsupportedHeadError, cannot_load
from softmeet.extras import require_extra
from softmeet.heads import SoftmaxHead
from softmeet.members.gguf_file import GgufFile

_NAMES, _BIAS = ("output.weight", "token_embd.weight"), "output.bias"
# How many rows tell whether two matrices are one in two types, and above which cosine they do: 0.997 was seen.
_ROWS, _ALIKE = 64, 0.9
# How far a head's logits may be from llama.cpp's: 4e-5 was seen.
_APART = 1e-2
# Types of weights by how llama.cpp rounds what they are multiplied by, ggml's type traits: in blocks of 32 and of 256.
_BY_32, _BY_256 = frozenset((2, 3, 6, 7, 8, 9, 20, 39, 40)), frozenset((*range(10, 20), 21, 22, 23, 29, 34, 35))


def gguf_head(file: GgufFile, name: str) -> tuple[SoftmaxHead, int]:
    """Read a file's output layer in single precision.

    Args:
        file: what the file says.
        name: the member's, for messages.

    Returns:
        (the head; the number of the type in which its weight is stored, for :func:`rounded`).

    Raises:
        CheckpointError: if the file has none, or what scales its logits is no number.
        InvalidInputError: if the package that dequantises is not installed.
    """
    require_extra("reading the head of a GGUF file", "gguf", "gguf")
    found = next((key for key in _NAMES if key in file.tensors), None)
    if found is None or len(file.tensors[found].shape) != 2:
        raise cannot_load(name, "it has no output layer that can be read")
    bias = _dequantised(file, _BIAS).flatten() if _BIAS in file.tensors else None
    scale, cap = file.own("logit_scale") or 1.0, file.own("final_logit_softcapping")
    if not isinstance(scale, int | float) or not isinstance(cap, int | float | None):
        raise cannot_load(name, f"its logits have the scale {scale!r} and the cap {cap!r}: expected numbers")
    return SoftmaxHead(_dequantised(file, found), bias, scale=float(scale), soft_cap=cap), file.tensors[found].kind


def require_its_logits(
    head: SoftmaxHead, hidden: Float[Tensor, "k d"], logits: Float[Tensor, "k v"], name: str
) -> None:
    """Check that a head makes the logits that llama.cpp tells behind hidden states.

    Raises:
        UnsupportedHeadError: if it does not.
    """
    apart = (head.logits(hidden) - logits).abs().max().item()
    if not apart <= _APART:
        raise UnsupportedHeadError(
            f"expected the output layer of {name} to make the logits that llama.cpp tells up to {_APART:g}, "
            f"got {apart:g} more or less: choose an average, or put +engine=transformers behind the file"
        )


def stored_twice(file: GgufFile) -> int:
    """Return how many weights of a file's output layer are those of its embedding, maybe rounded otherwise.

    A few rows tell: those of one matrix, in two types, point the same way, and those of two matrices do not. Of types
    that nothing here can read it is not known, and none.
    """
    output, embedding = map(file.tensors.get, _NAMES)
    if output is None or embedding is None or output.shape != embedding.shape:
        return 0
    rows = slice(None, None, -(-output.shape[0] // _ROWS))
    try:
        first, second = (_dequantised(file, key, rows) for key in _NAMES)
    except (ImportError, NotImplementedError, ValueError):
        return 0
    return math.prod(output.shape) if torch.cosine_similarity(first, second).median().item() > _ALIKE else 0


def _dequantised(file: GgufFile, key: str, rows: slice = slice(None)) -> Float[Tensor, ...]:
    import gguf

    stored = file.tensors[key]
    raw = np.memmap(file.path, np.uint8, "r", stored.start, (stored.size,)).reshape(*stored.shape[:-1], -1)[rows]
    found = gguf.quants.dequantize(np.array(raw), gguf.GGMLQuantizationType(stored.kind))
    return torch.from_numpy(np.require(found, requirements=("C", "W")))


def rounded(hidden: Float[np.ndarray, "k d"], kind: int) -> Float[np.ndarray, "k d"]:
    """Return hidden states as llama.cpp rounds them before it multiplies them by weights of a type.

    Example:
        >>> rounded(np.linspace(-1, 1, 32, dtype=np.float32)[None], 8)[0, :2].tolist()
        [-0.999..., -0.936...]
    """
    if kind in _BY_32:
        return _in_blocks(hidden, 32, np.float16)
    if kind in _BY_256 and hidden.shape[-1] % 256 == 0:
        return _in_blocks(hidden, 256, np.float32)
    if kind == 1:
        return hidden.astype(np.float16).astype(np.float32)
    if kind == 30:
        return torch.from_numpy(hidden).bfloat16().float().numpy()
    return hidden


def _in_blocks(hidden: Float[np.ndarray, "k d"], size: int, scales: Any) -> Float[np.ndarray, "k d"]:
    """Round blocks of so many numbers to 127 steps each way of their largest, by scales of a dtype."""
    blocks = hidden.reshape(len(hidden), -1, size)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    whole = np.rint(blocks * np.divide(1, step, out=np.zeros_like(step), where=step > 0))
    found: Float[np.ndarray, "k d"] = whole * step.astype(scales).astype(np.float32)
    return found.reshape(hidden.shape).astype(np.float32)
