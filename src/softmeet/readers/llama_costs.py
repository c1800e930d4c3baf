"""What calls of a GGUF file cost on this machine, and the faster layout of its weights: measured once, and kept.

How many tokens are drafted hangs on costs, and how llama.cpp rounds on how many tokens are read at once, and on the
layout. So a seed repeats its text only where both are taken from what is kept, and never from a clock.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch

from softmeet.derived import derived
from softmeet.members import llama_library
from softmeet.members.gguf_file import GgufFile
from softmeet.members.gguf_tokenizer import folder_for
from softmeet.readers.llama_context import LlamaContext, LlamaModel, RowTokens

# To be raised when costs are measured otherwise.
_FORM = 6
# The lengths of calls by which layouts are compared, those that are measured of the faster one, too, and how often
# each is: of a busy machine the least time tells the most.
_COMPARED, _OTHERS, _TIMES = (1, 4, 32), (2, 3, 6, 8, 16), 2
# Behind so many tokens; and the seconds after which no longer calls are measured, if there are two lengths to compare.
_BEHIND, _PATIENCE = 4, 2.0
# The other layout takes longer to load, and has to be so much faster in the mean.
_FASTER = 0.95


@dataclass(frozen=True)
class Costs:
    """What is known of a file on this machine.

    Attributes:
        repack: whether its weights are copied into the layout that llama.cpp has for this processor.
        calls: (tokens of a call, seconds that it takes), ascending; () if they are not known.
    """

    repack: bool
    calls: tuple[tuple[int, float], ...] = ()

    def written(self) -> bytes:
        """Return the costs as a text that can be kept."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, kept: bytes) -> Costs:
        """Read costs from the text that :meth:`written` returned."""
        said = json.loads(kept)
        return cls(bool(said["repack"]), tuple((int(count), float(cost)) for count, cost in said["calls"]))


def loaded(file: GgufFile, name: str, gpu_layers: int, repack: bool | None) -> tuple[LlamaModel, Costs]:
    """Load a file in the faster layout; costs are what is kept, or are measured now and kept.

    Of a small file, and where nothing can be kept, nothing is measured.

    Args:
        file: the file.
        name: the member's, for messages.
        gpu_layers: how many layers are put on a GPU.
        repack: the layout that is asked for; None for the faster one.

    Raises:
        CheckpointError: if llama.cpp is not installed, or cannot load the file.
    """
    held = dict[bool, LlamaModel]()

    def model(layout: bool) -> LlamaModel:
        if layout not in held:
            held.clear()  # there may be no room for two
            held[layout] = LlamaModel(file, name, gpu_layers, repack=layout)
        return held[layout]

    # Elsewhere than on x86 llama.cpp's own layouts are known to be faster.
    found = Costs(platform.machine() not in ("x86_64", "AMD64", "i686") if repack is None else repack)
    if folder := folder_for(file.path):
        llama_library.library()
        said = _FORM, _processor(), torch.get_num_threads(), llama_library.versions(), gpu_layers, repack
        kept = f"costs-{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}"
        measured = derived(folder, kept, lambda: _measured(model, repack), Costs.written, Costs.read)
        found = measured if (folder / kept).is_file() else found
    return model(found.repack), found


def _processor() -> str:
    """Return what the system says of the processor."""
    with suppress(OSError):
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return repr(sorted({line for line in said if line.startswith(("model name", "flags", "Features", "CPU "))}))
    return f"{platform.machine()} {platform.processor()}"


def _measured(model: Callable[[bool], LlamaModel], repack: bool | None) -> Costs:
    """Measure a layout; or compare both, and measure the faster one."""
    if repack is not None:
        return Costs(repack, tuple(_calls(model(repack), sorted((*_COMPARED, *_OTHERS))).items()))
    plain, packed = _calls(model(False), _COMPARED), _calls(model(True), _COMPARED)
    shared = plain.keys() & packed.keys()
    repack = prod(packed[k] / plain[k] for k in shared) < _FASTER ** len(shared)
    known = (packed if repack else plain) | _calls(model(repack), _OTHERS)
    return Costs(repack, tuple(sorted(known.items())))


def _calls(model: LlamaModel, lengths: Sequence[int]) -> dict[int, float]:
    """Return the least seconds of calls by their lengths, which ascend."""
    context, found = LlamaContext(model, 256), dict[int, float]()
    text = [k % model.v for k in range(_BEHIND, _BEHIND + max(lengths))]
    # The first calls fetch the weights.
    for where in range(_BEHIND):
        context.run([RowTokens(0, where, text[:1], (0,))])
    begun = time.perf_counter()
    for length in lengths:
        if len(found) > 1 and time.perf_counter() - begun > _PATIENCE:
            break
        taken = list[float]()
        for _ in range(_TIMES):
            start = time.perf_counter()
            for first in range(0, length, model.at_once(length)):
                piece = text[first : min(first + model.at_once(length), length)]
                context.run([RowTokens(0, _BEHIND + first, piece, range(len(piece)))])
            taken.append(time.perf_counter() - start)
            context.cut(0, _BEHIND)
        found[length] = min(taken)
    return found
