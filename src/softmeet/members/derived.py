"""What loading a GGUF file derives from it, kept for the next time: seconds of work, of which some megabytes come.

It is in a folder of Hugging Face's for assets (``HF_ASSETS_CACHE``), which can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import transformers
from huggingface_hub import cached_assets_path

from softmeet.members.gguf_file import fingerprint

T = TypeVar("T")
# To be raised when other things are derived from the same files.
_FORM = 2
# From smaller files everything is derived at once.
_SMALL = 1 << 24
# The bytes of a hash.
_HASH = hashlib.sha256().digest_size


def folder_for(path: Path) -> Path | None:
    """Return the folder for what is derived from a file; None if that is small, or no folder can be made.

    It is another one when the file, transformers or tokenizers has changed.
    """
    try:
        state = path.stat()
        if state.st_size < _SMALL:
            return None
        said = _FORM, fingerprint(path), state.st_mtime_ns, transformers.__version__, tokenizers.__version__
        return cached_assets_path("softmeet", "gguf", hashlib.sha256(repr(said).encode()).hexdigest()[:16])
    except (OSError, ValueError):
        return None


def folder_of(tokenizer: Any) -> Path | None:
    """Return the folder for what is derived from the GGUF file that a tokenizer was read from; None of any other."""
    _, _, folder = vars(tokenizer).get("_softmeet_file", (None, None, None))
    return folder  # type: ignore[no-any-return]


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
