"""A quick start: most of the time from the start of a process to its first token is spent on importing libraries."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

_READ = "create_import_structure_from_path"
_AVAILABLE = ("is_scipy_available", "is_torchao_available")
_TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")

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

    transformers reads the folder of all its models twice, since it remembers what it has read under two names of that
    folder: here under one. It imports scipy.optimize and torchao, where these are installed, for losses of object
    detection and for saving quantised models: here it does not. All is as before at the end; a version of transformers
    without such functions is left alone. Packages for quantisation say nothing of kernels for other machines.
    """
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers import utils
    from transformers.utils import import_utils

    read = getattr(import_utils, _READ, None)
    once = nullcontext() if read is None else patch.object(import_utils, _READ, lambda path: read(_folder(Path(path))))
    known = {name: getattr(utils, name, None) for name in _AVAILABLE}
    without: dict[str, Any] = dict.fromkeys(_AVAILABLE, _no)
    with once, patch.multiple(utils, create=True, **without):
        yield
    # Modules have kept what they found there.
    for module in [module for name, module in sys.modules.items() if name.startswith("transformers.")]:
        for name in _AVAILABLE:
            if vars(module).get(name) is _no:
                setattr(module, name, known[name])


def _no() -> bool:
    return False


def _folder(path: Path) -> Path:
    """Return a folder itself, and of a file the folder that it is in."""
    return path.parent if path.is_file() else path
