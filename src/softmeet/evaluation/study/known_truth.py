"""Trained heads and a known truth: the premise holds exactly, in the geometry of real members.

The truth of a context is the logit mean of one family, the stronger; each member of the other has its head as trained,
and the hidden state that is best for that truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.evaluation.documents import Document
from softmeet.evaluation.family import best_hidden
from softmeet.evaluation.study.entries import Rows, score_all
from softmeet.evaluation.study.plots import Plot
from softmeet.evaluation.study.report import Report
from softmeet.evaluation.study.runs import Cell, Json
from softmeet.evaluation.study.summary import lines_by, never_worse, outcomes
from softmeet.heads import SoftmaxHead
from softmeet.simplex import log_normalize

TOL = 1e-6
# Positions between two that are used.
_APART = 32


@dataclass(frozen=True)
class Settings:
    """The members, those whose pool is the truth, how many positions of every document, and ``rows`` of them a cell."""

    members: tuple[str, ...] = ("narrow",)
    truth: tuple[str, ...] = ("wide",)
    positions: int = 8
    rows: int = 8
    documents: int = 20
    sizes: tuple[int, ...] = (1, 2, 3, 4)


SMOKE = Settings(positions=2, rows=2, documents=2, sizes=(2,))


def load(settings: Settings) -> Ensemble:
    """Load the members whose heads are used."""
    return Ensemble.from_pretrained(list(settings.members))


def cells(settings: Settings, documents: Sequence[Document], ensemble: Ensemble | None = None) -> Iterator[Cell]:
    """Every document's positions, in groups, for the first k members (``ensemble``) with k in ``sizes``."""
    heads = (ensemble or load(settings)).model.heads
    stronger = Ensemble.from_pretrained(list(settings.truth), "logit-mean")
    for document in documents[: settings.documents]:
        truths = _truths(stronger, document.text, settings.positions)
        for start in range(0, settings.positions, settings.rows):
            part = truths[start : start + settings.rows]
            for size in settings.sizes:
                yield Cell(f"{document.name} {start} {size}", partial(_scores, heads[:size], part))


@torch.inference_mode()
def _truths(ensemble: Ensemble, text: str, count: int) -> Float[Tensor, "B v"]:
    """The pool at ``count`` positions, spread over the beginning of a text: neighbours have much in common."""
    seen = ensemble.positions(text, _APART * count)
    plain = ensemble.model.settings.ungated()
    every = torch.cat([ensemble.model.combiner.solve_rows(hidden, plain)[1].log_probs for hidden, _ in seen])
    return log_normalize(every[torch.linspace(0, len(every) - 1, count).long()].double())


@torch.inference_mode()
def _scores(heads: Sequence[SoftmaxHead], log_truth: Float[Tensor, "B v"]) -> Json:
    log_p = torch.stack([head.log_probs(best_hidden(head, log_truth)) for head in heads])
    return {"size": len(heads)} | score_all(Rows(heads, log_p, log_truth), TOL)


def report(settings: Settings, results: dict[str, Json], command: str) -> Report:
    """A column for each number of members."""
    cells = list(results.values())
    columns = [(f"n = {k}", [c for c in cells if c["size"] == k]) for k in settings.sizes]
    several = [c for c in cells if c["size"] > 1]
    rows = sum(len(c["rules"]["logit-mean"]["kl"]) for c in columns[0][1])
    lines = lines_by(cells, lambda c: float(c["size"]))
    return Report(
        f"Trained heads, known truths: {rows} contexts of held-out text",
        command,
        [never_worse(several, "max-entropy", "logit-mean", TOL)],
        outcomes(columns),
        [Plot("members", "Trained heads: the premise holds", "members", "KL(p*‖·), nats", lines, count=True)],
    )
