"""Which files are read of the paths that a member of files names."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path
from typing import TYPE_CHECKING

from softmeet.errors import InvalidInputError, cannot_load
from softmeet.extras import require_extra

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

# A larger file is seldom written by hand.
_LARGEST = 10**6
# Names of files that hold keys and passwords, not those of code about them.
_KEYS = re.compile("|".join(map(translate, (
    ".env*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.ppk", "*.jks", "*.keystore", "*.kdbx",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".pgpass", ".htpasswd", ".npmrc", ".pypirc",
    ".git-credentials", "credentials", "credentials.*[!y]", "credentials.y*ml", "*secrets.json", "*secrets.toml",
    "*secrets.y*ml", "client_secret*.json", "service*account*.json",
))), re.IGNORECASE)  # fmt: skip
_KEYS_SAID, _INDEXES_SAID = "names of keys and passwords", "indexes of softmeet's"


@dataclass(frozen=True)
class Corpus:
    """The files of some paths.

    Attributes:
        paths: what was asked for, absolute and sorted.
        include: the glob that names or paths of files have to match; None for all.
        files: the files, absolute and sorted, each once.
        left_out: how many of what matches are not among them, by the reason; a folder that is left out counts as one.
    """

    paths: tuple[str, ...]
    include: str | None
    files: tuple[Path, ...]
    left_out: dict[str, int] = field(default_factory=dict)


def find_texts(paths: Sequence[str], include: str | None = None, without: Path | None = None) -> Corpus:
    """Find the files of some paths, by their names and sizes: what is no text is told when they are read.

    Left out are what a .gitignore names, what is hidden, symbolic links, files over 1 MB, and those that hold keys by
    their names. A file that is named itself is taken all the same, unless it holds keys.

    Args:
        paths: folders, files or globs (``**`` for folders at any depth); ``~`` is the home folder.
        include: a glob on files' names (``"*.py"``) or on their paths below a folder (``"src/**/*.md"``); None for
            all.
        without: a folder that is left out; None for none.

    Raises:
        CheckpointError: if nothing is at a path.
        InvalidInputError: if a glob cannot be read, or pathspec is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("a.py", "b.md", ".env"):
        ...         _ = Path(folder, name).write_text("text")
        ...     found = find_texts([folder])
        >>> [file.name for file in found.files], found.left_out
        (['a.py', 'b.md'], {'names of keys and passwords': 1})
    """
    require_extra("a member of files", "files", "pathspec")
    globs = [] if include is None else [_glob(include)]
    asked: set[str] = set()
    files: set[str] = set()
    left_out: dict[str, str] = {}
    for path in paths:
        base, rest = _split(path)
        asked.add(str(base / rest))
        if base.is_file():
            found = [(str(base), _KEYS_SAID if _KEYS.match(base.name) else "")]
        else:
            wanted = [*globs, _glob(f"/{rest}")] if rest else globs
            walked = _walk(base, None if without is None else os.path.realpath(without))
            found = [(path, why) for path, below, why in walked if all(one.match_file(below) for one in wanted)]
        if rest and not found:
            raise cannot_load(f"files:{path}", f"expected a glob of files that are there, found none of it in {base}")
        left_out |= {file: why for file, why in found if why}
        files |= {file for file, why in found if not why}
    reasons = Counter(why for file, why in left_out.items() if file not in files)
    return Corpus(tuple(sorted(asked)), include, tuple(map(Path, sorted(files))), dict(sorted(reasons.items())))


def _split(path: str) -> tuple[Path, str]:
    """Return the file or folder at a path, without symbolic links, and ""; of a glob, where it begins, and the rest."""
    whole = Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 (pathlib's raises where there is no home)
    if path and whole.exists():
        return whole.resolve(), ""
    first = next((k for k, part in enumerate(whole.parts) if re.search(r"[*?[]", part)), 0)
    base = Path(*whole.parts[:first]).resolve()
    if not first or not base.is_dir():
        raise cannot_load(f"files:{path}", f"expected a folder, a file or a glob, found nothing there ({whole})")
    return base, "/".join(whole.parts[first:])


def _glob(pattern: str) -> GitIgnoreSpec:
    """Return what tells whether a glob matches the path of a file, or a folder that it is in."""
    from pathspec import GitIgnoreSpec

    try:
        return GitIgnoreSpec.from_lines([pattern])
    except (ValueError, re.error) as error:
        raise InvalidInputError(f'expected a glob such as "*.py" or "src/**/*.md", got {pattern!r}') from error


def _walk(base: Path, without: str | None) -> Iterator[tuple[str, str, str]]:
    """Yield each file below a folder, its path from there, and "" or why it is left out; so, too, folders that are."""
    if without is not None and base.is_relative_to(without):
        yield str(base), ".", _INDEXES_SAID
        return
    top, rules = _rules_above(base)
    begin = f"{base.relative_to(top).as_posix()}/" if base != top else ""
    pending = [(begin, rules)]
    while pending:
        folder, rules = pending.pop()
        rules = [*rules, *_rules_in(top, folder)]
        try:
            with os.scandir(top / folder) as entries:
                for entry in entries:
                    path = folder + entry.name
                    why = _INDEXES_SAID if entry.path == without else _why_not(entry, path, rules)
                    if why or not entry.is_dir():
                        yield entry.path, path[len(begin) :], why
                    else:
                        pending.append((f"{path}/", rules))
        except OSError:
            yield str(top / folder), folder[len(begin) :] or ".", "could not be read"


# What tells of a path below its folder whether it is ignored, None where it says nothing; with the length of what is
# before the folder's end.
_Rule = tuple[int, Callable[[str], bool | None]]


def _why_not(entry: os.DirEntry[str], path: str, rules: list[_Rule]) -> str:
    """Return why an entry of a folder is left out; "" if it is not."""
    if entry.is_symlink():  # what it leads to is found at its own place, if it is in the folder
        return "symbolic links"
    folder = entry.is_dir()
    if not folder and _KEYS.match(entry.name):
        return _KEYS_SAID
    if entry.name.startswith("."):
        return "hidden"
    if _ignored(f"{path}/" if folder else path, rules):
        return "ignored by .gitignore"
    if not folder and not entry.is_file():
        return "no regular files"
    return "over 1 MB" if not folder and entry.stat().st_size > _LARGEST else ""


def _ignored(path: str, rules: list[_Rule]) -> bool:
    """Return what the nearest .gitignore says that says anything of a path, which ends in a slash if it is a folder."""
    verdicts = (ignores(path[before:]) for before, ignores in reversed(rules))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def _rules_in(top: Path, folder: str) -> list[_Rule]:
    """Return what the .gitignore in a folder says, if there is one."""
    from pathspec import GitIgnoreSpec

    try:
        lines = (top / folder / ".gitignore").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    said: list[tuple[re.Pattern[str], bool | None]] = []
    for line in lines:
        with suppress(ValueError, re.error):  # as git, which passes over what it cannot read
            said += [(one.regex, one.include) for one in GitIgnoreSpec.from_lines([line]).patterns if one.regex]

    def ignores(path: str) -> bool | None:
        return next((ignored for line, ignored in reversed(said) if _matches(line, path)), None)

    return [(len(folder), ignores)]


def _matches(line: re.Pattern[str], path: str) -> bool:
    """Return whether a line of a .gitignore matches a path itself: pathspec's matches what is in a folder, too.

    Such a match has a group, of the slash behind the folder.
    """
    if any(found.lastgroup is None for found in line.finditer(path.removesuffix("/"))):
        return True
    return path.endswith("/") and any(found.end() == len(path) and found.lastgroup for found in line.finditer(path))


def _rules_above(base: Path) -> tuple[Path, list[_Rule]]:
    """Return the folder of the repository that a folder is in, or itself, and what is said of it in between."""
    top = next((folder for folder in (base, *base.parents) if (folder / ".git").exists()), base)
    parts = base.relative_to(top).parts
    above = ["".join(f"{part}/" for part in parts[:k]) for k in range(len(parts))]
    return top, [rule for folder in above for rule in _rules_in(top, folder)]
