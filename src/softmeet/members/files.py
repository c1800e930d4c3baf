"""``Files``: the user's own files beside the members of an ensemble, in one small object and in one line of text.

The line is ``files:PATH[+path=PATH]…[+include=GLOB][+weight=W][+relevance=R][+name=NAME]``; a plus in a path is ``++``.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from softmeet.errors import CheckpointError, InvalidInputError
from softmeet.members.member import Member, joined, split
from softmeet.members.registered import claims

_KIND = "files:"
_KEYS = ("path", "include", "weight", "relevance", "name")


@dataclass(frozen=True, init=False)
class Files:
    """The user's own files, which claim a part of what an ensemble's rule answers where a text stands in them.

    Args:
        paths: folders, files or globs, at least one; ``~`` is the home folder.
        include: a glob that files' names or paths have to match; None for all.
        weight: how much the files count at every place where they match, in place of what goes by the match; from 0
            to 1.
        relevance: what the weight is multiplied with, in place of what the prompt has shown; 0 or more.
        name: what they are called where that is shown; None for the last part of the first path.

    Raises:
        InvalidInputError: if no path is given, or a number is out of its range.

    Example:
        >>> files = Files("src", include="*.py")
        >>> str(files), Files.parse(str(files)) == files
        ('files:src+include=*.py', True)
    """

    paths: tuple[str, ...]
    include: str | None
    weight: float | None
    relevance: float | None
    name: str | None

    def __init__(
        self,
        *paths: str | os.PathLike[str],
        include: str | None = None,
        weight: float | None = None,
        relevance: float | None = None,
        name: str | None = None,
    ) -> None:
        given = tuple(os.fspath(path) for path in paths)
        if not given or not all(given):
            raise InvalidInputError("expected the path of files, as in files:~/project")
        if weight is not None and not 0 <= weight <= 1:
            raise InvalidInputError(f"expected a weight of files from 0 to 1, got {weight}")
        if relevance is not None and not 0 <= relevance < float("inf"):
            raise InvalidInputError(f"expected a relevance of files of 0 or more, got {relevance}")
        for key, value in zip(("paths", "include", "weight", "relevance", "name"),
                              (given, include, weight, relevance, name), strict=True):  # fmt: skip
            object.__setattr__(self, key, value)

    def __str__(self) -> str:
        first, *others = self.paths
        parts = [f"{_KIND}{first}", *(f"path={path}" for path in others)]
        parts += [f"{key}={value}" for key in _KEYS[1:] if (value := getattr(self, key)) is not None]
        return joined(*parts)

    @classmethod
    def parse(cls, line: str) -> Files:
        """Read files from their line of text; what is the path of something there, with pluses or not, is that path.

        Raises:
            InvalidInputError: if a part after a plus is no ``key=value`` with a known key, or a number is none.
        """
        if "+" in line and _exists(line.removeprefix(_KIND)):
            return cls(line.removeprefix(_KIND))
        source, said = split(line, f"{_KIND}PATH[+key=value]…, path alone more than once,", _KEYS)
        paths, found = [source.removeprefix(_KIND)], dict[str, Any]()
        for key, value in said:
            if key in found:
                raise InvalidInputError(f"expected each key of files but path once, got {key} twice in {line!r}")
            if key == "path":
                paths.append(value)
            else:
                found[key] = _number(key, value) if key in ("weight", "relevance") else value
        return cls(*paths, **found)

    @property
    def absolute(self) -> Files:
        """The same files by absolute paths, which mean the same in every folder."""
        paths = (os.path.abspath(os.path.expanduser(path)) for path in self.paths)  # noqa: PTH100, PTH111
        return Files(*paths, include=self.include, weight=self.weight, relevance=self.relevance, name=self.name)

    @property
    def title(self) -> str:
        """The name by which the files are shown in tables, answers and requests."""
        last = os.path.basename(self.absolute.paths[0])  # noqa: PTH119
        return self.name or f"{_KIND}{spelled(last)}"

    def require_there(self) -> None:
        """Raise CheckpointError if there is nothing at one of the paths."""
        for path in self.paths:
            if not (_exists(path) or glob.has_magic(path)):
                raise CheckpointError(f"there is no file or folder {path}: check the path behind {_KIND}")


def spelled(path: str) -> str:
    """Return a path with bytes that are not UTF-8 spelled, as neither tables nor JSON can have them."""
    return path.encode(errors="backslashreplace").decode()


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111 - unknown users stay


def _number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InvalidInputError(f"expected a number for {key} of files, got {value!r}") from None


def is_files(named: Any) -> bool:
    """Return whether what is named beside members are files."""
    return isinstance(named, Files) or (isinstance(named, str) and named.startswith(_KIND))


# Why files are no part of a trace.
TRACED = (
    "a trace keeps what members predict, to try rules on it, and of files it would have to keep whole distributions; "
    "trace the models alone, or name the files with a text, by --text"
)


def refuse_files(lines: Iterable[str], why: str) -> None:
    """Raise InvalidInputError, with a reason, if files, or readers that claim, are named among members."""
    if line := next((line for line in lines if is_files(line) or claims(Member.of(line))), None):
        raise InvalidInputError(f"expected models alone, got {line}: {why}")


def parted(named: Any) -> tuple[Any, list[str]]:
    """Return what is named of members, and the lines of what claims beside them: files, and readers that claim.

    Args:
        named: one member, a saved ensemble, or several, with files among them.

    Raises:
        InvalidInputError: if nothing but files is named, or what is named makes no sense.
        CheckpointError: if there are no such files, or a reader cannot be made.
    """
    several = isinstance(named, Iterable) and not isinstance(named, str) and not hasattr(named, "keys")
    every = list(named) if several else [named]
    claiming, members = list[str](), list[Any]()
    for one in every:
        if is_files(one):
            files = one if isinstance(one, Files) else Files.parse(one)
            files.require_there()
            claiming.append(str(files))
        elif isinstance(one, str | Member) and claims(Member.of(one)):
            claiming.append(str(Member.of(one)))
        else:
            members.append(one)
    if claiming and not members:
        raise InvalidInputError("expected a model beside files, as in softmeet chat a.gguf files:~/project")
    if not claiming:
        return named, []
    # One name may be a saved ensemble, or a family.
    return members[0] if len(members) == 1 else members, claiming
