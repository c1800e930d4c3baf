"""What was measured of members on this machine, kept for the next time in the user's cache folder."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

_log = logging.getLogger("softmeet")


def known(file: Path) -> dict[str, dict[str, Any]]:
    """Read what a file holds by members' hash; return an empty dict if it is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(file: Path, who: str, own: str, value: Any) -> None:
    """Add a value to what a file holds of members; if it cannot be written, it will be measured anew next time."""
    held = known(file)
    held.setdefault(who, {})[own] = value
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError:
        _log.debug("could not write %s", file)
