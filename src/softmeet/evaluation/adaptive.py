"""Fitted averages whose weights adapt to a document as it goes, judged by folds beside those of fixed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.evaluation.candidates import Candidate
from softmeet.evaluation.choices import FITTED
from softmeet.evaluation.scores import Evaluation, Scores
from softmeet.evaluation.scoring import Average, Text
from softmeet.members.weighting import Adaptation, faded

# What is tried: how much a token counts beside the one after it, and temperatures in nats.
_DECAYS, _TEMPERATURES = (0.8, 0.9, 0.95, 0.98, 0.99), (0.1, 0.2, 0.4, 0.8, 1.6)


def adaptive_averages(
    text: Text, found: Evaluation, fold: Int[Tensor, " N"], refits: Sequence[Sequence[Candidate]],
    on_progress: Callable[[int], None] = lambda positions: None,
) -> dict[str, Scores]:  # fmt: skip
    """Score each fitted average with weights that begin at its own in every document, and adapt.

    The adaptation is chosen on the other folds, by the loss of the probability mean, for which the targets'
    probabilities suffice.

    Args:
        text: all positions, in folds.
        found: scores of the members there.
        fold: of each position, (N,), int64.
        refits: the candidates that were fitted without each fold.
        on_progress: called with the number of positions that are done.

    Returns:
        The scores by label, ``fitted adaptive NAME``.
    """
    nats, document = torch.stack([scores.nats for scores in found.members.values()]), found.positions.document
    past = {decay: faded(nats, document, decay) for decay in _DECAYS}
    averages: list[dict[str, Average]] = [{} for _ in refits]
    weights = dict[str, Tensor]()
    for k, some in enumerate(refits):
        for own in some:
            if own.average is None or own.average[0].members is not None or own.average[0].layout.signed:
                continue
            label = f"{FITTED}adaptive {own.name}"
            averages[k][label] = own.average
            here = weights.setdefault(label, torch.empty_like(nats))
            prior = torch.tensor(own.average[1].weights, dtype=nats.dtype)
            chosen = _chosen(past, prior / prior.sum(), nats, fold != k)
            here[:, fold == k] = _weights(past, prior / prior.sum(), chosen)[:, fold == k]
    return text.weighted_scores(averages, weights, "adaptive", on_progress)


def _weights(past: Mapping[float, Tensor], prior: Tensor, how: Adaptation) -> Float[Tensor, "n N"]:
    return (prior.log()[:, None] - past[how.decay] / how.temperature).softmax(0)


def _chosen(past: Mapping[float, Tensor], prior: Tensor, nats: Tensor, elsewhere: Tensor) -> Adaptation:
    """Return the adaptation of the least loss of the probability mean at the positions ``elsewhere``."""

    def loss(how: Adaptation) -> float:
        own = _weights(past, prior, how)[:, elsewhere].log() - nats[:, elsewhere]
        return -own.logsumexp(0).mean().item()

    return min((Adaptation(decay, t) for decay in past for t in _TEMPERATURES), key=loss)
