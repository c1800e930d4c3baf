"""An evaluation in figures: what ``softmeet evaluate`` prints and writes as JSON."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.evaluation.choices import BASELINES, UNIFORM
from softmeet.evaluation.intervals import clusters, paired
from softmeet.evaluation.perplexity import Evaluation, Scores
from softmeet.rules.movement import Movement

BINS = 10


def summary(found: Evaluation) -> dict[str, Any]:
    """Return the figures of an evaluation, in nats per token (per byte, over bytes) unless a name says otherwise.

    The baseline of every difference is the best of the single members and the averages on this very text, so it is, if
    anything, too good.
    """
    within = clusters(found.positions.document)
    bytes_, count = int(found.positions.sizes.sum()), len(found.positions)
    averages = {name: found.choices[name] for name in (*UNIFORM, *BASELINES) if name in found.choices}
    baselines = found.members | averages
    best = min(baselines, key=lambda name: baselines[name].mean)
    rules = {}
    for name, scores in found.choices.items():
        rules[name] = {
            **_figures(scores, bytes_),
            "passes": scores.passes / count,
            "fallbacks": scores.fallbacks,
            "unconverged": scores.unconverged,
            "gated": scores.gated.double().mean().item(),
            "vs": {"baseline": best, **paired(scores.nats, baselines[best].nats, within).figures()},
            "gain_by_disagreement": gain_by_disagreement(scores, baselines[best], found.disagreement),
        }
        if len(scores.movement):
            rules[name]["movement"] = Movement.stacked(scores.movement).figures()
    return {
        "vocabulary": found.vocabulary,
        "tokens": count,
        "bytes": bytes_,
        "documents": len(found.positions.document.unique()),
        "clusters": {"kind": within.kind, "count": within.count},
        "members": {name: _figures(scores, bytes_) | _work(scores) for name, scores in found.members.items()},
        "rules": rules,
        "best_baseline": best,
        "disagreement": found.disagreement.mean().item(),
    }


def _figures(scores: Scores, bytes_: int) -> dict[str, Any]:
    return {
        "nll": scores.mean,
        "perplexity": math.exp(scores.mean) if scores.mean < 700 else math.inf,
        "bits_per_byte": scores.nats.sum().item() / math.log(2) / bytes_ if bytes_ else None,
        "top1": scores.hit.double().mean().item(),
        "calibration": calibration(scores),
    }


def _work(scores: Scores) -> dict[str, Any]:
    """Return, over bytes, a byte: the mass that was estimated, calls of the model, and tokens run in them."""
    names = ("dropped", "forward_steps", "tokens_run")
    return dict(zip(names, scores.work.mean(0).tolist(), strict=True)) if len(scores.work) else {}


def calibration(scores: Scores) -> dict[str, Any]:
    """Compute how often the most probable token comes, in ten bins of its probability, and the calibration error.

    ``error`` is the expected calibration error: the mean over bins, by their size, of |confidence - accuracy|.
    """
    place = (scores.confidence * BINS).long().clamp_max(BINS - 1)
    size = torch.bincount(place, minlength=BINS).double()
    claimed = torch.bincount(place, scores.confidence, BINS)
    right = torch.bincount(place, scores.hit.double(), BINS)
    full = size > 0
    return {
        "error": ((claimed - right).abs().sum() / size.sum()).item(),
        "confidence": (claimed[full] / size[full]).tolist(),
        "accuracy": (right[full] / size[full]).tolist(),
        "positions": size[full].long().tolist(),
    }


def gain_by_disagreement(
    ours: Scores, baseline: Scores, disagreement: Float[Tensor, " N"], bins: int = BINS
) -> list[dict[str, float]]:
    """Compute what a rule gains over a baseline where members disagree little, and where they disagree much, in nats.

    Positions are sorted by disagreement into bins of equal size; ``error`` is one standard error over positions.
    """
    gain = baseline.nats - ours.nats
    found = []
    for rows in disagreement.argsort().tensor_split(min(bins, len(gain))):
        own = gain[rows]
        error = (own.std() / math.sqrt(len(own))).item() if len(own) > 1 else math.nan
        found.append({"disagreement": disagreement[rows].mean().item(), "gain": own.mean().item(), "error": error})
    return found
