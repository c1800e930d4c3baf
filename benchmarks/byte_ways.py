"""What generation over bytes costs by each way to less: python benchmarks/byte_ways.py [-m A -m B -t 'texts/*']

The ensemble generates from the beginnings of texts, one at a time, in every way in turn: plainly, speculating, each
byte from one member, and under the gate `unsure` by thresholds. Calls and rows (tokens run, over all tokenizations that
are followed) are those of all members for each byte; *of plain* is plain's time of a byte over the way's, in processor
seconds (with more threads, the clock's). *Closed* is the share of bytes that the gate left to the first member.
Without members: the bundled `mixed`, on books that it has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from report import named, now, show
from softmeet import Ensemble
from softmeet.evaluation.documents import read_documents
from softmeet.evaluation.held_out import held_out_books
from softmeet.hf import Recorder


@dataclass
class Total:
    """What one way took, over all texts."""

    options: dict[str, Any]
    recorder: Recorder | None = None
    seconds: list[float] = field(default_factory=list)
    made: int = 0
    calls: int = 0
    rows: int = 0


def ways(thresholds: str) -> dict[str, Total]:
    """Each way, with the options that ask for it."""
    plain: dict[str, Any] = {"gate": "none", "speculate": 0}
    found = {
        "plain": Total(plain),
        "speculation": Total(plain | {"speculate": "auto"}),
        "one member a byte": Total(plain | {"one_member": True}),
    }
    for one in thresholds.split(","):
        gate = f"unsure:{float(one):g}"
        found[gate] = Total(plain | {"gate": gate}, Recorder())
    return found


@torch.inference_mode()
def generate(ensemble: Ensemble, total: Total, prompt: str, seed: int, count: int) -> None:
    """Generate so many bytes, and add what that took."""
    before = ensemble.model.spent
    torch.manual_seed(seed)
    # One member a byte draws without a seed of the call's own, and lets a text end.
    seeded = {} if "one_member" in total.options else {"seed": seed, "min_new_tokens": count}
    recorded = {} if total.recorder is None else {"recorder": total.recorder}
    begun = now()
    found = ensemble.generate(prompt, do_sample=True, top_k=0, max_bytes=count, **seeded, **recorded, **total.options)
    total.made += len(found.encode())
    total.seconds.append(now() - begun)
    for old, new in zip(before, ensemble.model.spent, strict=True):
        total.calls += new.calls - old.calls
        total.rows += new.tokens - old.tokens


def main(
    member: Annotated[list[str] | None, typer.Option("-m", help="Members instead of the bundled `mixed`.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="Files or patterns, for them.")] = None,
    rule: Annotated[str, typer.Option()] = "prob-mean",
    thresholds: Annotated[str, typer.Option(help="Of the gate.")] = "0.9,0.5,0.3",
    documents: Annotated[int, typer.Option(help="So many of the texts are continued.")] = 6,
    count: Annotated[int, typer.Option(help="Bytes to generate from each text's beginning.")] = 120,
    threads: Annotated[int, typer.Option()] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    texts = [one.text for one in read_documents(text)] if text else [book.text[1000:] for book in held_out_books()]
    even = [1] * (len(member) if member else 2)
    ensemble = Ensemble.from_pretrained(member or "mixed", rule, vocabulary="bytes", weights=even)
    totals = ways(thresholds)
    for total in totals.values():  # what a first call prepares is nobody's
        generate(ensemble, Total(total.options), texts[0][:100], 0, 8)
    for k, own in enumerate(texts[:documents]):
        for total in totals.values():
            generate(ensemble, total, own[:100], k, count)
    plain = sum(totals["plain"].seconds) / totals["plain"].made
    rows = [
        {
            "members": " + ".join(map(named, member or ["mixed"])),
            "how": how,
            "closed": None if total.recorder is None else total.recorder.gate.share,
            "calls a byte": total.calls / total.made,
            "rows a byte": total.rows / total.made,
            "ms a byte": 1e3 * sum(total.seconds) / total.made,
            "of plain": plain * total.made / sum(total.seconds),
        }
        for how, total in totals.items()
    ]
    show(f"{rule} over bytes", rows, json)


if __name__ == "__main__":
    typer.run(main)
