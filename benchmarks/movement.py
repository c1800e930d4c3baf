"""What the gate `movement` misses: python benchmarks/movement.py

Members solve `meet` everywhere on a text; the gate, with the factor that it would have, says where the pool would have
answered instead. For the bundled families held-out books are the text; ``-m A -m B --text FILE`` takes other members.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from report import named, show
from softmeet import Ensemble
from softmeet.evaluation.documents import Document
from softmeet.evaluation.positions import observe_text
from softmeet.hf.calibrated import resolved
from softmeet.rules.gates import PredictedMovement
from softmeet.simplex import kl


@torch.inference_mode()
def measured(
    name: str, ensemble: Ensemble, texts: list[Document], count: int, trust: float, thresholds: list[float]
) -> list[dict[str, Any]]:
    """A row for each threshold."""
    model = ensemble.model
    settings = resolved(model, model.settings.changed(trust=trust, gate="auto"))
    factor = settings.gate.factor
    positions = observe_text(ensemble, texts)
    chosen = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))[:count]
    some = positions.take(chosen.sort().values)
    moved, free, cost = [], [], []
    for start in range(0, len(some), 16):
        part = some.take(torch.arange(start, min(start + 16, len(some))))
        _, solution = model.combiner.solve_rows(list(part.hidden), settings.ungated().changed(tol=1e-4))
        p, q = solution.log_probs.double(), solution.problem.log_pool.double()
        moved.append(kl(p, q))
        free.append(solution.problem.pool_bound())
        index = part.targets[:, None]
        cost.append((p.gather(-1, index) - q.gather(-1, index))[:, 0])
    moves, bound, gain = torch.cat(moved), torch.cat(free), torch.cat(cost)
    rows = []
    for threshold in thresholds:
        closed = ~(PredictedMovement(threshold, factor).threshold <= factor * bound)
        n = max(int(closed.sum()), 1)
        rows.append(
            {
                "members": name,
                "trust": trust,
                "factor": factor,
                "T, nats": threshold,
                "gated": closed.double().mean().item(),
                "movement where gated": (moves * closed).sum().item() / n,
                "largest": (moves * closed).max().item(),
                "nats a token given up": (gain * closed).mean().item(),
                "of meet's gain": gain.mean().item(),
            }
        )
    return rows


def main(
    member: Annotated[list[str] | None, typer.Option("-m", help="Members instead of the bundled families.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text for them.")] = None,
    positions: Annotated[int, typer.Option(help="Drawn from the text.")] = 512,
    trust: Annotated[str, typer.Option()] = "0.3,1",
    thresholds: Annotated[str, typer.Option("--threshold", help="Nats.")] = "0.0003,0.001,0.003",
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    torch.set_num_threads(2)
    limits = [float(x) for x in thresholds.split(",")]
    rows: list[dict[str, Any]] = []
    given: list[tuple[str, Any, list[Document]]] = []
    if member:
        texts = [Document(path.name, path.read_text(encoding="utf-8")) for path in text or []]
        given.append(("+".join(named(m) for m in member), member, texts))
    else:
        from softmeet.evaluation.held_out import held_out_books

        books = [Document(book.name, book.text[1000:3000]) for book in held_out_books()]
        given += [(family, family, books) for family in ("narrow", "wide")]
    for name, members, texts in given:
        ensemble = Ensemble.from_pretrained(members, "meet")
        for rho in (float(x) for x in trust.split(",")):
            rows += measured(name, ensemble, texts, positions, rho, limits)
    show("what the gate movement misses", rows, json)


if __name__ == "__main__":
    typer.run(main)
