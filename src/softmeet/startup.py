"""A quick start: most of the time from the start of a process to its first token is spent on importing libraries."""

from __future__ import annotations

import gc
import hashlib
import logging
import marshal
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from softmeet.derived import derived

_READ = "create_import_structure_from_path"
_AVAILABLE = ("is_scipy_available", "is_torchao_available")
_DISTRIBUTED = "is_torch_distributed_available"
_TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")
# Modules of transformers' that decorate functions for torch's compiler, and what they take of it.
_DECORATED = ("transformers.modeling_utils", "transformers.generation.utils")
_COMPILER, _MASKS, _INDEX = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op", "TransformGetItemToIndex"
_DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")

_AUTO_CLASSES = "transformers.models.auto.modeling_auto"

# How often a thread of GNU's OpenMP looks whether the others have come before it sleeps, unless the environment says,
# even where there are more threads than cores, as where texts are written in a thread of their own: there it looks a
# hundred times by default, which slows llama.cpp down.
_SPINS = {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "active"}


def few_spins() -> None:
    """Have threads that wait for each other give way soon, so that a busy machine does not bring llama.cpp to a halt.

    GNU's OpenMP reads this when it is loaded, by torch or by llama.cpp: imported after torch, softmeet changes nothing.
    What the environment says stays. On other systems than Linux OpenMP is another one, and nothing is set.
    """
    if sys.platform == "linux" and not _SPINS.keys() & os.environ.keys():
        os.environ.update(_SPINS)


def register_auto_classes() -> None:
    """Have ``AutoModelForCausalLM.from_pretrained`` load ensembles, without importing transformers, or torch, for it.

    The Auto classes hear of ensembles when some other code has imported them, or at once if it has already.
    """
    after_import(_AUTO_CLASSES, lambda _: import_module("softmeet.hf"))


def after_import(name: str, act: Callable[[ModuleType], object]) -> None:
    """Call a function with a module, at once if it is imported already, else right after it has been, once."""
    if (module := sys.modules.get(name)) is not None:
        act(module)
    else:
        sys.meta_path.insert(0, _AfterImport(name, act))


class _AfterImport(MetaPathFinder):
    def __init__(self, name: str, act: Callable[[ModuleType], object]) -> None:
        self._name, self._act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                self._act(module)

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


@contextmanager
def paused_collection() -> Iterator[None]:
    """Enter a context without garbage collection, for imports, which make a million objects that are never freed.

    At its end, even after an error, collection is enabled if it was before.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def uncollected() -> Iterator[None]:
    """Enter a context as :func:`paused_collection`, in a process of softmeet's own.

    At its end, even after an error, all objects alive are exempted from later collections (``gc.freeze``), and
    collection is enabled, whether or not it was before.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def quick_imports() -> Iterator[None]:
    """Enter a context in which transformers' modules are imported without work that no command needs.

    transformers reads the folder of all its models, two thousand files, and does so twice, since it remembers what it
    has read under two names of that folder: here what they say is kept for the next time, in a folder of Hugging Face's
    for assets (``HF_ASSETS_CACHE``). It imports scipy.optimize and torchao, where these are installed, for losses of
    object detection and for saving quantised models, and torch's compiler and distributed tensors, for kernels of other
    machines: here it does not. What is imported meanwhile knows of no distributed tensors; all else is as before at the
    end. A version of transformers without such functions is left alone. Packages for quantisation say nothing of
    kernels for other machines.
    """
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    with _known_structure():
        from transformers import utils

        known = {name: getattr(utils, name, None) for name in _AVAILABLE}
        without: dict[str, Any] = dict.fromkeys((*_AVAILABLE, _DISTRIBUTED), _no)
        with (
            patch.multiple(utils, create=True, **without),
            patch.object(utils.import_utils, _DISTRIBUTED, _no, create=True),
        ):
            # What cannot be imported so is imported as ever once it is needed.
            with suppress(Exception), _without_compiler():
                for name in _DECORATED:
                    import_module(name)
            yield
    # Modules have kept what they found there.
    for module in [module for name, module in sys.modules.items() if name.startswith("transformers.")]:
        for name in _AVAILABLE:
            if vars(module).get(name) is _no:
                setattr(module, name, known[name])


def _no() -> bool:
    return False


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Enter a context in which the decorators of torch's compiler do nothing, and it is not imported for them."""
    import torch.compiler

    if _COMPILER in sys.modules:
        yield
        return
    compiler, masks = ModuleType(_COMPILER), ModuleType(_MASKS)
    undecorated: dict[str, Any] = dict.fromkeys(_DECORATORS, _undecorated)
    vars(compiler).update(undecorated, __path__=[])
    vars(masks)[_INDEX] = lambda: getattr(import_module(_MASKS), _INDEX)()
    sys.modules.update({_COMPILER: compiler, _MASKS: masks})
    vars(torch)["_dynamo"] = compiler
    try:
        with patch.multiple(torch.compiler, **undecorated):
            yield
    finally:
        del vars(torch)["_dynamo"], sys.modules[_COMPILER], sys.modules[_MASKS]


def _undecorated(function: Any = None, **options: Any) -> Any:
    """Return a function as it is, or what does so."""
    return _undecorated if function is None else function


@contextmanager
def _known_structure() -> Iterator[None]:
    """Enter a context in which transformers finds what its models' files define in a file of its own."""
    with ExitStack() as patched:

        def remember(module: ModuleType) -> None:
            if (read := getattr(module, _READ, None)) is not None:
                patched.enter_context(patch.object(module, _READ, partial(_structure, read)))

        after_import("transformers.utils.import_utils", remember)
        yield


def _structure(read: Callable[[Path], Any], path: str | Path) -> Any:
    """Return what a folder of transformers' defines, and of a file what the folder that it is in does."""
    folder = Path(path)
    folder = folder.parent if folder.is_file() else folder
    # Files of a checkout are edited, those of an installed version are not.
    if folder.name != "models" or not {"site-packages", "dist-packages"}.intersection(folder.parts):
        return read(folder)
    from huggingface_hub import cached_assets_path

    said = sys.modules["transformers"].__version__, str(folder), folder.stat().st_mtime_ns, sys.version
    try:
        assets = cached_assets_path("softmeet", "transformers", hashlib.sha256(repr(said).encode()).hexdigest()[:16])
    except (OSError, ValueError):
        assets = None
    return derived(assets, "models", lambda: read(folder), marshal.dumps, marshal.loads)
