"""GGUF files that other programs have left on this machine: ollama, LM Studio, llama.cpp and the Hub's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from softmeet.errors import CheckpointError, cannot_load
from softmeet.members.gguf_file import GgufFile, read_gguf
from softmeet.members.gguf_tokenizer import content_of
from softmeet.members.local_names import files_in, named_files


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
