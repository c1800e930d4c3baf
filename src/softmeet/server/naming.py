"""The names of served ensembles, from what a command is given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from softmeet.errors import InvalidInputError
from softmeet.members.files import is_files
from softmeet.members.local_names import located
from softmeet.members.member import Member
from softmeet.members.zoo import DEFAULT

# NAME= before a member. A member's own name may hold an equals sign, but only after a plus sign.
_PREFIX = re.compile(r"([\w.-]+)=")


def named(given: Sequence[str], members: Sequence[str] = ()) -> dict[str, list[str]]:
    """Read the ensembles named on a command line, as a dict from each ensemble's name to the names of its members.

    Args:
        given: saved ensembles and bundled families, each as ``NAME=PATH``, or as ``PATH`` alone, whose last part is
            then the name, or of two that are alike the last two parts; a file alone, by its path or by its name in
            another program, is a member of ``default``. The user's files stand beside these or, if there are none,
            beside the one ensemble that is named.
        members: single members: ``MEMBER`` belongs to the ensemble ``default``, ``NAME=MEMBER`` to the ensemble
            ``NAME``.

    Returns:
        {name: [a saved ensemble or family]}, then {name: members}; ``{"default": ["wide"]}`` if nothing is named.

    Raises:
        InvalidInputError: if two ensembles have the same name, or members are joined by commas, as they were until 0.3.

    >>> named(["narrow", "big=folder/wide"])
    {'narrow': ['narrow'], 'big': ['folder/wide']}
    >>> named(["narrow", "files:src"])
    {'narrow': ['narrow', 'files:src']}
    >>> named([], ["gpt2", "other=distilgpt2", "opt"])
    {'default': ['gpt2', 'opt'], 'other': ['distilgpt2']}
    """
    joined: dict[str, list[str]] = {}
    beside, given = [text for text in given if is_files(text)], [text for text in given if not is_files(text)]
    files = [text for text in given if not _PREFIX.match(text) and Path(located(Member.of(text)).source).is_file()]
    for text in (*files, *members):
        prefix = _PREFIX.match(text)
        name = prefix.group(1) if prefix else "default"
        joined.setdefault(name, []).append(text[prefix.end() :] if prefix else text)
    found: dict[str, list[str]] = {}
    for text in (text for text in given if text not in files):
        prefix = _PREFIX.match(text)
        parts = text[prefix.end() :] if prefix else text
        name = prefix.group(1) if prefix else _last(parts, [other for other in given if other != text])
        if first := found.get(name, joined.get(name)):
            together = " ".join(f"-m {name}={part}" for part in [*first, parts])
            raise InvalidInputError(
                f"expected a name for each ensemble, got {name!r} twice: say {together} to combine these models, or "
                "give each a name of its own, as NAME=…"
            )
        if "," in parts and "+" not in parts and not Path(parts).exists():
            today = " ".join(f"-m {prefix.group() if prefix else ''}{part}" for part in parts.split(","))
            raise InvalidInputError(f"expected one ensemble, got members joined by commas: say {today}")
        found[name] = [parts]
    every = found | joined or {"default": [DEFAULT]}
    if beside and "default" not in every and len(every) > 1:
        raise InvalidInputError(
            f"say -m NAME={beside[0]}, NAME being the one of {', '.join(every)} that gets these files"
        )
    every["default" if "default" in every else next(iter(every))] += beside
    return every


def _last(path: str, others: Sequence[str]) -> str:
    """Return the last part of a path, or its last two if that of another is the same."""
    parts = Path(path).parts
    alike = any(Path(other).parts[-1:] == parts[-1:] for other in others)
    return "/".join(parts[-2:] if alike else parts[-1:])
