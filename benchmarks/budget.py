"""What `meet` gives after a few steps, without bounds: python benchmarks/budget.py

`meet:budget=K` stops after K steps. On text that the bundled families have not seen, or of real members (``-m A -m B
--text FILE``, or on text that these sample themselves: ``--sampled``), the total variation of its answer to the one at
a tolerance of 10⁻⁶ nats, beside the pool's own and that of `meet` at the default tolerance. A row costs what it does in
a batch of all.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

import softmeet
from problems import Rows, held_out, of_text
from report import named, seconds, show
from softmeet.evaluation.premise import own_text
from softmeet.rules.meet import Meet
from softmeet.simplex import total_variation


@torch.inference_mode()
def sampled(members: list[str], count: int) -> Rows:
    """Members at positions of a text that they sample together, by their average."""
    model = softmeet.Ensemble.from_pretrained(members).model
    hidden = own_text(model, count)
    return Rows(torch.stack([head.log_probs(h) for head, h in zip(model.heads, hidden, strict=True)]), model.heads)


def table(name: str, given: Rows, trust: float, budgets: list[int], repeats: int) -> list[dict[str, Any]]:
    """A row for the pool, for each budget and for the default tolerance."""
    combine = partial(softmeet.combine, given.log_probs, given.heads, trust=trust)
    exact = combine("meet", tol=1e-6, max_steps=100).log_probs.double()
    rules: dict[str, Any] = {"the pool": "logit-mean"} | {f"meet:budget={k}": Meet(budget=k) for k in budgets}
    rows = []
    for label, rule in (rules | {"meet, with bounds": "meet"}).items():
        found = combine(rule)
        far = total_variation(found.log_probs.double(), exact)
        taken = median(seconds(partial(combine, rule), repeats, 0))
        rows.append(
            {
                "members": name, "trust": trust, "rule": label, "passes": found.num_passes.mean().item(),
                "TV, mean": far.mean().item(), "largest": far.max().item(), "ms a row": 1e3 * taken / len(far),
            }
        )  # fmt: skip
    return rows


def main(
    positions: Annotated[int, typer.Option(help="Of each family or text.")] = 64,
    trust: Annotated[str, typer.Option()] = "0.3,1",
    budgets: Annotated[str, typer.Option("--budget", help="Steps.")] = "1,2,3,5",
    member: Annotated[list[str] | None, typer.Option("-m", help="Members instead of the bundled families.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text for them.")] = None,
    sample: Annotated[bool, typer.Option("--sampled", help="Or on text that they sample themselves.")] = False,
    threads: Annotated[int, typer.Option()] = 1,
    repeats: Annotated[int, typer.Option()] = 3,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    if member and not sample and text is None:
        raise typer.BadParameter("members need a text: --text FILE, or --sampled")
    torch.set_num_threads(threads)
    given: list[tuple[str, Rows]] = []
    if not member:
        given += [(family, held_out(family, positions)) for family in ("narrow", "wide")]
    elif text is None:
        given.append((" + ".join(named(m) for m in member), sampled(member, positions)))
    else:
        given.append((" + ".join(named(m) for m in member), of_text(member, text.read_text("utf-8"), positions)))
    steps = [int(x) for x in budgets.split(",")]
    rows = [
        row for name, some in given for rho in trust.split(",") for row in table(name, some, float(rho), steps, repeats)
    ]
    show("meet after a few steps", rows, json, threads=threads)


if __name__ == "__main__":
    typer.run(main)
