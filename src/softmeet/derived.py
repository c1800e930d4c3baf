"""What takes long to make and can be made again, kept in a file for the next time, and where such files are."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
# The bytes of a hash.
_HASH = hashlib.sha256().digest_size


def derived(
    folder: Path | None, name: str, make: Callable[[], T], write: Callable[[T], bytes], read: Callable[[bytes], T]
) -> T:
    """Return what is kept under a name; make and keep it if there is nothing, or nothing that can be read.

    A file has the hash of all else in front, so that one that was damaged is made anew.

    Args:
        folder: where; None to keep nothing.
        name: its own.
        make: makes it.
        write, read: turn it into bytes, and back.
    """
    if folder is None:
        return make()
    with suppress(Exception):  # whatever is wrong with what is there
        kept = (folder / name).read_bytes()
        if kept[:_HASH] == hashlib.sha256(kept[_HASH:]).digest():
            return read(kept[_HASH:])
    found, mine = make(), folder / f"{name}.{secrets.token_hex(8)}"
    with suppress(OSError):  # a full disk, or a folder of somebody else's
        try:
            written = write(found)
            mine.write_bytes(hashlib.sha256(written).digest() + written)
            mine.replace(folder / name)
        finally:
            mine.unlink(missing_ok=True)
    return found


def file_of(name: str) -> Path:
    """Return where this machine keeps what is made of a user's members and files, by the name of that.

    It is in ``$SOFTMEET_CACHE`` or, without that, in ``softmeet`` below ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    try:
        home = Path.home()
    except RuntimeError:  # a container's user whom nobody knows
        home = Path("/")
    base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(os.environ.get("SOFTMEET_CACHE") or Path(base) / "softmeet") / name
