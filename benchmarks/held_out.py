"""Rules on text that no bundled member has seen: python benchmarks/held_out.py narrow

A document is a book of the King James Version. The trust is chosen on some books and judged on others; intervals are
by document, paired against the uniform logit mean. Figures in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import t as student_t
from torch import Tensor

from softmeet import Ensemble

# Every other held-out book, so that both parts hold narrative, poetry, prophecy and letters.
TUNING_STRIDE = 2
CHUNK = 64
# Positions of each book for max-entropy, which takes many steps to prove that it has no answer.
FEW = 32


@dataclass(frozen=True)
class Document:
    """One book: hidden states per member, (t, d_i) each, and the tokens that came, (t,)."""

    name: str
    hidden: list[Float[Tensor, "t d"]]
    targets: Int[Tensor, " t"]


@dataclass(frozen=True)
class Difference:
    """A paired difference in nats per token, with its 95 % interval by document."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@torch.inference_mode()
def read(ensemble: Ensemble, texts: dict[str, str], limit: int) -> list[Document]:
    """The first ``limit`` tokens of each text through every member, in windows of the members' context."""
    found = []
    for name, text in texts.items():
        windows = list(ensemble.positions("<|endoftext|>" + text, limit))
        hidden = [torch.cat(parts) for parts in zip(*(states for states, _ in windows), strict=True)]
        found.append(Document(name, hidden, torch.cat([targets for _, targets in windows])))
    return found


@dataclass(frozen=True)
class Solved:
    """-log p(token) in nats, and whether the row was answered by ``meet``, (t,)."""

    nats: Float[Tensor, " t"]
    fallback: Bool[Tensor, " t"]


@torch.inference_mode()
def solve(ensemble: Ensemble, document: Document, **settings: Any) -> Solved:
    """Every position of a document, by the ensemble's rule with some settings changed."""
    nats, fallback = [], []
    for start in range(0, len(document.targets), CHUNK):
        rows = slice(start, start + CHUNK)
        _, solution = ensemble.model.solve_rows([h[rows] for h in document.hidden], **settings)
        nats.append(-solution.log_probs.gather(-1, document.targets[rows, None]).squeeze(-1))
        fallback.append(solution.fallback)
    return Solved(torch.cat(nats), torch.cat(fallback))


def losses(ensemble: Ensemble, document: Document, **settings: Any) -> Float[Tensor, " t"]:
    """-log p(token) in nats at every position."""
    return solve(ensemble, document, **settings).nats


def member_losses(ensemble: Ensemble, document: Document) -> list[Float[Tensor, " t"]]:
    """-log p̂_i(token) in nats for each member."""
    pairs = zip(ensemble.model.heads, document.hidden, strict=True)
    return [-head.log_probs(h).gather(-1, document.targets[:, None]).squeeze(-1) for head, h in pairs]


def mean(parts: Sequence[Float[Tensor, " t"]]) -> float:
    """Nats per token over all documents."""
    return torch.cat(list(parts)).double().mean().item()


def difference(ours: Sequence[Float[Tensor, " t"]], theirs: Sequence[Float[Tensor, " t"]]) -> Difference:
    """Ours minus theirs, a ratio estimate clustered by document, with Student's t on documents - 1 degrees."""
    sums = torch.stack([(a - b).double().sum() for a, b in zip(ours, theirs, strict=True)])
    sizes = torch.tensor([len(a) for a in ours], dtype=torch.float64)
    D, center = len(sizes), (sums.sum() / sizes.sum()).item()
    spread = ((sums - center * sizes) ** 2).sum().item() * D / (D - 1)
    half = float(student_t.ppf(0.975, D - 1)) * math.sqrt(spread) / sizes.sum().item()
    return Difference(center, center - half, center + half)


def choose_trust(ensemble: Ensemble, documents: Sequence[Document], trusts: Sequence[float]) -> dict[float, float]:
    """Nats per token for each trust, the same for every member."""
    n = len(ensemble.names)
    return {
        rho: mean([losses(ensemble, d, rule="meet", trust=[rho] * n) for d in documents])
        for rho in track(trusts, description="choosing the trust", transient=True)
    }


def main(
    family: Annotated[str, typer.Argument(help="A bundled family, or a folder.")] = "narrow",
    tokens: Annotated[int, typer.Option(help="Of each document, at most.")] = 512,
    trust: Annotated[str, typer.Option(help="Trusts to try, the same for every member.")] = "0.1,0.3,1,2,4",
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    """Print one table for a family."""
    from zoo_texts import HELD_OUT_KJV, kjv_works

    torch.set_num_threads(threads)
    ensemble = Ensemble.from_pretrained(family)
    documents = read(ensemble, {w.name: w.text for w in kjv_works() if w.name in HELD_OUT_KJV}, tokens)
    tuning, test = documents[::TUNING_STRIDE], documents[1::TUNING_STRIDE]
    trusts = [float(rho) for rho in trust.split(",")]
    curve = choose_trust(ensemble, tuning, trusts)
    best = min(curve, key=lambda rho: curve[rho])
    baseline = [losses(ensemble, d, rule="logit-mean") for d in test]
    singles = list(zip(*(member_losses(ensemble, d) for d in test), strict=True))
    size = sum(len(d.targets) for d in test)
    table = Table("", "nats/token", "against logit-mean", title=f"{family}: {size:,} positions of {len(test)} books")
    for name, single in zip(ensemble.names, singles, strict=True):
        table.add_row(Path(name).name, f"{mean(single):.4f}", str(difference(single, baseline)))
    table.add_row("logit-mean", f"{mean(baseline):.4f}", "")
    rules: list[tuple[str, dict[str, Any]]] = [("prob-mean", {"rule": "prob-mean"})]
    rules += [(f"meet, trust {rho:g}", {"rule": "meet", "trust": [rho] * len(singles)}) for rho in trusts]
    for name, settings in track(rules, description="rules", transient=True):
        ours = [losses(ensemble, d, **settings) for d in test]
        mark = "  (chosen on other books)" if name == f"meet, trust {best:g}" else ""
        table.add_row(name, f"{mean(ours):.4f}", str(difference(ours, baseline)) + mark)
    few = [Document(d.name, [h[:FEW] for h in d.hidden], d.targets[:FEW]) for d in test]
    exact = [solve(ensemble, d, rule="max-entropy") for d in track(few, description="max-entropy", transient=True)]
    infeasible = torch.cat([found.fallback for found in exact])
    Console(width=100).print(table)
    Console(width=100).print(
        f"max-entropy is infeasible, with proof, at {int(infeasible.sum())} of {len(infeasible)} positions"
    )


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    typer.run(main)
