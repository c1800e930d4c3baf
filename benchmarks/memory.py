"""Peak memory of an ensemble beside its members alone: python benchmarks/memory.py

Each way of decoding runs in a process of its own; the operating system's figure for its peak is what counts.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from members import ensemble_of, load_pair, save_pair
from report import show

WAYS = ("members alone", "logit-mean", "meet")


@torch.inference_mode()
def decode(folder: str, way: str, batch: int, tokens: int) -> float:
    """Peak resident MiB of this process after loading both members and decoding by one way."""
    names = [f"{folder}/a", f"{folder}/b"]
    ids = torch.randint(0, 50_000, (batch, 32), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    models = load_pair(names)
    ways = models if way == WAYS[0] else [ensemble_of(names, models, way)]
    for model in ways:
        model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(
    batch: Annotated[int, typer.Option()] = 1,
    tokens: Annotated[int, typer.Option()] = 4,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    one: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print one table."""
    torch.set_num_threads(2)
    if one:
        print(decode(folder, one, batch, tokens))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        save_pair(Path(place))
        for way in WAYS:
            options = ["--one", way, "--folder", place, f"--batch={batch}", f"--tokens={tokens}"]
            command = [sys.executable, __file__, *options]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"what": way, "peak, MiB": float(found.stdout.split()[-1])})
    for row in rows:
        row["over the members"] = row["peak, MiB"] / rows[0]["peak, MiB"]
    show(f"peak resident memory, two members of GPT-2 small's shape, batch {batch}", rows, json)


if __name__ == "__main__":
    typer.run(main)
