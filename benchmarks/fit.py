"""Fit a bundled family on held-out books, as a user would: python benchmarks/fit.py narrow --tokens 1000

A document is a book of the King James Version that no bundled member has seen. The members run once, into a trace; then
``softmeet fit`` does the rest. ``--bad`` adds a member whose head is shuffled, which a fit should leave out.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from held_out import held_out_documents
from report import show
from softmeet import Ensemble
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.fit import Options, fit
from softmeet.evaluation.save import save, verdict
from softmeet.evaluation.trace import Trace, record
from softmeet.members import zoo


def shuffled(name: str, folder: Path) -> str:
    """A copy of a bundled member whose head gives each token the logit of another."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(zoo.locate(name))
    layer = model.get_output_embeddings()
    order = torch.randperm(len(layer.weight), generator=torch.Generator().manual_seed(0))
    layer.weight = torch.nn.Parameter(layer.weight.detach()[order].clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(zoo.locate(name)).save_pretrained(folder)
    return str(folder)


def traced(ensemble: Ensemble, tokens: int, folder: Path) -> Trace:
    """The first ``tokens`` of each book, in a trace that is kept between runs."""
    return record(ensemble, held_out_documents(), folder, max_per_document=tokens)


def main(
    family: Annotated[str, typer.Argument(help="A bundled family.")] = "narrow",
    tokens: Annotated[int, typer.Option(help="Of each of the 20 books, at most.")] = 1000,
    meet_tokens: Annotated[int, typer.Option(help="Size of the subset that meet is fitted on.")] = 2000,
    evaluations: Annotated[int, typer.Option()] = 15,
    bad: Annotated[bool, typer.Option("--bad", help="Add a member with a shuffled head.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Keep the trace here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the ensemble here.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Keep what is found here, and go on from it.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json")] = None,
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        names = zoo.expand(family)
        names += [shuffled(names[0], Path(scratch) / "shuffled")] if bad else []
        ensemble = Ensemble.from_pretrained(names)
        positions = traced(ensemble, tokens, trace or Path(scratch) / "trace").read()
        options = Options(meet_positions=meet_tokens, evaluations=evaluations)
        kept = PieceCache(
            resume, asdict(options) | {"family": family, "tokens": tokens, "bad": bad, "threads": threads}
        )
        started = time.perf_counter()
        fitted = fit(ensemble, positions, options, cache=kept)
        seconds = time.perf_counter() - started
        facts = save(ensemble, fitted, out or Path(scratch) / "ensemble")
    rows: list[dict[str, Any]] = [
        {
            "candidate": Path(name).name,
            "test nats": row["test_nll"],
            "vs best baseline": f"{row['delta']:+.4f} [{row['ci95'][0]:+.4f}, {row['ci95'][1]:+.4f}]",
            "weights": " ".join(f"{w:.3f}" for w in row["weights"]),
            "trust": " ".join(f"{rho:.3f}" for rho in row["trust"]) if row["rule"] == "meet" else "",
            "T": row["rule_temperature"],
            "evaluations": row["evaluations"],
        }
        for name, row in facts["candidates"].items()
    ]
    sizes = ", ".join(f"{part['tokens']:,} to {name}" for name, part in facts["splits"].items())
    title = f"{family}{' and a shuffled head' if bad else ''}: {sizes}; {seconds:.0f} s"
    show(title, rows, as_json, seconds=seconds, fit=facts)
    print(verdict(facts))


if __name__ == "__main__":
    typer.run(main)
