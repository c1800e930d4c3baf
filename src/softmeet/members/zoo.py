"""The bundled members, by name: two families trained on public-domain text by ``tools/train_zoo.py``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

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
    if name.split("/")[0] in FAMILIES and (place / "config.json").exists():
        return [str(place)]
    return [name]
