"""A quick start: most of the time from the shell to the first token is spent on importing libraries."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

_READ = "create_import_structure_from_path"
_TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")


@contextmanager
def uncollected() -> Iterator[None]:
    """Enter a context without garbage collection, for imports, which make a million objects that are never freed.

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
    folder: here under one. It imports scipy.optimize, where that is installed, for losses of object detection: here it
    does not. Both are as before at the end; a version of transformers without such functions is left alone. Packages
    that transformers imports where they are installed say nothing of kernels that they have for other machines.
    """
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers import utils
    from transformers.utils import import_utils

    read = getattr(import_utils, _READ, None)
    once = nullcontext() if read is None else patch.object(import_utils, _READ, lambda path: read(_folder(Path(path))))
    with once, patch.object(utils, "is_scipy_available", lambda: False, create=True), _without_warnings():
        yield


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Enter a context in which nothing below an error is logged."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _folder(path: Path) -> Path:
    """Return a folder itself, and of a file the folder that it is in."""
    return path.parent if path.is_file() else path
