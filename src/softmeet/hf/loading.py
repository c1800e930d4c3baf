"""The names of members in a configuration, and in a folder that holds one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softmeet.errors import CheckpointError, InvalidInputError
from softmeet.members import zoo
from softmeet.members.placement import Device

CARD = """---
library_name: softmeet
pipeline_tag: text-generation
---
# An ensemble of {n} language models

This folder names its members and how they are combined; it holds none of their weights.

| member | weight | trust |
|---|---|---|
{rows}

Rule: `{rule}`{source}, pool: `{pool}`, tolerance: {tol:g} nats.

```python
import softmeet

ensemble = softmeet.Ensemble.from_pretrained("this folder")
```
"""


def absolute(names: Sequence[str], base: Path) -> list[str]:
    """Names as saved, with paths (they begin with a dot) taken from the folder ``base``.

    Raises:
        CheckpointError: such a path leads nowhere.
    """
    found = []
    for name in names:
        if not name.startswith("."):
            found.append(name)
            continue
        path = Path(os.path.normpath(base.resolve() / name))
        if not path.exists():
            raise CheckpointError(
                f"the ensemble in {base} names a member {name}, but there is no {path}: move the member there, or edit "
                f"members in {base / 'config.json'}"
            )
        found.append(str(path))
    return found


def relative(names: Sequence[str], base: Path) -> list[str]:
    """Names as they are saved: hub ids and bundled names as they are, local folders relative to ``base``."""
    found = []
    for name in names:
        if zoo.locate(name) != name or not Path(name).exists():
            found.append(name)
        else:
            path = os.path.relpath(Path(name).resolve(), base.resolve())
            found.append(path if path.startswith(".") else f"./{path}")
    return found


def places(device_map: Device | Sequence[Device], n: int) -> Device | Sequence[Device]:
    """Where each of n members goes, from a map that may name them as modules of the ensemble.

    Raises:
        InvalidInputError: it names a member that there is not.
    """
    if not isinstance(device_map, dict):
        return device_map
    if set(device_map) == {""}:
        return device_map[""]  # type: ignore[no-any-return]
    if not any(str(name).startswith("members.") for name in device_map):
        return device_map
    found: list[dict[str, Any]] = [{} for _ in range(n)]
    for name, place in device_map.items():
        head, _, rest = str(name).removeprefix("members.").partition(".")
        if not (str(name).startswith("members.") and head.isdigit() and int(head) < n):
            raise InvalidInputError(f"expected a map of members.0 to members.{n - 1} and their modules, got {name!r}")
        found[int(head)][rest] = place
    return [own[""] if set(own) == {""} else own or None for own in found]
