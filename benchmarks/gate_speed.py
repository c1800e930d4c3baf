"""`meet` beside `logit-mean` in generation, with the default gate: python benchmarks/gate_speed.py -m A -m B -t 'FILES'

From the beginning of each text, one sequence at a time, the average, `meet` with its gate and `meet` with none generate
as many tokens, in turn, so that all three see the machine as it then is; ratios are of the sums of seconds. An *open*
token is one at which the gate had the rule solved. Without members: the bundled families, on books that they have not
seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from report import named, now, show
from softmeet import Ensemble
from softmeet.evaluation.documents import read_documents
from softmeet.hf import Recorder

WAYS: dict[str, dict[str, Any]] = {
    "logit-mean": {"rule": "logit-mean"},
    "meet, gate auto": {"rule": "meet", "gate": "auto"},
    "meet, no gate": {"rule": "meet", "gate": None},
}


@dataclass
class Total:
    """What one way took over all texts: seconds, tokens, what the rule read, and the ratio to the average of each."""

    seconds: float = 0.0
    tokens: int = 0
    recorder: Recorder = field(default_factory=Recorder)
    ratios: list[float] = field(default_factory=list)


@torch.inference_mode()
def run(ensemble: Ensemble, prompt: str, way: str, tokens: int, seed: int, *, sample: bool, total: Total) -> float:
    """Generate from one prompt, add what it took to ``total``, and return the seconds."""
    settings = ensemble.model.settings.changed(**WAYS[way])
    start = now()
    ensemble.generate(
        prompt, settings=ensemble.model.combiner.resolved(settings), recorder=total.recorder, do_sample=sample,
        seed=seed if sample else None, speculate=0, min_new_tokens=tokens, max_new_tokens=tokens,
    )  # fmt: skip
    taken = now() - start
    total.seconds, total.tokens = total.seconds + taken, total.tokens + tokens
    return taken


def compare(
    name: str, ensemble: Ensemble, prompts: list[str], tokens: int, ways: list[str], *, sample: bool
) -> list[dict[str, Any]]:
    """A row for each way, by the sums over all prompts."""
    for way in ways:
        run(ensemble, prompts[0], way, 2, 0, sample=sample, total=Total())
    totals = {way: Total() for way in ways}
    for k, prompt in enumerate(prompts):
        taken = {w: run(ensemble, prompt, w, tokens, k, sample=sample, total=t) for w, t in totals.items()}
        for way, total in totals.items():
            total.ratios.append(taken[ways[0]] / taken[way])
    plain, rows = totals[ways[0]], []
    for way, total in totals.items():
        gate, each = total.recorder.gate, 1e3 * total.seconds / total.tokens
        rows.append(
            {
                "members": name, "drawn": "sampled" if sample else "greedy", "way": way, "ms a token": each,
                "gated": gate.share, "passes": total.recorder.passes / total.recorder.rows,
                "ms an open token takes more": 1e3 * (total.seconds - plain.seconds) / max(gate.rows - gate.gated, 1),
                "of logit-mean's speed": plain.seconds / total.seconds, "median": median(total.ratios),
                "from": min(total.ratios), "to": max(total.ratios),
            }
        )  # fmt: skip
    return rows


def main(
    member: Annotated[list[str] | None, typer.Option("-m", help="Members instead of the bundled families.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="Files or patterns, for them.")] = None,
    documents: Annotated[int, typer.Option(help="So many of the texts are continued.")] = 8,
    prompt: Annotated[int, typer.Option(help="Characters of a text that are the prompt.")] = 300,
    tokens: Annotated[int, typer.Option(help="To generate from each.")] = 32,
    trust: Annotated[float, typer.Option()] = 0.3,
    threads: Annotated[int, typer.Option()] = 1,
    gated_only: Annotated[bool, typer.Option("--gated-only", help="Leave out meet without its gate.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    given: list[tuple[str, Any, list[str]]] = []
    if member:
        if not text:
            raise typer.BadParameter("members need texts: --text 'FILES'")
        given.append((" + ".join(named(m) for m in member), member, [d.text for d in read_documents(text)]))
    else:
        from softmeet.evaluation.held_out import held_out_books

        books = [book.text[1000:] for book in held_out_books()]
        given += [(family, family, books) for family in ("narrow", "wide")]
    rows, ways = list[dict[str, Any]](), list(WAYS)[: 2 if gated_only else 3]
    for name, members, texts in given:
        ensemble = Ensemble.from_pretrained(members, trust=trust)
        prompts = [own[:prompt] for own in texts[:documents]]
        for sample in (True, False):
            rows += compare(name, ensemble, prompts, tokens, ways, sample=sample)
    show(f"generation, one sequence at a time, trust {trust:g}, {tokens} tokens from each prompt", rows, json)


if __name__ == "__main__":
    typer.run(main)
