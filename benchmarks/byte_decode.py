"""What a byte costs that is generated: python benchmarks/byte_decode.py -m MEMBER -t 'texts/prose/*.txt'

One member over bytes beside its own generation over tokens, both sampled with one seed, several times in turn, from the
first text's beginning. Calls of the model and tokens run are set against the tokens that the member's own tokenizer
makes of the same bytes: of what was generated, and of the texts, read byte by byte as if they were being generated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from report import named, now, show
from softmeet import Ensemble
from softmeet.evaluation.documents import read_documents

# Bytes of a text from which the rest is generated or read.
_BEGINNING = 300


@contextmanager
def watched(owner: Any, *names: str) -> Iterator[list[float]]:
    """Time what is spent in some methods of an object; they do not call each other."""
    seconds = [0.0]

    def timed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            start = now()
            found = function(*arguments)
            seconds[0] += now() - start
            return found

        return call

    for name in names:
        object.__setattr__(owner, name, timed(getattr(type(owner), name).__get__(owner)))
    yield seconds
    for name in names:
        object.__delattr__(owner, name)


def by_bytes(ensemble: Ensemble, prompt: str, count: int, seed: int) -> dict[str, float]:
    """Generate so many bytes behind a prompt whose cost is left out of the counts, and not of the time."""
    (reader,) = ensemble.model.readers
    prompted, before = reader.begin(prompt.encode()).work, reader.spent
    with (
        watched(reader, "run") as model,
        watched(reader.head, "logits") as head,
        watched(reader, "advance", "log_probs", "begin") as reading,
    ):
        start = now()
        text = ensemble.generate(prompt, seed=seed, do_sample=True, top_k=0, max_bytes=count, min_new_tokens=count)
        taken = now() - start
    size, own = len(text.encode()), len(reader.spelling.encode(text.encode()))
    return {
        "ms/B": 1000 * taken / size, "reader alone ms/B": 1000 * (reading[0] - model[0] - head[0]) / size,
        "loop and rule ms/B": 1000 * (taken - reading[0]) / size, "bytes a token": size / own,
        "calls a token": (reader.spent.calls - before.calls - prompted.calls) / own,
        "run a token": (reader.spent.tokens - before.tokens - prompted.tokens) / own,
    }  # fmt: skip


@torch.inference_mode()
def by_tokens(ensemble: Ensemble, prompt: str, count: int, seed: int) -> float:
    """Milliseconds a byte of the member's own generation."""
    (reader,) = ensemble.model.readers
    ids = torch.tensor([[*reader.prefix, *reader.spelling.encode(prompt.encode())]])
    torch.manual_seed(seed)
    start = now()
    out = reader.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
    )  # fmt: skip
    taken = now() - start
    return 1000 * taken / max(1, len(reader.spelling.spelled(out[0, ids.shape[1] :].tolist())))


def read(ensemble: Ensemble, texts: list[bytes]) -> dict[str, float]:
    """Read the rest of each text byte by byte, behind its first ones."""
    (reader,) = ensemble.model.readers
    calls, run, own = 0, 0, 0
    for text in texts:
        reading = reader.begin(text[:_BEGINNING])
        before = reading.work
        for byte in text[_BEGINNING:]:
            (reading,) = reader.advance([reading], [byte])
        calls, run = calls + reading.work.calls - before.calls, run + reading.work.tokens - before.tokens
        own += len(reader.spelling.encode(text)) - len(reader.spelling.encode(text[:_BEGINNING]))
    return {"calls a token, texts": calls / own, "run a token, texts": run / own}


def main(
    members: Annotated[list[str], typer.Option("--member", "-m", help="Hub ids, folders or GGUF files; one by one.")],
    text: Annotated[list[str], typer.Option("--text", "-t", help="Files or patterns.")],
    documents: Annotated[int, typer.Option(help="So many of the texts are read.")] = 6,
    length: Annotated[int, typer.Option(help="Characters of each text that are read, at most.")] = 2000,
    count: Annotated[int, typer.Option(help="Bytes to generate.")] = 240,
    repeats: Annotated[int, typer.Option(help="Seeds.")] = 3,
    prune: Annotated[float, typer.Option(help="As for every ensemble over bytes.")] = 0.01,
    threads: Annotated[int, typer.Option()] = 1,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print a row for each member: medians over seeds."""
    torch.set_num_threads(threads)
    rows = []
    some = [document.text[:length] for document in read_documents(text)[:documents]]
    prompt = some[0].encode()[:_BEGINNING].decode(errors="ignore")
    for name in members:
        ensemble = Ensemble.from_pretrained([name], vocabulary="bytes", prune=prune)
        by_bytes(ensemble, prompt, 8, 0), by_tokens(ensemble, prompt, 2, 0)
        found = []
        for seed in range(1, repeats + 1):
            ours = by_bytes(ensemble, prompt, count, seed)
            tokens = max(8, round(count / ours["bytes a token"]))
            found.append(ours | {"own ms/B": by_tokens(ensemble, prompt, tokens, seed)})
        rows.append(
            {"member": named(name), "text": " ".join(text)}
            | {key: median(row[key] for row in found) for key in found[0]}
            | read(ensemble, [one.encode() for one in some])
            | {"times the own": median(row["ms/B"] / row["own ms/B"] for row in found)}
        )
    show(f"Generation over bytes beside the members' own, prune {prune:g}", rows, out, repeats=repeats)


if __name__ == "__main__":
    typer.run(main)
