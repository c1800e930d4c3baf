"""What a result has to be told with, so that somebody else can make it again: the command, versions, the machine."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def processor() -> str:
    """Return the processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


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

        return {
            "command": shlex.join(["softmeet", *sys.argv[1:]]),
            "seeds": seeds,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": threads or torch.get_num_threads(),
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 3),
        }
