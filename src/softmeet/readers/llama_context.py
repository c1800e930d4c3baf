"""A GGUF file in llama.cpp: its weights, and the keys and values of many texts that share cells of one cache.

A text has a *row*, which llama.cpp calls a sequence. Texts that begin alike share the cells of their beginning. The
cache begins small, and is made anew with twice the room when it is full.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import torch
from jaxtyping import Float, Int

from softmeet.errors import CheckpointError, InvalidInputError, cannot_load
from softmeet.members.gguf_file import GgufFile, require_types
from softmeet.members.gguf_head import rounded
from softmeet.members.llama_library import library
from softmeet.suspended import StoppedError, attended, control

# Rows and cells with which a cache begins, and the most rows that llama.cpp has.
_ROWS, _CELLS, MOST_ROWS = 16, 4096, 256
# The most tokens of one call, and the most of them behind which it predicts.
MOST_TOKENS, MOST_TOLD = 512, 64
# Bytes of weights, times tokens: about so much two cores read in a second or two, for which others may have to wait.
_A_WHILE = 1.5e11
# Of so many tokens on a call is long enough for Ctrl-C to be awaited.
_LONG = 16
# What llama_decode returns when it was stopped.
_STOPPED = 2
# The share of the free memory that a larger cache may take.
_SHARE = 0.8
# From eight tokens on llama.cpp unpacks K-quants, which costs as much for a call of 8 as for one of 16: so many took
# longer than two calls of half of them.
_IN_TWO = range(8, 13)
# For a file whose weights are not quantised: the number of single precision, for its keys and values, and that of
# attention which does not round them.
_FLOAT32, _PLAIN = 0, 0


def longest_text(file: GgufFile, name: str, asked: int | None) -> int:
    """Return how many tokens a text may have: as many as are asked for, or as the file says, if it has the positions.

    Raises:
        InvalidInputError: if more are asked for than a file has positions.
    """
    learned = file.tensors.get("position_embd.weight")
    most = learned.shape[0] if learned is not None else None
    if asked is not None and most is not None and asked > most:
        raise InvalidInputError(
            f"expected a context of at most {most:,} tokens of {name}, the positions that it has, got {asked:,}"
        )
    return min(asked or file.context or _CELLS, most or sys.maxsize)


@dataclass(frozen=True)
class RowTokens:
    """New tokens of one row in a call of the model.

    Attributes:
        row: the row's number.
        start: how many tokens of it were run.
        tokens: the new ones.
        told: behind which of them, counted from 0, predictions are wanted, ascending.
    """

    row: int
    start: int
    tokens: Sequence[int]
    told: Sequence[int]


def _free_context(free: Any, found: Any, model: LlamaModel) -> None:
    free(found)


def _free_memory() -> int | None:
    """Return how many bytes of memory are free, those of caches included; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) << 10 if found else None


class NoRoomError(InvalidInputError):
    """No room for more keys and values."""


class LlamaModel:
    """The weights of a GGUF file in llama.cpp: mapped into memory, or copied into another layout.

    Args:
        file: what the file says of itself.
        name: the member's, for messages.
        gpu_layers: how many layers are put on a GPU.
        repack: whether weights are copied into the layout that llama.cpp has for this processor.

    Attributes:
        v: the number of tokens.
        can_crop: whether a text can be taken back, as of models without recurrent layers.
        repack: as given.
        bytes: of all weights.
        parameters: the number of all weights.

    Raises:
        CheckpointError: if llama.cpp is not installed, or cannot load the file.
    """

    def __init__(self, file: GgufFile, name: str, gpu_layers: int = 0, *, repack: bool = False) -> None:
        require_types(file, name)
        self.library = library()
        self.file, self.name, self.repack, call = file, name, repack, self.library.functions
        options = call.llama_model_default_params()
        options.n_gpu_layers = gpu_layers
        options.use_extra_bufts = repack
        # Where weights are copied, a map of the file would be memory for nothing. Libraries name it in either way.
        for unmapped, value in (("load_mode", 0), ("use_mmap", False)) if repack else ():
            if hasattr(options, unmapped):
                setattr(options, unmapped, value)
        self.library.said.clear()
        found = call.llama_model_load_from_file(os.fsencode(file.path), options)
        if not found:
            why = next((text for text in self.library.said if "error" in text), "it says nothing of why")
            raise cannot_load(name, f"llama.cpp cannot load it: {why}")
        self.pointer: Any = found
        finalize(self, call.llama_model_free, found)
        vocabulary = call.llama_model_get_vocab(found)
        self.v = int(call.llama_vocab_n_tokens(vocabulary))
        self._vocabulary, self._ends = vocabulary, call.llama_vocab_is_eog
        self.can_crop = not (call.llama_model_is_recurrent(found) or call.llama_model_is_hybrid(found))
        self.bytes = int(call.llama_model_size(found))
        self.parameters = int(call.llama_model_n_params(found))
        self._unpacks = file.is_of_k_quants and not repack and not gpu_layers
        # Not by a clock, since rounding depends on how many tokens are read at once.
        self._most = max(_LONG, min(MOST_TOKENS, 1 << int(_A_WHILE / self.bytes).bit_length() - 1))

    def ends(self, among: Iterable[int]) -> frozenset[int]:
        """Return which of some tokens end a text."""
        return frozenset(k for k in among if k < self.v and self._ends(self._vocabulary, k))

    def at_once(self, count: int) -> int:
        """Return how many of so many tokens are best run in one call."""
        return -(-count // 2) if self._unpacks and count in _IN_TWO else self._most

    def tokens(self, text: str) -> list[int]:
        """Cut a text into tokens as llama.cpp does, without those that it puts before every text."""
        call, coded = self.library.functions, text.encode()
        held = np.empty(len(coded) + 8, np.int32)
        where = self.library.pointer("int32_t", held.ctypes.data)
        count = call.llama_tokenize(self._vocabulary, coded, len(coded), where, len(held), False, False)
        return [int(token) for token in held[: max(0, count)]]


@cache
def _looks() -> int:
    """Return the address of the C function that llama.cpp asks whether to stop, with a control's address.

    ``strlen`` is 0 while the string there is empty. A function of Python's would need its lock at every step.
    """
    library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    return ctypes.cast(library.strlen, ctypes.c_void_p).value or 0


class LlamaContext:
    """Keys and values of the texts that one model reads.

    Args:
        model: the model.
        limit: the most tokens of a text.

    Attributes:
        cells: how many tokens there is room for, in all rows together.
        rows: how many rows there are.
    """

    def __init__(self, model: LlamaModel, limit: int) -> None:
        self._model, self._library, self._call = model, model.library, model.library.functions
        # A call may have no more tokens than there are cells.
        self.rows, self.cells = _ROWS, max(MOST_TOKENS, min(_CELLS, -(-limit // 256) * 256))
        if (short := model.file.own("rope.scaling.original_context_length")) and limit > short:
            # By its room llama.cpp chooses the factors for short or for long texts, which must not change.
            self.cells = max(self.cells, short + 256)
        self._width, self._kind, self._first = 0, 0, (self.rows, self.cells)
        self._pointer, self._free = self._made(self.rows, self.cells)
        size = MOST_TOKENS
        self._tokens, self._places, self._one = (np.empty(size, np.int32) for _ in range(3))
        self._row, self._wanted = np.empty(size, np.int32), np.empty(size, np.int8)
        self._one[:] = 1
        self._where = self._row.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        self._batch = batch = self._library.batch()
        fields: dict[str, tuple[str, Any]] = {
            "token": ("int32_t", self._tokens), "pos": ("int32_t", self._places), "n_seq_id": ("int32_t", self._one),
            "seq_id": ("int32_t *", self._where), "logits": ("int8_t", self._wanted),
        }  # fmt: skip
        for field, (kind, held) in fields.items():
            setattr(batch, field, self._library.pointer(kind, held.ctypes.data))

    def _made(self, rows: int, cells: int) -> tuple[Any, Any]:
        """Make a context; returns (it, what frees it)."""
        options = self._call.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified, options.swa_full = cells, rows, True, True
        options.n_batch = options.n_ubatch = MOST_TOKENS
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.no_perf, options.embeddings = True, bool(self._width)
        if hasattr(options, "n_outputs_max"):
            options.n_outputs_max = MOST_TOKENS if self._width else max(MOST_TOLD, rows)
        if not self._model.file.is_quantised:
            options.type_k = options.type_v = _FLOAT32
            options.flash_attn_type = _PLAIN
        found = self._call.llama_init_from_model(self._model.pointer, options)
        if not found:
            raise NoRoomError(
                f"expected memory for the keys and values of {cells:,} tokens of {self._model.name}, and there is not "
                "enough: put +context=N behind it, or free some"
            )
        # Which keeps the model until the context is gone.
        return found, finalize(self, _free_context, self._call.llama_free, found, self._model)

    def tell_hidden(self, width: int, kind: int) -> None:
        """Have :meth:`run` tell hidden states, too, behind the logits.

        Args:
            width: how many numbers a state has; 0 to tell them no more.
            kind: the type of weights by which they are multiplied, as they are rounded for it.
        """
        self._width, self._kind = width, kind
        # A context that is told so while it runs crashes with some models.
        self.grow(self.rows, self.cells)

    @property
    def _memory(self) -> Any:
        return self._call.llama_get_memory(self._pointer)

    def grow(self, rows: int, cells: int) -> None:
        """Make room for so many rows and tokens, and keep what is there.

        Raises:
            NoRoomError: if there is not enough memory.
        """
        needed, free_now = cells * self._model.file.bytes_a_token, _free_memory()
        if free_now is not None and needed > _SHARE * free_now:
            raise NoRoomError(
                f"expected {needed / 1e6:,.0f} MB for keys and values of {cells:,} tokens of {self._model.name}, and "
                f"{free_now / 1e6:,.0f} MB are free: ask for fewer texts at once, or put +context=N behind it"
            )
        short = self._model.file.own("rope.scaling.original_context_length")
        if short and self.cells <= short < cells:
            raise NoRoomError(f"expected at most {short:,} tokens of {self._model.name} in all texts at once")
        size = self._call.llama_state_get_size(self._pointer)
        try:
            held = np.empty(size, np.uint8)
        except MemoryError as error:
            raise NoRoomError(f"expected {size / 1e6:,.0f} MB to move keys and values of {self._model.name}") from error
        where = self._library.pointer("uint8_t", held.ctypes.data)
        wrote = self._call.llama_state_get_data(self._pointer, where, size)
        pointer, free = self._made(rows, cells)
        if self._call.llama_state_set_data(pointer, where, wrote) != wrote:
            free()
            raise NoRoomError(f"cannot move the keys and values of {self._model.name} to where there is more room")
        self._replace(pointer, free, rows, cells)

    def _replace(self, pointer: Any, free: Any, rows: int, cells: int) -> None:
        """Have another context in place of this one's, which is freed last, so that nobody is left with it."""
        before = self._free
        self._pointer, self._free, self.rows, self.cells = pointer, free, rows, cells
        before()

    def begin_anew(self) -> None:
        """Forget all rows, and have as much room as at first.

        How llama.cpp rounds depends on where in the cache a text's tokens stand, and so on what was there before.
        """
        if (self.rows, self.cells) != self._first:
            self._replace(*self._made(*self._first), *self._first)
        self._call.llama_memory_clear(self._memory, False)

    def copy(self, source: int, target: int, length: int) -> None:
        """Have a row begin with the first ``length`` tokens of another."""
        self.cut(target, 0)
        self._call.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def cut(self, row: int, length: int) -> None:
        """Forget what a row has behind its first ``length`` tokens."""
        if self._free.alive:  # at the end of a process, contexts go first
            self._call.llama_memory_seq_rm(self._memory, row, length, -1)

    def run(self, pieces: Sequence[RowTokens]) -> Float[np.ndarray, "k w"]:
        """Run new tokens of some rows in one call of the model, at most 512 of them.

        Returns:
            logits behind each token where they are wanted, in the order of the pieces, in memory of their own; behind
            them the hidden states, if these are told.

        Raises:
            NoRoomError: if there is no room for them; then nothing was run.
            CheckpointError: if the library fails.
            StoppedError: if the control says so, while they are run, too; then nothing was run.
        """
        at = 0
        for one in pieces:
            end = at + len(one.tokens)
            self._tokens[at:end], self._row[at:end] = one.tokens, one.row
            self._places[at:end] = np.arange(one.start, one.start + len(one.tokens))
            self._wanted[at:end] = 0
            self._wanted[[at + k for k in one.told]] = 1
            at = end
        self._batch.n_tokens = at
        threads = torch.get_num_threads()
        self._call.llama_set_n_threads(self._pointer, threads, threads)
        code = attended(self._decode) if at >= _LONG else self._decode()
        if code == _STOPPED:
            self._library.said.clear()
            raise StoppedError
        if code == 1:
            raise NoRoomError(f"expected room for {at:,} tokens more of {self._model.name}, and there is none")
        if code:
            said = "; ".join(self._library.said)
            raise CheckpointError(f"llama.cpp cannot run {self._model.name} (it returned {code}): {said}")
        return self._found(np.flatnonzero(self._wanted[:at]))

    def _decode(self) -> int:
        asked = self._library.pointer("void", control().address)
        self._call.llama_set_abort_callback(
            self._pointer, self._library.function("ggml_abort_callback", _looks()), asked
        )
        code: int = self._call.llama_decode(self._pointer, self._library.argument(self._batch))
        return code

    def _found(self, places: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k w"]:
        """Return a copy of what the last call has told at some of its tokens."""
        floats, v, width = self._library.floats, self._model.v, self._width
        if not width:
            told = floats(self._call.llama_get_logits(self._pointer), len(places) * v) if len(places) else np.empty(0)
            return told.astype(np.float32).reshape(-1, v)
        found = np.empty((len(places), v + width), np.float32)
        for own, place in zip(found, map(int, places), strict=True):
            own[:v] = floats(self._call.llama_get_logits_ith(self._pointer, place), v)
            own[v:] = floats(self._call.llama_get_embeddings_ith(self._pointer, place), width)
        found[:, v:] = rounded(found[:, v:], self._kind)
        return found
