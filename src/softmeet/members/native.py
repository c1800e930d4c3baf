"""Which GGUF files llama.cpp runs, as they are, and which transformers dequantises; and the readers of the former.

A file that names no engine is run by llama.cpp where that is installed, unless its line asks for what only transformers
has: an adapter, a dtype, a quantisation or a device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from huggingface_hub import hf_hub_download

from softmeet.errors import InvalidInputError, cannot_load
from softmeet.extras import install_line
from softmeet.members import llama_library, names
from softmeet.members.gguf_file import begins_as_gguf, fingerprint
from softmeet.members.member import Member
from softmeet.members.registered import GROUP, is_registered, registered_reader

TRANSFORMERS, LLAMA, VLLM = "transformers", "llama.cpp", "vllm"
# The name of the readers that llama.cpp runs, among those that packages have.
_NAME = "gguf"
# What llama.cpp alone has for a member, and transformers alone.
_NUMBERS, _MOST = ("context", "gpu_layers"), (1 << 31) - 1
_OWN, _LAYOUTS = (*_NUMBERS, "repack"), {None: None, "on": True, "off": False}
_OTHERS = ("adapter", "dtype", "quantization", "device")
_log = logging.getLogger("softmeet")
_made: WeakValueDictionary[Any, Any] = WeakValueDictionary()


def is_gguf(member: Member) -> bool:
    """Return whether a member is a GGUF file.

    Example:
        >>> is_gguf(Member("a.gguf")), is_gguf(Member("org/model", file="a.gguf")), is_gguf(Member("org/model"))
        (True, True, False)
    """
    # A folder may be called as a file is.
    named = member.file or ("" if Path(member.source).is_dir() else member.source)
    return not is_registered(member) and (named.endswith(".gguf") or begins_as_gguf(Path(member.source)))


def is_native(member: Member) -> bool:
    """Return whether llama.cpp runs a member, by its line alone."""
    return member.engine == LLAMA


def has_reader(member: Member) -> bool:
    """Return whether a member is told by a reader that is no model of transformers."""
    return is_registered(member) or is_native(member)


def with_engine(member: Member, *, changed: bool = False) -> Member:
    """Return a member that names its engine, if it is a GGUF file.

    Args:
        member: the member.
        changed: whether it is to be loaded in a dtype, or on a device, that its line does not name.

    Raises:
        InvalidInputError: if the engine is unknown, or llama.cpp is named for something else than a plain GGUF file.
        CheckpointError: if llama.cpp or vLLM is named, and not installed.
    """
    if member.engine == VLLM:
        return _by_vllm(member)
    if is_registered(member):
        return member
    others = [key for key in _OTHERS if getattr(member, key) is not None]
    _require_sensible(member, others)
    if member.engine == LLAMA:
        llama_library.library()
    if not is_gguf(member) or member.engine is not None:
        return member
    if others or changed:
        return replace(member, engine=TRANSFORMERS)
    if not llama_library.is_installed():
        if find_spec("gguf"):  # else it is refused
            _say(
                f"{member.title} is dequantised, which takes several times its memory and time: to run it as it is, "
                f"{install_line('gguf')}"
            )
        return replace(member, engine=TRANSFORMERS)
    return replace(member, engine=LLAMA)


def _by_vllm(member: Member) -> Member:
    found = replace(member, source=f"{VLLM}:{member.source}", engine=None)
    if not is_registered(found):
        raise cannot_load(member.title, "vLLM does not run here: install softmeet-vllm into an environment that has it")
    return found


def _require_sensible(member: Member, others: Sequence[str]) -> None:
    """Check that an engine, and what llama.cpp alone has, stand behind a member that has them.

    Args:
        member: the member.
        others: what it asks for that transformers alone has.

    Raises:
        InvalidInputError: if they do not.
    """
    if member.engine not in (None, TRANSFORMERS, LLAMA):
        got = f"got {member.engine!r}"
        known = f"{TRANSFORMERS}, {LLAMA} or {VLLM}"
        raise InvalidInputError(f"expected the engine {known} of {member.title}, {got}")
    if member.engine == LLAMA and (others or not is_gguf(member)):
        got = f"+{others[0]}" if others else f"{member.source}, which is none"
        raise InvalidInputError(
            f"expected a GGUF file and nothing that transformers alone has beside +engine={LLAMA}, got {got}"
        )
    own = [key for key in _OWN if getattr(member, key) is not None]
    if own and (member.engine == TRANSFORMERS or others or not is_gguf(member)):
        raise InvalidInputError(
            f"expected +{own[0]} of a GGUF file that llama.cpp runs alone, got it for {member.title}: leave it out"
        )


@cache
def _say(text: str) -> None:
    """Log a warning, once in a process."""
    _log.warning("%s", text)


def path_of(member: Member) -> Path:
    """Return the GGUF file of a member; of a hub id, it is fetched, unless it is in the local cache.

    Raises:
        CheckpointError: if there is no such file.
    """
    where = names.find(member)
    place, file = str(where["pretrained_model_name_or_path"]), str(where["gguf_file"])
    if Path(place).is_dir():
        return Path(place, where.get("subfolder", ""), file)
    return Path(
        hf_hub_download(
            place,
            file,
            subfolder=where.get("subfolder"),
            revision=where.get("revision"),
            local_files_only=where.get("local_files_only", False),
        )
    )


def with_hash(member: Member) -> Member:
    """Return a member with the hash of its file, if llama.cpp runs it; any other as it is."""
    return replace(member, hash=fingerprint(path_of(member))) if is_native(member) else member


def identity_of(member: Member) -> str:
    """Return a text that is the same for the same reader: of a GGUF file its contents, not its path, and how it is run.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    said = str(member.base)
    return f"{fingerprint(path_of(member))}{said.removeprefix(member.checkpoint)}" if is_native(member) else said


def require_hash(member: Member) -> None:
    """Check that a member's file is the one whose hash is behind it, if one is.

    Raises:
        InvalidInputError: if it is no GGUF file.
        CheckpointError: if it is another file, or there is none.
    """
    if member.hash is None:
        return
    if not is_gguf(member):
        raise InvalidInputError(f"expected +hash of a GGUF file, got it for {member.title}: leave it out")
    if (found := fingerprint(path_of(member))) != member.hash:
        raise cannot_load(
            member.checkpoint,
            f"it is another file than the one that was saved, with the hash {found} in place of {member.hash}: fetch "
            "that one, or take +hash out of the member's line",
        )


def reader_of(member: Member) -> Any:
    """Return the reader of a member that :func:`has_reader`; the same while it is in use.

    Raises:
        CheckpointError: if its file cannot be read, or its factory fails.
        InvalidInputError: if a number behind it is none.
    """
    if is_registered(member):
        return registered_reader(member)
    path = path_of(member)
    state = path.stat()
    own = member.base, path.resolve(), state.st_mtime_ns, state.st_size
    if (known := _made.get(own)) is None:
        (entry,) = entry_points(group=GROUP, name=_NAME)
        options: dict[str, Any] = {key: count for key in _NUMBERS if (count := number(member, key)) is not None}
        if (repack := _repack(member)) is not None:
            options["repack"] = repack
        known = _made[own] = entry.load()(path, member.title, **options)
    return known


def number(member: Member, key: str) -> int | None:
    """Return the number that stands behind a member under a key, ``context`` or ``gpu_layers``; None if none does.

    Raises:
        InvalidInputError: if what stands there is no number above 0, or, of layers, from 0 on; or if it is too large.
    """
    given = getattr(member, key)
    if given is None:
        return None
    few = given.isdecimal() and len(given) <= len(str(_MOST))
    if not (few and (key != "gpu_layers") <= int(given) <= _MOST):
        raise InvalidInputError(f"expected a number up to {_MOST:,} behind {member.source}, got +{key}={given}")
    return int(given)


def _repack(member: Member) -> bool | None:
    """Return whether a member's weights are copied into llama.cpp's own layout, as its line says; None if it does not.

    Raises:
        InvalidInputError: if it says anything else than on or off.
    """
    if member.repack not in _LAYOUTS:
        raise InvalidInputError(f"expected +repack=on or +repack=off behind {member.source}, got {member.repack!r}")
    return _LAYOUTS[member.repack]


def require_reader(member: Member) -> None:
    """Check what can be wrong with a member that :func:`has_reader`, before others are loaded.

    Raises:
        CheckpointError: if its file cannot be read; a registered reader is made.
    """
    if is_registered(member):
        registered_reader(member)
    else:
        path_of(member)
        _repack(member)
        for key in _NUMBERS:
            number(member, key)
