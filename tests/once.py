"""What takes long to make and is only read: made once for all processes of a run of the tests."""

from __future__ import annotations

import os

from filelock import FileLock


def once(tmp_path_factory, name, make):
    """The folder that ``make(folder)`` fills, made by the first process that asks for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            make(unfinished)
            unfinished.rename(folder)
    return folder
