"""The names of GGUF files that other programs have left on this machine: ollama, LM Studio, llama.cpp, the Hub's cache.

Such a name is a member's source: ``qwen2.5-coder:0.5b`` is the file that ollama has under it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from softmeet.errors import CheckpointError, cannot_load
from softmeet.members.gguf_file import GgufFile, content_of, read_gguf
from softmeet.members.member import Member
from softmeet.members.registered import is_registered

# What brings files to the places that are looked in.
FETCH = "ollama pull NAME, a download in LM Studio, or hf download ORG/MODEL-GGUF FILE brings one here"
_LAYER = "application/vnd.ollama.image.model"
# What ollama leaves out of a name where it is this.
_REGISTRY, _LIBRARY, _TAG = "registry.ollama.ai", "library", "latest"
# A first part stands for all; files that only project images for another model are no language models.
_LATER, _PROJECTOR = "-of-", "mmproj"


def named_files() -> Iterator[tuple[str, str, Path]]:
    """Yield the program, the name that a member goes by, and the file, of each where these programs keep theirs."""
    home = Path.home()
    yield from _of_ollama(Path(os.environ.get("OLLAMA_MODELS") or home / ".ollama" / "models"))
    folders = [
        ("LM Studio", home / ".lmstudio" / "models"), ("LM Studio", home / ".cache" / "lm-studio" / "models"),
        ("llama.cpp", Path(os.environ.get("LLAMA_CACHE") or home / ".cache" / "llama.cpp")),
        ("Hub", Path(constants.HF_HUB_CACHE)),
    ]  # fmt: skip
    for source, folder in folders:
        yield from ((source, name, path) for name, path in files_in(folder))


def known_names() -> list[str]:
    """Return all names that a member can go by, those of ollama's that end in ``:latest`` without it, too."""
    names = {name for _, name, _ in named_files()}
    return sorted(names | {name.removesuffix(f":{_TAG}") for name in names})


def files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the path of each GGUF file of a language model in a folder, which need not be there."""
    for path in folder.rglob("*.gguf") if folder.is_dir() else ():
        later = _LATER in path.name and "-00001" not in path.name
        if path.is_file() and not later and _PROJECTOR not in path.name:
            yield path.name.removesuffix(".gguf"), path


def located(member: Member) -> Member:
    """Return a member whose source is such a name with the file as its source, and the name as its own; others as is.

    Paths, readers that are registered and hub ids with an organisation go before; of ollama's names ``:latest`` may be
    left out.

    Raises:
        CheckpointError: if there are several files of that name.
    """
    source, on_hub = member.source, member.revision or member.file
    if on_hub or ("/" in source and ":" not in source) or is_registered(member) or Path(source).exists():
        return member
    names = (source, f"{source}:{_TAG}")
    found = {path.resolve(): path for _, name, path in named_files() if name in names}
    if len(found) > 1:
        raise cannot_load(source, f"there are several files of that name, give the path of one: {_joined(found)}")
    return replace(member, source=str(*found.values()), name=member.title) if found else member


def _joined(paths: dict[Path, Path]) -> str:
    return ", ".join(sorted(map(str, paths.values())))


def _of_ollama(folder: Path) -> Iterator[tuple[str, str, Path]]:
    manifests = folder / "manifests"
    for path in manifests.rglob("*") if manifests.is_dir() else ():
        try:
            layers = json.loads(path.read_text(encoding="utf-8"))["layers"] if path.is_file() else []
            digests = [str(one["digest"]) for one in layers if one["mediaType"] == _LAYER]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        *place, tag = path.relative_to(manifests).parts
        for usual in (_REGISTRY, _LIBRARY):
            place = place[1:] if place[:1] == [usual] else place
        for digest in digests:
            blob = folder / "blobs" / digest.replace(":", "-")
            if blob.is_file():
                yield "ollama", f"{'/'.join(place)}:{tag}", blob


@dataclass(frozen=True)
class LocalFile:
    """A GGUF file on this machine.

    Attributes:
        path: the file.
        name: what the program that left it calls the model.
        source: that program.
        said: what the file says; None if it cannot be read.
        why: why it cannot be read; empty if it can.
        tokens: a letter for each tokenizer among the files: those of one letter can be combined over tokens.
    """

    path: Path
    name: str
    source: str
    said: GgufFile | None
    why: str = ""
    tokens: str = ""


def local_files(more: list[Path] | None = None) -> list[LocalFile]:
    """Find GGUF files where ollama, LM Studio, llama.cpp and huggingface_hub keep theirs.

    Args:
        more: further folders, or files.

    Returns:
        the files, by source and name; those with the same tokens have the same letter.

    Raises:
        CheckpointError: if one of ``more`` is not there.
    """
    found, letters = list[LocalFile](), dict[object, str]()
    for source, name, path in sorted({*_named(more or [])}):
        try:
            whole = read_gguf(path)
        except CheckpointError as error:
            found.append(LocalFile(path, name, source, None, str(error)))
            continue
        letter = letters.setdefault(content_of(whole), chr(ord("A") + len(letters) % 26))
        found.append(LocalFile(path, name, source, whole.without_lists(), tokens=letter))
    return found


def _named(more: list[Path]) -> Iterator[tuple[str, str, Path]]:
    """Yield (the program, the model's name, its file) for each."""
    yield from named_files()
    for path in more:
        if not path.exists():
            raise cannot_load(path, "there is no such file or folder: check the path")
        if path.is_dir():
            yield from (("folder", name, file) for name, file in files_in(path))
        else:
            yield "file", path.name.removesuffix(".gguf"), path
