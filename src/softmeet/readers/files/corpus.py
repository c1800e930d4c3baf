"""Which files are read of the paths that a member of files names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Texts:
    """The files of some paths.

    Attributes:
        paths: what was asked for, absolute.
        include: a glob that files' names or paths have to match; None for all.
        files: the files, sorted, each once.
        left_out: how many were not taken, by the reason.
    """

    paths: tuple[str, ...]
    include: str | None
    files: tuple[Path, ...]
    left_out: dict[str, int] = field(default_factory=dict)


def find_texts(paths: Sequence[str], include: str | None = None) -> Texts:
    """Find the files of some paths."""
    raise NotImplementedError
