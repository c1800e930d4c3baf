"""What weights that adapt to a text gain: python benchmarks/adaptation.py -m A -m B -t 'texts/*.txt'

The probability mean of every pair and every three members, with weights fitted by folds of the documents, is set
against the same with weights that adapt (``weighting.py``): all along a document, or to its first bytes alone, which
is all that generation could adapt to, since what an ensemble wrote itself says nothing of which member is right. The
adaptation is chosen on the other folds. Differences are in nats a byte (over tokens: a token), 95 %, by document.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor

from evidence import observed
from report import show
from softmeet import Ensemble
from softmeet.evaluation.documents import read_documents
from softmeet.evaluation.folds import folds_of
from softmeet.evaluation.intervals import clusters, paired
from softmeet.members.member import short
from softmeet.members.weighting import Adaptation
from softmeet.rules.values import POOLS

FOLDS = 5
TRIED = tuple(Adaptation(decay, t) for decay in (0.8, 0.9, 0.95, 0.98, 0.99) for t in (0.1, 0.2, 0.4, 0.8, 1.6))


@torch.inference_mode()
def losses(ensemble: Ensemble, positions: Any) -> Float[Tensor, "n N"]:
    """The members' losses at every position, in nats."""
    found = list[Tensor]()
    for chunk in positions.chunks(64):
        log_p, _ = ensemble.model.combiner.own_log_probs(chunk.hidden)
        found.append(-log_p.gather(-1, chunk.targets.expand(len(log_p), -1)[..., None]).squeeze(-1).double())
    return torch.cat(found, -1)


def mixture(nats: Float[Tensor, "n N"], weights: Float[Tensor, "n _"]) -> Float[Tensor, " N"]:
    """Losses of a probability mean."""
    return -(weights.log() - nats).logsumexp(0)


def fitted(nats: Float[Tensor, "n N"]) -> Float[Tensor, " n"]:
    """The weights of least loss, by expectation maximisation."""
    weights = torch.full((len(nats),), 1 / len(nats), dtype=torch.float64)
    for _ in range(200):
        weights = (weights.log()[:, None] - nats).softmax(0).mean(1).clamp_min(1e-6)
        weights /= weights.sum()
    return weights


def frozen(weights: Float[Tensor, "n N"], document: Int[Tensor, " N"], after: int) -> Float[Tensor, "n N"]:
    """Weights that stay what they are after so many positions of a document."""
    found = weights.clone()
    for k in document.unique().tolist():
        own = (document == k).nonzero().squeeze(-1)
        if len(own) > after:
            found[:, own[after:]] = weights[:, own[after], None]
    return found


def compared(nats: Float[Tensor, "n N"], document: Int[Tensor, " N"], fold: Tensor, later: Tensor, after: int) -> Any:
    """Losses of three kinds of weights: fixed, adapted all along, and adapted to ``after`` positions of a document."""
    found = {kind: torch.empty_like(nats[0]) for kind in ("fixed", "going", "begun")}
    for k in fold.unique().tolist():
        here, elsewhere, prior = fold == k, fold != k, fitted(nats[:, fold != k])
        found["fixed"][here] = mixture(nats, prior[:, None])[here]
        going = [how.weights(prior.tolist(), nats, document) for how in TRIED]
        begun = [frozen(own, document, after) for own in going]
        for kind, weights, at in (("going", going, elsewhere), ("begun", begun, elsewhere & later)):
            tried = torch.stack([mixture(nats, own) for own in weights])
            found[kind][here] = tried[tried[:, at].mean(-1).argmin(), here]
    return found


def main(
    members: Annotated[list[str], typer.Option("--member", "-m", help="Hub ids, folders or GGUF files.")],
    text: Annotated[list[str], typer.Option("--text", "-t", help="Files or patterns; each is judged by itself.")],
    each: Annotated[int | None, typer.Option(help="The most predictions in a document.")] = None,
    after: Annotated[int, typer.Option(help="The predictions of a document's beginning.")] = 300,
    kept: Annotated[Path | None, typer.Option(help="A folder for what members made of the texts.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="JSON of all figures.")] = None,
) -> None:
    """Print a table."""
    ensemble, rows = Ensemble.from_pretrained(members, POOLS[0]), list[dict[str, Any]]()
    names = [short(name) for name in ensemble.names]
    for pattern in text:
        positions = observed(ensemble, read_documents([pattern]), pattern, each, kept, bos=False)
        every, document, within = losses(ensemble, positions), positions.document, clusters(positions.document)
        fold = folds_of(within, FOLDS)
        place = torch.cat([torch.arange(int(n)) for n in document.unique_consecutive(return_counts=True)[1]])
        later = place >= after
        for some in itertools.chain.from_iterable(itertools.combinations(range(len(names)), k) for k in (2, 3)):
            found, behind = compared(every[list(some)], document, fold, later, after), clusters(document[later])
            rows.append(
                {
                    "text": pattern,
                    "members": " + ".join(names[i] for i in some),
                    "fixed": found["fixed"].mean().item(),
                    "as it goes": str(paired(found["going"], found["fixed"], within)),
                    f"adapted to {after}": str(paired(found["begun"][later], found["fixed"][later], behind)),
                }
            )
    show("Weights that adapt, against fixed fitted ones", rows, out)


if __name__ == "__main__":
    typer.run(main)
