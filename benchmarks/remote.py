"""What a server tells of a model beside the same file here: python benchmarks/remote.py http://127.0.0.1:8080 QWEN05

A text is read token by token, by the server's k likeliest tokens and by llama.cpp in this process: the total variation
between what is taken for the distribution and the whole one, what is dropped, and whether bounds hold.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from report import show
from softmeet.readers.llama_cpp import LlamaReader
from softmeet.readers.reader import Read, Reader, finished
from softmeet.readers.remote import at

# Log-probabilities may differ so far where a file is read in other calls, by whichever build of the library.
ROUNDING = 0.5


def told(reader: Reader, text: list[int]) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Log-probabilities behind each token, read one by one, the bounds of those that are not told, and the seconds."""
    row, start = reader.open(), time.perf_counter()
    found = [finished(reader.read([Read(row, [token], [1])])) for token in text]
    taken = time.perf_counter() - start
    reader.close(row)
    most = [one.bounds() for one in found]
    bounds = None if most[0] is None else torch.cat([one for one in most if one is not None])
    return torch.cat([one.log_probs() for one in found]).double(), bounds, taken


def main(
    url: Annotated[str, typer.Argument(help="The server's address.")],
    member: Annotated[str, typer.Argument(help="The GGUF file that it serves.")],
    text: Annotated[Path, typer.Option(help="A file, of which the beginning is read.")] = Path("docs/theory/index.md"),
    tokens: Annotated[int, typer.Option(help="How many tokens are read.")] = 64,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print a table."""
    native = LlamaReader(member)
    read = native.alphabet.encode(text.read_text(encoding="utf-8"))[:tokens]
    exact, _, alone = told(native, read)
    rows = list[dict[str, Any]]()
    for top in ("20", "100", "all"):
        found, bounds, taken = told(at(url, member, top), read)
        apart = (found.exp() - exact.exp()).abs().sum(-1) / 2
        others = exact.masked_fill(~found.isneginf(), -torch.inf).amax(-1)
        broken = 0 if bounds is None else int((others > bounds + ROUNDING).sum())
        unseen = exact.exp().masked_fill(~found.isneginf(), 0).sum(-1)
        rows.append(
            {
                "told": top, "TV, mean": apart.mean().item(), "TV, largest": apart.max().item(),
                "not told, mean": unseen.mean().item(), "bounds broken": broken, "places": len(read),
                "ms a token": 1000 * taken / len(read), "ms a token here": 1000 * alone / len(read),
            }
        )  # fmt: skip
    show("a model behind llama.cpp's server beside its file here", rows, json, tokens=tokens)


if __name__ == "__main__":
    typer.run(main)
