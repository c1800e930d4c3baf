"""Finding the checkpoint that a member's name stands for, before anything of it is loaded.

A name that stands for nothing is answered at once, or after one short question to the Hub, with the nearest known name.
"""

from __future__ import annotations

import math
import time
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from softmeet.errors import CheckpointError, nearest
from softmeet.members import zoo

# For so long after a question that got no answer, members that are in the local cache are taken from there unasked.
_PAUSE = 60.0
_unanswered = -math.inf


def find(name: str) -> dict[str, Any]:
    """Return the arguments by which transformers finds a member's checkpoint, once it is known to be there.

    Of a hub id, the Hub is asked for one file, once in a process and without repetition; if it does not have the file
    or does not answer, a copy in the local cache is used (``local_files_only``).

    Args:
        name: a hub id (``org/model`` or ``org/model@revision``), a folder, a ``.gguf`` file, or a bundled name
            (``wide/gpt2``), but not a family's.

    Raises:
        CheckpointError: if there is no such folder, file or bundled member; or the Hub does not have the checkpoint, or
            does not show it, or cannot be reached, and it is not in the local cache. The message names the nearest
            bundled name or neighbouring folder.

    Example:
        >>> find("wide/gpt2")["pretrained_model_name_or_path"][-9:]
        'wide/gpt2'
    """
    place = zoo.locate(name)
    path = Path(place)
    whole, gguf = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    if path.is_dir() or (gguf and path.is_file()):
        return {"pretrained_model_name_or_path": str(whole) if gguf else place, **gguf}
    if path.is_file():
        raise CheckpointError(
            f"cannot load {name}: it is a file: expected a .gguf file, or the folder of a saved model"
        )
    repository, _, revision = str(whole).partition("@")
    kind = "file" if gguf else "folder"
    if place.startswith(("/", ".", "~")) or path.is_absolute() or repository.count("/") > 1 or whole.is_dir():
        raise CheckpointError(
            f"cannot load {name}: there is no such {kind}: {_hint(name) or 'check the path'}".rstrip()
        )
    if get_close_matches(place, zoo.FAMILIES, cutoff=0.75):  # no model of the Hub is called so, and none can be
        raise CheckpointError(f"cannot load {name}: {nearest(place, zoo.FAMILIES)}there is no folder of that name")
    found = {"pretrained_model_name_or_path": repository, **gguf} | ({"revision": revision} if revision else {})
    return found | _on_hub(name, repository, revision or None, path.name if gguf else "config.json")


def _hint(name: str) -> str:
    """Return the question for what is most like ``name``: a folder beside it, a bundled name or one in the cache."""
    path = Path(name)
    near = get_close_matches(path.name, sorted(p.name for p in path.parent.glob("*")), n=1)
    cached = [
        p.name.removeprefix("models--").replace("--", "/") for p in Path(constants.HF_HUB_CACHE).glob("models--*")
    ]
    return f"did you mean {path.parent / near[0]}? " if near else nearest(name, [*zoo.known(), *cached])


def _on_hub(name: str, repository: str, revision: str | None, file: str) -> dict[str, bool]:
    """Ask the Hub for a file of a repository; return what tells transformers to read the local cache alone, if it must.

    Raises:
        CheckpointError: if the Hub does not give the file, and it is not in the cache.
    """
    global _unanswered
    try:
        cached = isinstance(try_to_load_from_cache(repository, file, revision=revision), str)
    except HFValidationError:
        raise CheckpointError(
            f"cannot load {name}: {_hint(name)}expected a hub id (org/model), a folder, or a bundled name such as wide"
        ) from None
    if cached and time.monotonic() - _unanswered < _PAUSE:
        return {"local_files_only": True}
    try:
        _ask(repository, revision, file)
    except Exception as error:  # the network's errors are of many classes
        if not isinstance(error, HfHubHTTPError):
            _unanswered = time.monotonic()
        if cached:
            return {"local_files_only": True}
        raise CheckpointError(f"cannot load {name}: {_why(error, name, repository, revision, file)}") from error
    return {}


@cache
def _ask(repository: str, revision: str | None, file: str) -> None:
    """Return if the Hub has a file; raise an error of huggingface_hub or of the network, which is not kept, if not."""
    get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))


def _why(error: Exception, name: str, repository: str, revision: str | None, file: str) -> str:
    if isinstance(error, GatedRepoError):
        return (
            f"it is gated: ask for access at https://huggingface.co/{repository}, then log in with `hf auth login`, or "
            "set HF_TOKEN"
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError) or (status == 404 and type(error) is HfHubHTTPError):
        return (
            f"{_hint(name)}it is neither here nor a public repository of the Hub: check the name, or, if it is "
            "private, log in with `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub has {repository}, but no revision {revision} of it: check what follows the @"
    if isinstance(error, EntryNotFoundError):
        return f"the Hub has {repository}, but no {file} in it: expected a saved transformers model"
    if status in (401, 403):
        return f"the Hub refuses it ({status}): log in with `hf auth login`, or set HF_TOKEN, as one who may read it"
    if status is not None:
        return f"the Hub answered with the status {status}: try again later"
    if isinstance(error, OfflineModeIsEnabled):
        found = "is not asked, as HF_HUB_OFFLINE is set: check the name, or unset HF_HUB_OFFLINE"
    else:
        found = "cannot be reached: check the name and the network"
    return f"{_hint(name)}it is neither here nor in the local cache of the Hub, and the Hub {found}"
