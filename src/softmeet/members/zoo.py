"""The bundled members, by name: three families, trained on public-domain text by ``tools/train_zoo.py``.

Their checkpoints are a distribution of their own, softmeet-zoo, which need not be installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from softmeet.errors import CheckpointError, InvalidInputError, nearest
from softmeet.extras import install_line

FAMILIES = ("wide", "narrow", "mixed")
DEFAULT = "wide"


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


def expand(name: str | Path) -> list[str]:
    """Return the names of a bundled family's members; a list of the name alone if it names no family.

    A model (a file, or a folder with a config.json) in the working directory that is called like a family takes
    precedence.

    Raises:
        InvalidInputError: if ``name`` is empty, or neither a text nor a path.
        CheckpointError: if it names a bundled family, and the bundled members are not installed.

    Example:
        >>> expand("narrow")[:2], expand("org/model")
        (['narrow/opt-a', 'narrow/opt-b'], ['org/model'])
    """
    if not isinstance(name, str | Path) or not str(name).strip():
        raise InvalidInputError(f"expected a member's name: a hub id, a folder, or a bundled name, got {name!r}")
    if str(name) in FAMILIES and not _is_model(Path(name)):
        return [f"{name}/{own}" for own in _members(str(name))]
    return [str(name)]


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


def short(name: str) -> str:
    """Return the last two parts of a path, as a name to show.

    Example:
        >>> short("/models/wide/gpt2")
        'wide/gpt2'
    """
    return "/".join(Path(name).parts[-2:])
