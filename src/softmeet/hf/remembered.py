"""What was measured of members on this machine, kept for the next time in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmeet.members.heads import body_hash
from softmeet.members.member import Member

if TYPE_CHECKING:
    from softmeet.hf.protocol import AnyEnsemble

_log = logging.getLogger("softmeet")


def members_hash(model: AnyEnsemble) -> str:
    """Compute the SHA-256, in hexadecimal, of a sample of each member's weights and of its prompt, in their order."""
    prompts = [Member.parse(name).prompt or "" for name in model.config.members]
    return hashlib.sha256("".join([*map(body_hash, model.members), *prompts]).encode()).hexdigest()


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
