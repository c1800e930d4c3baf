"""GGUF files that other programs have left on this machine: ollama, LM Studio, llama.cpp and the Hub's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from softmeet.errors import CheckpointError, cannot_load
from softmeet.members.gguf_file import GgufFile, read_gguf
from softmeet.members.gguf_tokenizer import content_of

_LAYER = "application/vnd.ollama.image.model"
# A first part stands for all; files that only project images for another model are no language models.
_LATER, _PROJECTOR = "-of-", "mmproj"


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
    home = Path.home()
    yield from _of_ollama(Path(os.environ.get("OLLAMA_MODELS") or home / ".ollama" / "models"))
    folders = [
        ("LM Studio", home / ".lmstudio" / "models"), ("LM Studio", home / ".cache" / "lm-studio" / "models"),
        ("llama.cpp", Path(os.environ.get("LLAMA_CACHE") or home / ".cache" / "llama.cpp")),
        ("Hub", Path(constants.HF_HUB_CACHE)),
        *(("folder", one) for one in more if one.is_dir()),
    ]  # fmt: skip
    for source, folder in folders:
        for path in folder.rglob("*.gguf") if folder.is_dir() else ():
            later = _LATER in path.name and "-00001" not in path.name
            if path.is_file() and not later and _PROJECTOR not in path.name:
                yield source, path.name.removesuffix(".gguf"), path
    for path in more:
        if not path.exists():
            raise cannot_load(path, "there is no such file or folder: check the path")
        if not path.is_dir():
            yield "file", path.name.removesuffix(".gguf"), path


def _of_ollama(folder: Path) -> Iterator[tuple[str, str, Path]]:
    manifests = folder / "manifests"
    for path in manifests.rglob("*") if manifests.is_dir() else ():
        try:
            layers = json.loads(path.read_text(encoding="utf-8"))["layers"] if path.is_file() else []
            digests = [str(one["digest"]) for one in layers if one["mediaType"] == _LAYER]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        for digest in digests:
            blob = folder / "blobs" / digest.replace(":", "-")
            if blob.is_file():
                yield "ollama", f"{path.parent.name}:{path.name}", blob
