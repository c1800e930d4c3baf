"""The bundled members, by name: two families trained on public-domain text by ``tools/train_zoo.py``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from softmeet.errors import CheckpointError

FAMILIES = ("wide", "narrow")
DEFAULT = "wide"


def folder() -> Path:
    """Where the bundled members are."""
    return Path(str(files("softmeet"))) / "zoo"


def resolve(name: str | Path) -> list[str]:
    """The folders behind a bundled name (``wide``, ``wide/gpt2``); any other name, or an existing path, as it is."""
    if isinstance(name, Path) or Path(name).exists():
        return [str(name)]
    place = folder() / name
    if name in FAMILIES:
        return sorted(str(p) for p in place.iterdir() if (p / "config.json").exists())
    family, _, rest = str(name).partition("/")
    if family in FAMILIES and rest:
        if not (place / "config.json").exists():
            known = ", ".join(p.name for p in sorted((folder() / family).iterdir()))
            raise CheckpointError(f"there is no bundled member {name}: the {family} family has {known}")
        return [str(place)]
    return [name]
