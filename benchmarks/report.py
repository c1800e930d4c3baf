"""What every benchmark shares: one table on the terminal, the same figures as JSON, and a line about the machine."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def machine() -> str:
    """The processor, its cores and torch's threads, in a line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    threads = torch.get_num_threads()
    how = "one thread, seconds of its processor" if threads == 1 else f"{threads} threads"
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {how}"


def now() -> float:
    """Seconds: the processor's where torch has one thread, which are those of an idle core; else the clock's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(function: Callable[[], Any], repeats: int = 5, warm_up: int = 1) -> list[float]:
    """Seconds of each of ``repeats`` calls, by :func:`now`."""
    for _ in range(warm_up):
        function()
    taken = []
    for _ in range(repeats):
        start = now()
        function()
        taken.append(now() - start)
    return taken


def quantile(values: list[float], q: float) -> float:
    """The smallest value that at least a share ``q`` of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1))]


def show(title: str, rows: list[dict[str, Any]], out: Path | None, **facts: Any) -> None:
    """Print ``rows`` as a table, and write them with the machine and ``facts`` to ``out``."""
    table = Table(*rows[0], title=title, caption=machine())
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=150).print(table)
    if out is not None:
        found = {"title": title, "machine": machine(), **facts, "rows": rows}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


__all__ = ["machine", "median", "now", "quantile", "seconds", "show"]
