"""What a call of llama.cpp costs by its number of tokens: python benchmarks/native_calls.py -m QWEN15

Each number of tokens, of as many texts, in one call and in two of half as many, in turn. Calls of files of K-quants go
another way from eight tokens on.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from report import show
from softmeet.readers.llama_context import LlamaContext, RowTokens
from softmeet.readers.llama_cpp import LlamaReader

# Tokens of each text before.
BEFORE = 16


def milliseconds(context: LlamaContext, numbers: list[range]) -> float:
    """The time of calls behind the texts of these numbers, which have no more tokens afterwards."""
    start = time.perf_counter()
    for some in numbers:
        context.run([RowTokens(k, BEFORE, [300 + k], [0]) for k in some])
    took = 1000 * (time.perf_counter() - start)
    for k in (k for some in numbers for k in some):
        context.cut(k, BEFORE)
    return took


def main(
    members: Annotated[list[str], typer.Option("--member", "-m", help="GGUF files.")],
    rounds: Annotated[int, typer.Option(help="Times that each is run, in turn.")] = 7,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print a table."""
    counts, rows = [2, 4, 6, 7, 8, 10, 12, 13, 14, 16], list[dict[str, Any]]()
    for name in members:
        context = LlamaContext(LlamaReader(name)._model, 4096)
        for k in range(max(counts)):
            context.run([RowTokens(k, 0, list(range(100 + k, 100 + k + BEFORE)), [])])
        ways = [way for n in counts for way in ([range(n)], [range(n // 2), range(n // 2, n)])]
        times = [[milliseconds(context, way) for way in ways] for _ in range(rounds + 1)][1:]
        found = [median(own) for own in zip(*times, strict=True)]
        rows += [
            {
                "file": Path(name).stem, "tokens": n, "one call, ms": found[2 * k],
                "two calls, ms": found[2 * k + 1],
            }
            for k, n in enumerate(counts)
        ]  # fmt: skip
    show("calls of llama.cpp by their tokens", rows, json, rounds=rounds)


if __name__ == "__main__":
    typer.run(main)
