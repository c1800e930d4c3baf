"""What a result has to be told with, so that somebody else can make it again: the command, versions, the machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from softmeet.members.member import Member

# What git says of the commit that is checked out, whatever tags there are.
_DESCRIBE = ("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty")
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def processor() -> str:
    """Return the processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str | None:
    """Return the commit of softmeet's sources, with "-dirty" behind it if files were changed; None if nobody knows."""
    try:
        told = json.loads(distribution("softmeet").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        told = {}
    if known := told.get("vcs_info", {}).get("commit_id"):
        return str(known)
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        # A checkout around an environment is another program's.
        for asked in (("ls-files", "--error-unmatch", Path(__file__).name), _DESCRIBE):
            done = subprocess.run([*here, *asked], check=True, capture_output=True, text=True)  # noqa: S603
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_as(members: Iterable[str], models: Iterable[Any]) -> list[dict[str, Any]]:
    """Return how each member was read: by which ``engine``, in which ``dtype`` or ``quantization``, from what.

    Args:
        members: their lines, with their engines.
        models: their models.

    Returns:
        for each a dict, as JSON has it: of a GGUF file with its ``hash``, of a model of the Hub with its ``commit``.
    """
    return [_read_as(Member.of(line), model) for line, model in zip(members, models, strict=True)]


def _read_as(member: Member, model: Any) -> dict[str, Any]:
    from softmeet.members.native import LLAMA, TRANSFORMERS, is_native, path_of, with_hash
    from softmeet.members.registered import is_registered

    if is_native(member):
        _, _, below = str(path_of(member)).partition("/snapshots/")
        own = {"commit": below.partition("/")[0]} if below else {}
        return {"engine": LLAMA, "quantization": model.reader.file.quantization, "hash": with_hash(member).hash, **own}
    if is_registered(member):
        return {"engine": member.source.partition(":")[0]}
    found = {"engine": TRANSFORMERS, "dtype": str(model.dtype).removeprefix("torch.")}
    more = {
        "quantization": getattr(model, "quantization_method", None),
        "commit": getattr(model.config, "_commit_hash", None),
    }
    return found | {key: str(value) for key, value in more.items() if value is not None}


def repeats(members: Iterable[str]) -> list[str]:
    """Return a sentence on what changes figures of members with these lines; none unless llama.cpp runs one."""
    from softmeet.members.native import is_native

    if not any(is_native(Member.of(line)) for line in members):
        return []
    return [
        "llama.cpp rounds otherwise on another processor, in another version and with other threads; else the same "
        "command gives the same figures, whatever the number of workers."
    ]


class Record:
    """The record of a run that begins when this is made."""

    def __init__(self) -> None:
        self._started, self._clock = datetime.now(UTC), time.monotonic()

    def facts(self, seeds: list[int], threads: int | None = None) -> dict[str, Any]:
        """Return the record, as JSON has it.

        Args:
            seeds: those of all that was drawn; empty if nothing was.
            threads: of PyTorch in each worker; None for those of this process.
        """
        import torch

        from softmeet.members import llama_library

        return {
            "command": shlex.join(["softmeet", *sys.argv[1:]]),
            "seeds": seeds,
            "commit": commit(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in _PACKAGES},
                **llama_library.versions(),
            },
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": threads or torch.get_num_threads(),
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 3),
        }
