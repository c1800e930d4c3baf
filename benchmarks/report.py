"""What every benchmark shares: one table on the terminal, the same figures as JSON, and a line about the machine.

The JSON is a *result*: rows of figures with the command, the date and the machine. Those in benchmarks/results are what
the pages show (tools/update_figures.py).
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import median as median
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from softmeet.evaluation.record import processor

# Environment variables that hold the paths of the models that pages name so.
MODELS = ("SMOLLM2", "GEMMA", "QWEN05", "QWEN15")
T = TypeVar("T")


def _in_threads(count: int) -> int:
    """Have torch take so many threads."""
    torch.set_num_threads(count)
    return count


JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]
Threads = Annotated[int, typer.Option(callback=_in_threads, help="Of torch, which has them before anything runs.")]
Models = Annotated[list[str], typer.Option("--member", "-m", help="A hub id, a folder or a GGUF file; repeat it.")]
Members = Annotated[list[str] | None, typer.Option("--member", "-m", help="Models, not the bundled ones; repeat it.")]
Texts = Annotated[list[str], typer.Option("--text", "-t", help="Files or a pattern; repeat it.")]
Repeats = Annotated[int, typer.Option(help="How often each is measured.")]


def commands(about: str | None) -> typer.Typer:
    """Return a program of several commands, each of which measures one thing."""
    how: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}
    return typer.Typer(help=about, no_args_is_help=True, **how)


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, so that its memory alone counts; return what it returns."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def machine() -> str:
    """The processor, its cores and torch's threads, in a line."""
    threads = torch.get_num_threads()
    how = "one thread, seconds of its processor" if threads == 1 else f"{threads} threads"
    return f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {how}"


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


def command(arguments: list[str] | None = None) -> str:
    """The command of this process as a reader would type it, without ``--json``.

    A model's path is written as the variable of :data:`MODELS` that holds it, any other path as its last part.

    >>> command(["/home/me/softmeet/benchmarks/decode.py", "calls", "--rule", "meet", "--json", "calls.json"])
    'python benchmarks/decode.py calls --rule meet'
    """
    script, *options = sys.argv if arguments is None else arguments
    kept, words = [f"benchmarks/{Path(script).name}"], iter(options)
    for word in words:
        if word == "--json":
            next(words, None)
        elif not word.startswith("--json="):
            kept.append(named(word))
    return f"python {shlex.join(kept)}"


def by_variable(text: str) -> str:
    """A text with each path of a model in it as the variable of :data:`MODELS` that holds it."""
    for model in MODELS:
        if os.environ.get(model):
            text = text.replace(os.environ[model], model)
    return text


def named(text: str) -> str:
    """The same, with any other absolute path as its last part."""
    text = by_variable(text)
    return re.sub(r"(?<![\w.~-])/(?:[^\s/:+=]+/)*([^\s/:+=]+)", r"\1", text)


def show(title: str, rows: list[dict[str, Any]], out: Path | None, **facts: Any) -> None:
    """Print ``rows`` as a table, and write them with the command, the date, the machine and ``facts`` to ``out``."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns, title=title, caption=machine())
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    Console(width=150).print(table)
    if out is not None:
        keep(out, title, rows, **facts)


def keep(out: Path, title: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write a result: numbers to six digits, so that two runs differ only where they do."""
    today = datetime.now(UTC).date().isoformat()
    found = {"title": title, "command": command(), "date": today, "machine": machine(), **facts, "rows": rows}
    out.write_text(json.dumps(_rounded(found), indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_text(each) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
