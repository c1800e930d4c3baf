"""GGUF files over bytes, run by llama.cpp: python benchmarks/native_bytes.py -m SMOLLM2 -m GEMMA

A text is read byte by byte, as an ensemble reads what it writes: one that the members write themselves, which they
know, and code that none of them does. Beside it is llama.cpp's own loop over the members' own tokens of the same text
and, by `--dequantised`, the same files under transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from report import show
from softmeet import Ensemble
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.llama_context import LlamaContext, RowTokens

PROMPT = "The library was built in the year in which the old bridge fell, and"


def texts(ensemble: Ensemble, size: int) -> dict[str, bytes]:
    """A text that the ensemble writes, greedily, and some code of this repository."""
    parts = ensemble.stream(PROMPT, max_bytes=size, min_new_tokens=size, do_sample=False, speculate=0)
    code = Path(__file__).with_name("recent_texts.py").read_text(encoding="utf-8")
    return {"they write": "".join(parts).encode(), "unknown code": code.encode()[-size:]}


def by_bytes(member: ByteMember, text: bytes) -> Callable[[], float]:
    """What reads a text byte by byte, and returns its seconds."""

    def run() -> float:
        reading = member.begin(PROMPT.encode())
        start = time.perf_counter()
        for byte in text:
            member.log_probs([reading])
            (reading,) = member.advance([reading], [byte])
        return time.perf_counter() - start

    return run


def by_tokens(model: Any, member: ByteMember, text: bytes) -> Callable[[], float]:
    """What runs llama.cpp's own loop over the tokens of a text, and returns its seconds."""
    context, tokens = LlamaContext(model.reader._model, 4096), [*map(int, member.spelling.encode(text))]
    begun = [*member.prefix, *map(int, member.spelling.encode(PROMPT.encode()))]

    def run() -> float:
        context.cut(0, 0)
        context.run([RowTokens(0, 0, begun, [len(begun) - 1])])
        start = time.perf_counter()
        for k, token in enumerate(tokens):
            context.run([RowTokens(0, len(begun) + k, [token], [0])])
        return time.perf_counter() - start

    return run


def main(
    members: Annotated[list[str], typer.Option("--member", "-m", help="GGUF files of different tokenizers.")],
    size: Annotated[int, typer.Option(help="Bytes of each text.")] = 300,
    rounds: Annotated[int, typer.Option(help="Times that each is run, in turn.")] = 5,
    dequantised: Annotated[bool, typer.Option(help="Run the files under transformers, too.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print a table."""
    start = time.perf_counter()
    ensemble = Ensemble.from_pretrained(members, "logit-mean")
    loaded = time.perf_counter() - start
    ways: dict[tuple[str, str, str], Callable[[], float]] = {}
    floats = [f"{name}+engine=transformers" for name in members]
    others = Ensemble.from_pretrained(floats, "logit-mean") if dequantised else None
    for kind, text in texts(ensemble, size).items():
        for k, name in enumerate(members):
            member = ensemble.model.readers[k]
            ways[kind, Path(name).stem, "own"] = by_tokens(ensemble.model.members[k], member, text)
            ways[kind, Path(name).stem, "bytes"] = by_bytes(member, text)
            if others is not None:
                ways[kind, Path(name).stem, "float32"] = by_bytes(others.model.readers[k], text)
    seconds: dict[tuple[str, str, str], list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            seconds[way].append(run())
    each = {way: 1000 * median(own) / size for way, own in seconds.items()}
    rows = list[dict[str, Any]]()
    for kind in dict.fromkeys(kind for kind, _, _ in each):
        names = [Path(name).stem for name in members]
        for name, parts in [*((own, [own]) for own in names), ("both", names)]:
            own, ours, theirs = (
                sum(each.get((kind, part, how), 0.0) for part in parts) for how in ("own", "bytes", "float32")
            )
            rows.append({
                "text": kind, "what": name, "own tokens, ms a byte": own, "ms a byte": ours, "over its own": ours / own,
                "under transformers": theirs or None, "times faster": theirs / ours or None,
            })  # fmt: skip
    show(f"{len(members)} GGUF files over bytes by llama.cpp, batch 1", rows, json, **{"loaded in, s": loaded})


if __name__ == "__main__":
    typer.run(main)
