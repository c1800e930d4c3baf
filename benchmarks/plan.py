"""The memory plan beside what processes take: python benchmarks/plan.py

Two members of GPT-2 small's shape, in memory or the second on disk. Each way runs in a process of its own, which loads
them and decodes by ``meet``; what it takes is its own memory (unique set size) over that of a process that has done the
same with tiny members, so that libraries do not count.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from members import ensemble_of, save_pair
from report import show
from softmeet.hf.plan import plan

WAYS: dict[str, tuple[str, str]] = {"in memory": ("cpu", "cpu"), "the second on disk": ("cpu", "disk")}


class Peak(threading.Thread):
    """Follows this process's own memory until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._over = 0, threading.Event()

    def run(self) -> None:
        """Look every 20 milliseconds."""
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, resident())

    def stop(self) -> int:
        """The most that was seen."""
        self._over.set()
        self.join()
        return max(self.bytes, resident())


def resident() -> int:
    """Bytes that belong to this process alone."""
    return int(psutil.Process().memory_full_info().uss)


def decode(folder: Path, way: str, batch: int, context: int) -> tuple[int, int]:
    """(bytes once every weight was used, the most while they decode), over the same with tiny members."""
    rehearse = folder / "tiny"
    _run([rehearse, rehearse], WAYS[way], 1, 24)
    before = resident()
    return tuple(x - before for x in _run([folder / "a", folder / "b"], WAYS[way], batch, context))  # type: ignore[return-value]


@torch.inference_mode()
def _run(folders: list[Path], places: tuple[str, str], batch: int, context: int) -> tuple[int, int]:
    models = [
        AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, **({"device_map": {"": "disk"}} if place == "disk" else {})
        ).eval()
        for path, place in zip(folders, places, strict=True)
    ]
    # Weights are mapped into memory when they are first used.
    for member in models:
        member(input_ids=torch.ones(1, 1, dtype=torch.int64))
    gc.collect()
    loaded = resident()
    model = ensemble_of([str(path) for path in folders], models, "meet")
    ids = torch.randint(0, model.config.vocab_size, (batch, context - 4), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    peak = Peak()
    peak.start()
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return loaded, peak.stop()


def main(
    batch: Annotated[int, typer.Option()] = 4,
    context: Annotated[int, typer.Option()] = 256,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    one: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Print one table."""
    torch.set_num_threads(1)
    if one:
        print(*decode(folder, one, batch, context))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        names = save_pair(place)
        small = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=512, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(small).save_pretrained(place / "tiny")
        for way, places in WAYS.items():
            options = ["--one", way, "--folder", scratch, f"--batch={batch}", f"--context={context}"]
            command = [sys.executable, __file__, *options]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            loaded, most = (int(x) / 2**20 for x in found.stdout.split()[-2:])
            planned = plan(names, device=list(places), batch=batch, context=context)
            sizes = {part.what: 0.0 for part in planned.parts}
            for part in planned.parts:
                sizes[part.what] += part.bytes / 2**20 if part.device == "cpu" else 0.0
            weights = sizes["body"] + sizes["head"]
            total = planned.totals()["cpu"] / 2**20
            rows.append(
                {
                    "members": way,
                    "weights in memory, planned, MiB": weights,
                    "measured": loaded,
                    "in all, planned": total,
                    "measured at most": most,
                    "of it planned": total / most,
                    "on disk, planned": planned.totals().get("disk", 0) / 2**20,
                }
            )
    title = f"two members of GPT-2 small's shape, meet, {batch} sequences of {context} tokens"
    show(title, rows, json)


if __name__ == "__main__":
    typer.run(main)
