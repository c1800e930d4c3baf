"""llama.cpp's library, by whichever of two bindings is installed: models and contexts, without memory of their own.

The functions are those of llama.h; llama-cpp-py-sync declares them for CFFI, llama-cpp-python for ctypes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from softmeet.errors import CheckpointError
from softmeet.extras import install_line

# What a library may be, by the name of its package, the one that is tried first.
BINDINGS = ("llama_cpp_py_sync", "llama_cpp")
# The lowest of llama.cpp's levels of messages that tell why something failed, and that of lines that go on.
_ERROR, _GOES_ON = 4, 5
_KEPT = 20


class Library:
    """llama.cpp's functions as attributes, and what the two bindings have different forms of.

    Args:
        functions: the functions.
        folder: where the binding has its libraries.
        listener: of the library's messages, which calls :meth:`keep`.
        null: a null pointer.

    Attributes:
        functions: as given.
        said: the last errors that the library has told of.
    """

    def __init__(self, functions: Any, folder: Path, listener: Any, null: Any) -> None:
        self.functions, self.said, self._listener = functions, deque[str](maxlen=_KEPT), listener
        functions.llama_log_set(listener, null)
        functions.llama_backend_init()
        _say_last_words(folder)

    def keep(self, level: int, text: bytes) -> None:
        """Keep a message of the library's, if it is of an error or goes on with one."""
        if level == _ERROR or (level == _GOES_ON and self.said):
            self.said.append(text.decode(errors="replace").strip())


class _ByCffi(Library):
    """llama-cpp-py-sync."""

    def __init__(self) -> None:
        bindings = import_module("llama_cpp_py_sync._cffi_bindings")
        self._ffi = ffi = bindings.get_ffi()

        def listen(level: int, text: Any, data: Any) -> None:
            self.keep(level, ffi.string(text))

        # Ctrl-C that comes in it is not printed, but heard of elsewhere.
        listener = ffi.callback("void(enum ggml_log_level, const char *, void *)", listen, onerror=lambda *_: None)
        super().__init__(bindings.get_lib(), Path(str(bindings.__file__)).parent, listener, ffi.NULL)

    def pointer(self, kind: str, address: int) -> Any:
        """Return an address as a pointer to ``kind``, such as ``int32_t``."""
        return self._ffi.cast(f"{kind} *", address)

    def function(self, kind: str, address: int) -> Any:
        """Return an address as a pointer to a function of a kind that llama.cpp names."""
        return self._ffi.cast(kind, address)

    def floats(self, pointer: Any, count: int) -> Float[np.ndarray, " count"]:
        """Return the numbers that a pointer points to, without copying them; none of a null pointer."""
        if pointer == self._ffi.NULL:
            return np.empty(0, np.float32)
        return np.frombuffer(self._ffi.buffer(pointer, 4 * count), np.float32)

    def batch(self) -> Any:
        """Return a batch with all fields zero, whose fields can be set."""
        return self._ffi.new("llama_batch *")

    def argument(self, batch: Any) -> Any:
        """Return what functions take for a batch."""
        return batch[0]


class _ByCtypes(Library):
    """llama-cpp-python, with the same methods."""

    _kinds: ClassVar[dict[str, Any]] = {
        "void": None, "int32_t": ctypes.c_int32, "int8_t": ctypes.c_int8, "uint8_t": ctypes.c_uint8,
        "int32_t *": ctypes.POINTER(ctypes.c_int32),
    }  # fmt: skip

    def __init__(self) -> None:
        functions = import_module("llama_cpp.llama_cpp")
        listener = functions.llama_log_callback(lambda level, text, data: self.keep(level, text))
        super().__init__(functions, Path(str(functions.__file__)).parent / "lib", listener, None)

    def pointer(self, kind: str, address: int) -> Any:
        return ctypes.cast(address, ctypes.POINTER(self._kinds[kind]))

    def function(self, kind: str, address: int) -> Any:
        return getattr(self.functions, kind)(address)

    def floats(self, pointer: Any, count: int) -> Float[np.ndarray, " count"]:
        return np.ctypeslib.as_array(pointer, (count,)) if pointer else np.empty(0, np.float32)

    def batch(self) -> Any:
        return self.functions.llama_batch()

    def argument(self, batch: Any) -> Any:
        return batch


@cache
def _say_last_words(folder: Path) -> Callable[[bytes], None] | None:
    """Have an assertion of the library that fails, which ends the process, say so in a sentence."""

    def last_words(message: bytes) -> None:
        text = f"softmeet: llama.cpp ends this process, as an assertion of its own failed: {message.decode()}\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())

    found = next((one for one in sorted(folder.glob("*ggml-base*")) if one.is_file()), None)
    if found is None:
        return None
    called = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(last_words)
    ctypes.CDLL(str(found)).ggml_set_abort_callback(called)
    # Whoever is called has to be kept.
    return called


def _binding() -> str | None:
    return next((name for name in BINDINGS if find_spec(name) is not None), None)


def is_installed() -> bool:
    """Return whether there is a binding of llama.cpp's library."""
    return _binding() is not None


def versions() -> dict[str, str]:
    """Return the version of the binding in use, and where it tells it the commit of llama.cpp; {} if none was used."""
    name = _binding()
    if name is None or not library.cache_info().currsize:
        return {}
    binding = import_module(name)
    commit = getattr(binding, "__llama_cpp_commit__", None)
    return {name.replace("_", "-"): str(binding.__version__)} | ({} if commit is None else {"llama.cpp": str(commit)})


@cache
def library() -> Any:
    """Return llama.cpp's library, loaded once in a process.

    Raises:
        CheckpointError: if no binding is installed, or it cannot be loaded.
    """
    if (found := _binding()) is None:
        raise CheckpointError(
            f"GGUF files at their own speed need llama.cpp: {install_line('gguf')}; or put +engine=transformers behind "
            "the file, which is slower and needs several times its memory"
        )
    try:
        return _ByCffi() if found == BINDINGS[0] else _ByCtypes()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"cannot load llama.cpp by {found.replace('_', '-')}: {error}: install it anew, or put "
            "+engine=transformers behind GGUF files, which is slower"
        ) from error
