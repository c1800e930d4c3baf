"""Write files that appear under their names when they are whole, and folders that say what they hold."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from softmeet.errors import InvalidInputError, TraceError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write`` with a file object, and let its file appear as ``path`` once it is on the disk.

    Raises:
        TraceError: the disk is full; nothing is left behind, and what was there before stays.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with _room_for(path):
            with unfinished.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, all of it or nothing (:func:`write_atomically`)."""
    write_atomically(path, lambda file: file.write(text.encode()))


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Raise a TraceError that says what to do where the disk is full."""
    try:
        yield
    except Exception as error:
        # Tokenizers say it in words alone.
        if getattr(error, "errno", None) in _NO_ROOM or os.strerror(errno.ENOSPC) in str(error):
            raise TraceError(
                f"no room on the disk for {path}: what was written before stays and is whole; make room and run the "
                "same command again"
            ) from error
        raise


@contextmanager
def replace_together(folder: Path) -> Iterator[Path]:
    """Replace files of a folder together, once the context ends, by those written in the new folder that it gives.

    Raises:
        TraceError: the disk is full; what was there before stays.
    """
    folder = folder.resolve()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with _room_for(folder):
            unfinished.mkdir(parents=True)
            yield unfinished
            folder.mkdir(exist_ok=True)
            for path in sorted(unfinished.iterdir()):
                path.replace(folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def as_json(content: Any) -> str:
    """Return standard JSON of some content: null for infinity and NaN, which strict parsers refuse.

    >>> print(as_json({"loss": float("inf")}))
    {
      "loss": null
    }
    """
    return json.dumps(to_jsonable_python(content, inf_nan_mode="null"), indent=2, allow_nan=False)


def write_json(path: Path, content: Any) -> None:
    """Write what :func:`as_json` returns; a file that was there stays until the new one is whole.

    Raises:
        TraceError: the disk is full.
    """
    text = as_json(content) + "\n"
    if path.exists() and not path.is_file():  # a pipe or a device is not to be replaced
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path, text)


def claim(folder: Path, what: str, settings: dict[str, Any]) -> None:
    """Make a folder whose ``settings.json`` says what its contents depend on, or check that a folder there agrees.

    Args:
        folder: to make.
        what: the folder holds, for the message.
        settings: as JSON has them.

    Raises:
        InvalidInputError: the folder has other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, now = folder / "settings.json", json.loads(json.dumps(settings))
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    if differ := sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key)):
        shown = ", ".join(f"{key}: {_short(there.get(key))} there, {_short(now.get(key))} here" for key in differ)
        raise InvalidInputError(f"{folder} holds {what} with other settings ({shown}): choose another folder")


def require_ensemble_folder(folder: Path) -> None:
    """Check that saving an ensemble in a folder overwrites an older ensemble at most.

    Raises:
        InvalidInputError: the folder holds other files, such as a member's checkpoint.
    """
    if not folder.is_dir() or not any(path.is_file() for path in folder.iterdir()):
        return
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("model_type") != "softmeet":
        raise InvalidInputError(
            f"expected an empty folder or an ensemble that softmeet saved, but {folder} holds other files, some of "
            "which would be overwritten: name another folder"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
