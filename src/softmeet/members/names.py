"""Finding the checkpoint that a member's name stands for, before anything of it is loaded.

A name that stands for nothing is answered at once, or after one short question to the Hub, with the nearest known name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from softmeet.errors import CheckpointError, cannot_load, nearest
from softmeet.members import zoo
from softmeet.members.files import parted
from softmeet.members.gguf_file import begins_as_gguf
from softmeet.members.local_names import FETCH, known_names
from softmeet.members.member import Member
from softmeet.members.registered import is_registered, reader_names

# For so long after a question that got no answer, members that are in the local cache are taken from there unasked.
_PAUSE = 60.0
# More characters than this are no name of a file.
_LONGEST = 255
# What an adapter consists of.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_unanswered = -math.inf
# Where models are that need no Hub.
_LISTED = f" (softmeet models lists the files that are here; {FETCH})"


def find(name: str | Member) -> dict[str, Any]:
    """Return the arguments by which transformers finds a member's checkpoint, once it is known to be there.

    Of a hub id, the Hub is asked for one file, once in a process and without repetition; if it does not have the file
    or does not answer, a copy in the local cache is used (``local_files_only``).

    Args:
        name: a member or its line of text, but not a family's.

    Raises:
        CheckpointError: if there is no such folder, file or bundled member; or the Hub does not have the checkpoint, or
            does not show it, or cannot be reached, and it is not in the local cache. The message names the nearest
            bundled name or neighbouring folder.

    Example:
        >>> find("wide/gpt2")["pretrained_model_name_or_path"][-9:]
        'wide/gpt2'
    """
    member = Member.of(name)
    if is_registered(member):
        raise CheckpointError(f"expected a checkpoint of transformers, but {member.source} is a reader without one")
    place, file, source = zoo.locate(member.source), member.file, member.checkpoint
    path, within = Path(place), {} if member.subfolder is None else {"subfolder": member.subfolder}
    if not path.is_dir() and (path.suffix == ".gguf" or begins_as_gguf(path)):
        if file is not None:
            raise cannot_load(source, f"expected one GGUF file, got this one and {file}")
        path, place, file = path.parent, str(path.parent), path.name
    found: dict[str, Any] = {"pretrained_model_name_or_path": place, **within}
    found |= {} if file is None else {"gguf_file": file}
    inside = path / (member.subfolder or "")
    if path.is_dir() and inside.is_dir() and (file is None or (inside / file).is_file()):
        return found
    if path.exists() and not path.is_dir():
        raise cannot_load(source, "it is a file: expected a .gguf file, or the folder of a saved model")
    if path.is_dir() or place.startswith(("/", ".", "~")) or path.is_absolute() or place.count("/") > 1:
        kind = "file" if file else "folder"
        missing = str(inside / (file or "")) if path.is_dir() else source
        hint = _hint(missing).rstrip() or f"check the path{_LISTED if file else ''}"
        raise cannot_load(source, f"there is no such {kind}: {hint}")
    if (why := _no_hub_id(place)) is not None:
        raise cannot_load(source, why)
    found |= {} if member.revision is None else {"revision": member.revision}
    wanted = "/".join(filter(None, (member.subfolder, file or "config.json")))
    return found | _on_hub(source, place, member.revision, wanted)


def _no_hub_id(place: str) -> str | None:
    """Return why no model of the Hub can be called so; None if one can."""
    if ":" in place:
        name = place.partition(":")[0]
        return (
            f"{nearest(place, known_names()) or nearest(name, reader_names())}no model of that name is on this machine"
            f"{_LISTED}, and no package here has readers called {name!r} (softmeet.register_reader)"
        )
    if get_close_matches(place, zoo.FAMILIES, cutoff=0.75):
        return f"{nearest(place, zoo.FAMILIES)}there is no folder of that name"
    return None


def require_there(lines: Iterable[str]) -> None:
    """Check that members are there, families' among them, which takes less time than to load what loads them.

    Raises:
        CheckpointError: as of :func:`find`.
        InvalidInputError: if a line of text is none of a member.
    """
    models, _ = parted(list(lines))
    for line in [models] if isinstance(models, str) else models:
        for member in map(Member.of, zoo.expand(line)):
            if not is_registered(member):
                find(member)


def is_here(name: str) -> bool:
    """Return whether a text is the name or the path of a model on this machine; a family's, an English word, is not.

    Example:
        >>> is_here("wide/gpt2"), is_here("wide"), is_here("And the king said")
        (True, False, False)
    """
    if not name or any(sign.isspace() or sign == "\0" for sign in name) or len(name) > _LONGEST:
        return False
    path = Path(name)
    is_file = path.is_file() and (path.suffix == ".gguf" or begins_as_gguf(path))
    return is_file or (path / "config.json").is_file() or name in {*zoo.known(), *known_names()} - set(zoo.FAMILIES)


def find_adapter(name: str) -> Path:
    """Return the folder of an adapter of peft's; of a hub id, its two files are downloaded, as they are small.

    Args:
        name: a folder, or a hub id, with ``@`` before a revision.

    Raises:
        CheckpointError: if there is no such folder or repository, or it lacks adapter_config.json, or weights as
            safetensors.
    """
    folder, said = Path(name).expanduser(), f"the adapter {name}"
    if folder.is_dir():
        absent = [file for file in _ADAPTER if not (folder / file).is_file()]
        if absent:
            raise cannot_load(said, f"it has no {absent[0]}: expected what peft's save_pretrained writes")
        return folder
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise cannot_load(said, f"there is no such folder: {_hint(name) or 'check the path'}")
    repository, _, revision = name.partition("@")
    for file in _ADAPTER:
        local = bool(_on_hub(said, repository, revision or None, file))
        there = huggingface_hub.hf_hub_download(repository, file, revision=revision or None, local_files_only=local)
        folder = Path(there).parent
    return folder


def _hint(name: str) -> str:
    """Return the question for what is most like ``name``: a folder beside it, a bundled name or one in the cache."""
    if "/" not in name and (said := nearest(name, known_names())):
        return said
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
        cached = isinstance(huggingface_hub.try_to_load_from_cache(repository, file, revision=revision), str)
    except HFValidationError:
        expected = "expected a hub id (org/model), a folder, or a bundled name such as wide"
        raise cannot_load(name, _hint(name) + expected) from None
    except ValueError:
        raise cannot_load(name, f"expected a file of the repository {repository}, got {file!r}") from None
    if cached and time.monotonic() - _unanswered < _PAUSE:
        return {"local_files_only": True}
    try:
        _ask(repository, revision, file)
    except Exception as error:  # the network's errors are of many classes
        if not isinstance(error, HfHubHTTPError):
            _unanswered = time.monotonic()
        if cached:
            return {"local_files_only": True}
        raise cannot_load(name, _why(error, name, repository, revision, file)) from error
    return {}


@cache
def _ask(repository: str, revision: str | None, file: str) -> None:
    """Return if the Hub has a file; raise an error of huggingface_hub or of the network, which is not kept, if not."""
    huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, file, revision=revision))


def _why(error: Exception, name: str, repository: str, revision: str | None, file: str) -> str:
    listed = "" if "/" in repository else _LISTED
    if isinstance(error, GatedRepoError):
        return (
            f"it is gated: ask for access at https://huggingface.co/{repository}, then log in with `hf auth login`, or "
            "set HF_TOKEN"
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError) or (status == 404 and type(error) is HfHubHTTPError):
        return (
            f"{_hint(name)}it is neither here nor a public repository of the Hub: check the name, or, if it is "
            f"private, log in with `hf auth login`, or set HF_TOKEN{listed}"
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
    return f"{_hint(name)}it is neither here nor in the local cache of the Hub, and the Hub {found}{listed}"
