"""What the gate `unsure` saves and costs over bytes: python benchmarks/byte_gate.py

The first member answers alone wherever it gives a next byte the threshold's probability or more, and the others then
read what they have missed, at once, where it does not. Quality is that of held-out text, every byte predicted from the
bytes before it. Speed is that of generation from the beginnings of the texts, one sequence at a time, every gate in
turn, in seconds of the processor; it is set against that of no gate, and the calls are the second member's. Without
members: the bundled `mixed`, on books that it has not seen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from report import show
from softmeet import Ensemble
from softmeet.evaluation.choices import RuleChoice, under_gates
from softmeet.evaluation.documents import Document, read_documents
from softmeet.evaluation.perplexity import evaluate_text
from softmeet.hf import Recorder

_NATS_A_BIT = 0.6931471805599453


@dataclass
class Total:
    """What generation under one gate took."""

    seconds: list[float] = field(default_factory=list)
    recorder: Recorder = field(default_factory=Recorder)
    calls: int = 0


@torch.inference_mode()
def speeds(ensemble: Ensemble, gates: list[str], prompts: list[str], count: int) -> dict[str, Total]:
    """Generate so many bytes from each prompt, under every gate in turn."""
    totals, second = {gate: Total() for gate in gates}, ensemble.model.readers[1]
    ensemble.generate(prompts[0], max_new_tokens=2, do_sample=False)
    for k, prompt in enumerate(prompts):
        for gate, total in totals.items():
            begun, calls = time.process_time(), second.spent.calls
            ensemble.generate(
                prompt, gate=gate, seed=k, do_sample=True, top_k=0, min_new_tokens=count, max_bytes=count,
                recorder=total.recorder,
            )  # fmt: skip
            total.seconds.append(time.process_time() - begun)
            total.calls += second.spent.calls - calls
    return totals


def main(
    member: Annotated[list[str] | None, typer.Option("-m", help="Members instead of the bundled `mixed`.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="Files or patterns, for them.")] = None,
    thresholds: Annotated[str, typer.Option(help="Probabilities of the first member's most probable byte.")] = (
        "0.99,0.95,0.9,0.7,0"
    ),
    documents: Annotated[int, typer.Option(help="So many of the texts are read and continued.")] = 8,
    bytes_read: Annotated[int, typer.Option("--bytes", help="Of each text, to measure quality on.")] = 2000,
    count: Annotated[int, typer.Option(help="Bytes to generate from each text's beginning.")] = 200,
    threads: Annotated[int, typer.Option()] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    if member:
        if not text:
            raise typer.BadParameter("members need texts: --text 'FILES'")
        texts = [document.text for document in read_documents(text)]
    else:
        from softmeet.evaluation.held_out import held_out_books

        texts = [book.text[1000:] for book in held_out_books()]
    texts = texts[:documents]
    even = [1] * (len(member) if member else 2)
    ensemble = Ensemble.from_pretrained(member or "mixed", "logit-mean", vocabulary="bytes", weights=even)
    gates = ["none", *(f"unsure:{float(one):g}" for one in thresholds.split(","))]
    choices = under_gates([RuleChoice("logit-mean", {"rule": "logit-mean"})], gates)
    read = [Document(str(k), own[:bytes_read]) for k, own in enumerate(texts)]
    scores = evaluate_text(ensemble, read, choices).choices
    totals = speeds(ensemble, gates, [own[:100] for own in texts], count)
    plain, rows = totals["none"], list[dict[str, Any]]()
    for gate, own in zip(gates, scores.values(), strict=True):
        total = totals[gate]
        rows.append(
            {
                "gate": gate,
                "bits a byte": own.mean / _NATS_A_BIT,
                "closed, text": own.gated.double().mean().item() if len(own.gated) else 0.0,
                "closed, generated": total.recorder.gate.share or 0.0,
                "calls a byte": total.calls / (len(texts) * count),
                "ms a byte": 1e3 * median(total.seconds) / count,
                "of no gate's speed": sum(plain.seconds) / sum(total.seconds),
            }
        )
    show(f"{' + '.join(ensemble.model.config.members)}, gate unsure over bytes", rows, json)


if __name__ == "__main__":
    typer.run(main)
