"""Rules on text that no bundled member has seen: python benchmarks/held_out.py narrow

A document is a book of the King James Version. The trust is chosen on some books and judged on others; intervals are
by document, paired against the uniform logit mean. Figures in nats per token. benchmarks/fit.py does more: it fits
weights and temperature too, and a trust for each member.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from report import show
from softmeet import Ensemble
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.documents import Document
from softmeet.evaluation.held_out import held_out_books
from softmeet.evaluation.intervals import clusters, paired
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import Positions, observe_text
from softmeet.evaluation.scores import Evaluation

# Positions of each book for max-entropy, which takes many steps to prove that it has no answer.
FEW = 32


def held_out_documents() -> list[Document]:
    """The held-out books; each begins as the members' training texts did."""
    return [Document(book.name, "<|endoftext|>" + book.text) for book in held_out_books()]


def read(ensemble: Ensemble, tokens: int) -> tuple[Positions, Positions]:
    """The first ``tokens`` of each held-out book, in two halves: every other book to choose by, the rest to judge by.

    Both halves hold narrative, poetry, prophecy and letters.
    """
    positions = observe_text(ensemble, held_out_documents(), max_per_document=tokens)
    first, second = (positions.take(positions.document % 2 == k) for k in (0, 1))
    return first, second


def meet(trust: float, n: int) -> RuleChoice:
    """``meet`` with one trust for every member."""
    return RuleChoice(f"meet, trust {trust:g}", {"rule": "meet", "trust": [trust] * n})


def compare(ensemble: Ensemble, positions: Positions, choices: Sequence[RuleChoice]) -> Evaluation:
    """Every choice at every position, with a spinner on the terminal."""
    with Console(stderr=True).status("rules"):
        return evaluate(ensemble, positions, choices)


def choose_trust(ensemble: Ensemble, positions: Positions, trusts: Sequence[float]) -> float:
    """The trust, the same for every member, of the lowest loss."""
    choices = {rho: meet(rho, len(ensemble.names)) for rho in trusts}
    found = compare(ensemble, positions, list(choices.values())).choices
    return min(trusts, key=lambda rho: found[choices[rho].name].mean)


def main(
    family: Annotated[str, typer.Argument(help="A bundled family, or a folder.")] = "narrow",
    tokens: Annotated[int, typer.Option(help="Of each document, at most.")] = 512,
    trust: Annotated[str, typer.Option(help="Trusts to try, the same for every member.")] = "0.1,0.3,1,2,4",
    threads: Annotated[int, typer.Option()] = 2,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table for a family."""
    torch.set_num_threads(threads)
    ensemble = Ensemble.from_pretrained(family)
    tuning, test = read(ensemble, tokens)
    trusts = [float(rho) for rho in trust.split(",")]
    best = meet(choose_trust(ensemble, tuning, trusts), len(ensemble.names)).name
    choices = [RuleChoice(name, {"rule": name}) for name in ("logit-mean", "prob-mean")]
    choices += [meet(rho, len(ensemble.names)) for rho in trusts]
    found = compare(ensemble, test, choices)
    within, baseline = clusters(test.document), found.choices["logit-mean"].nats
    rows = []
    for name, scores in {**found.members, **found.choices}.items():
        row: dict[str, Any] = {"who": Path(name).name, "nats/token": scores.mean}
        if name != "logit-mean":
            against = paired(scores.nats, baseline, within)
            row |= {"against logit-mean": against.mean, "from": against.low, "to": against.high}
        rows.append(row | {"chosen on other books": name == best})
    exact, few = RuleChoice("max-entropy", {"rule": "max-entropy"}), list(_first(test, FEW))
    infeasible = sum(evaluate(ensemble, part, [exact]).choices["max-entropy"].fallbacks for part in track(few))
    tried = sum(map(len, few))
    title = f"{family}: {len(test):,} positions of {within.count} {within.kind}"
    show(title, rows, json, positions=len(test), max_entropy={"infeasible": infeasible, "of": tried})
    typer.echo(f"max-entropy is infeasible, with proof, at {infeasible} of {tried} positions")


def _first(positions: Positions, count: int) -> list[Positions]:
    """The first positions of each document."""
    return [
        positions.take((positions.document == k).nonzero().squeeze(-1)[:count]) for k in positions.document.unique()
    ]


if __name__ == "__main__":
    typer.run(main)
