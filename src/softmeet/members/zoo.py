"""The bundled members, by name: three families, trained on public-domain text by ``tools/train_zoo.py``.

Their checkpoints are a distribution of their own, softmeet-zoo, which need not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from softmeet.errors import CheckpointError, nearest
from softmeet.extras import install_line
from softmeet.members.local_names import located
from softmeet.members.member import Member

FAMILIES = ("wide", "narrow", "mixed")
DEFAULT = "wide"
# A member in any of its forms, or a bundled family, by name.
Named = Member | str | Path | Mapping[str, Any]


def folder() -> Path:
    """Return the folder that holds the bundled members.

    Raises:
        CheckpointError: if they are not installed; the message says how to install them.
    """
    found = installed()
    if found is None:
        raise CheckpointError(
            f"the bundled members ({', '.join(FAMILIES)}) are a package of their own, softmeet-zoo, which is not "
            f"installed: {install_line('zoo')}; or name members of your own: hub ids or folders"
        )
    return found


def installed() -> Path | None:
    """Return the folder that holds the bundled members, or None if they are not installed."""
    spec = find_spec("softmeet_zoo")
    return Path(spec.origin).parent if spec and spec.origin else None


def expand(name: Named) -> list[str]:
    """Return the members that a bundled family's name stands for, each as a line of text; else the one member's line.

    What is put behind a family's name (``wide+dtype=bfloat16``) goes for each of its members. A model (a file, or a
    folder with a config.json) in the working directory that is called like a family takes precedence. Of a name that
    another program has given to a GGUF file (:func:`softmeet.members.local_names.located`) it is the file's line.

    Args:
        name: a member in any of the forms of :meth:`Member.of`.

    Raises:
        InvalidInputError: if ``name`` is empty, or not in one of these forms.
        CheckpointError: if it names a bundled family, and the bundled members are not installed; or several files.

    Example:
        >>> expand("narrow")[:2], expand("org/model")
        (['narrow/opt-a', 'narrow/opt-b'], ['org/model'])
    """
    member = Member.of(name)
    family = member.source
    if family in FAMILIES and not _is_model(Path(family)):
        return [str(replace(member, source=f"{family}/{own}")) for own in _members(family)]
    return [str(located(member))]


def _members(family: str) -> list[str]:
    return [p.name for p in sorted((folder() / family).iterdir()) if (p / "config.json").exists()]


def known() -> list[str]:
    """Return all bundled names: the families' (``wide``) and, if installed, their members' (``wide/gpt2``)."""
    if installed() is None:
        return list(FAMILIES)
    return [*FAMILIES, *(f"{family}/{own}" for family in FAMILIES for own in _members(family))]


def locate(name: str) -> str:
    """Return the folder of a bundled member (``family/name``); any other name, and the path of a model, unchanged.

    Raises:
        CheckpointError: if the name begins with a family's and a slash, but the family has no such member, or the
            bundled members are not installed.
    """
    family, _, rest = name.partition("/")
    if _is_model(Path(name)) or family not in FAMILIES or not rest:
        return name
    place = folder() / name
    if not (place / "config.json").exists():
        members = _members(family)
        raise CheckpointError(
            f"there is no bundled member {name}: {nearest(rest, members)}the {family} family has {', '.join(members)}"
        )
    return str(place)


def _is_model(path: Path) -> bool:
    """Tell a model (a file, or a folder with a config.json) from another folder, such as a trace called ``narrow``."""
    return path.is_file() or (path / "config.json").exists()
