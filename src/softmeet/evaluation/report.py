"""The figures of an evaluation, as ``softmeet evaluate`` prints them and writes them as JSON."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.evaluation.choices import BASELINES, FITTED, UNIFORM
from softmeet.evaluation.intervals import Clusters, clusters, paired
from softmeet.evaluation.scores import Evaluation, Scores

BINS = 10


def summary(
    found: Evaluation, best: str | None = None, *, baseline: str | None = None, pairs: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the figures of an evaluation as a dictionary for JSON, losses in nats per token, or per byte over bytes.

    ``members`` and ``rules`` hold, by name, each one's ``nll`` (mean loss), ``perplexity``, ``bits_per_byte``,
    ``top1`` (accuracy), ``calibration`` and ``against`` (its mean loss minus that of ``baseline``, with its 95 %
    interval). What was fitted by folds has the settings that were ``fitted`` on all of the text. Rules also have
    ``passes`` (reads of all heads per position), the numbers of ``fallbacks`` and of each of the ``statuses``, the
    share of positions ``gated``, ``gain_by_disagreement``, and, if it was measured, ``movement``
    (:meth:`Movement.figures`). Members over bytes have, per byte, ``dropped`` (the share of mass estimated),
    ``forward_steps`` (model calls) and ``tokens_run``. The other entries are ``vocabulary``, the counts of
    ``tokens``, ``bytes``, ``documents`` and ``clusters``, the mean ``disagreement`` of the members in nats, the mean
    share that each of the user's files ``claims``, and ``baseline``: the row of that name, else the single member of
    the lowest loss, with its own fitted temperature where temperatures are fitted. It is chosen on the text that it is
    compared on, so it is, if anything, too good.
    All pairs of the rows named in ``pairs`` are compared (:func:`all_pairs`).

    ``best_baseline``, the member or average of the lowest loss unless ``best`` names another, and every row's ``vs``,
    its difference from that, stand there for one version more.

    Raises:
        InvalidInputError: if there are fewer than two positions, or no row has a name that is given.
    """
    within = clusters(found.positions.document)
    bytes_, count = int(found.positions.sizes.sum()), len(found.positions)
    averages = [name for name in found.choices if name in (*UNIFORM, *BASELINES) or name.startswith(FITTED)]
    baselines = found.members | {name: found.choices[name] for name in averages}
    best = best or min(baselines, key=lambda name: baselines[name].mean)
    rows = {**found.members, **found.choices}
    baseline = baseline or best_member(found)
    require_row(baseline, rows)

    def figures(name: str, scores: Scores) -> dict[str, Any]:
        before = paired(scores.nats, baselines[best].nats, within).figures()
        against = paired(scores.nats, rows[baseline].nats, within).figures()
        own = {"fitted": found.fitted[name]} if name in found.fitted else {}
        return {
            "nll": scores.mean,
            "perplexity": math.exp(scores.mean) if scores.mean < 700 else math.inf,
            "bits_per_byte": scores.nats.sum().item() / math.log(2) / bytes_ if bytes_ else None,
            "top1": scores.hit.double().mean().item(),
            "calibration": calibration(scores),
            "against": {"baseline": baseline, **against},
            "vs": {"baseline": best, **before},
            **own,
        }

    rules = {}
    for name, scores in found.choices.items():
        rules[name] = {
            **figures(name, scores),
            "passes": scores.passes / count,
            "fallbacks": scores.fallbacks,
            "statuses": scores.statuses,
            "gated": scores.gated.double().sum().item() / count,
            "gain_by_disagreement": gain_by_disagreement(scores, rows[baseline], found.disagreement),
        }
        if len(scores.movement):
            rules[name]["movement"] = scores.moved().figures()
    return {
        "vocabulary": found.vocabulary,
        "tokens": count,
        "bytes": bytes_,
        "documents": len(found.positions.document.unique()),
        "clusters": {"kind": within.kind, "count": within.count},
        "members": {name: figures(name, scores) | _work(scores) for name, scores in found.members.items()},
        "rules": rules,
        "baseline": baseline,
        "best_baseline": best,
        "disagreement": found.disagreement.mean().item(),
        "claims": {name: own.mean().item() for name, own in found.claims.items()},
        **({"pairs": all_pairs({name: rows[name] for name in pairs}, within)} if pairs else {}),
    }


def best_member(found: Evaluation) -> str:
    """Return the name of the single member of the lowest loss, as it is or with the temperature that was fitted."""
    fitted = {name: found.choices[name] for member in found.members if (name := FITTED + member) in found.choices}
    among = {**found.members, **fitted}
    return min(among, key=lambda name: among[name].mean)


def require_row(name: str, rows: Collection[str]) -> None:
    """Raise InvalidInputError, which lists the names, if no row has this one."""
    if name not in rows:
        raise InvalidInputError(f"expected a row of the table, one of {', '.join(rows)}, got {name!r}")


def _work(scores: Scores) -> dict[str, Any]:
    """Return a byte member's share of mass estimated, model calls and tokens run in them, per byte; else {}."""
    names = ("dropped", "forward_steps", "tokens_run")
    return dict(zip(names, scores.work.mean(0).tolist(), strict=True)) if len(scores.work) else {}


def calibration(scores: Scores) -> dict[str, Any]:
    """Compare the most probable token's probability (its confidence) with how often it came (accuracy).

    Args:
        scores: a member's or a rule's scores at one position or more.

    Returns:
        A dict with three lists, ``confidence`` (the mean), ``accuracy`` and ``positions`` (their number), each with an
        entry for each of ten equal intervals of confidence that has positions, the lowest first; and ``error``, the
        expected calibration error: the mean over positions of their interval's |confidence - accuracy|.
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
    """Compute a rule's mean gain over a baseline, in nats, in bins of positions by members' disagreement.

    Args:
        ours: the rule's scores.
        baseline: the baseline's scores at the same positions.
        disagreement: :attr:`Evaluation.disagreement` of the same positions, in nats.
        bins: the number of bins; positions are sorted by disagreement and split into bins of equal size.

    Returns:
        For each bin, lowest disagreement first: its mean ``disagreement``, its mean ``gain`` (baseline's loss minus the
        rule's) and ``error``, one standard error of the gain that treats positions as independent (NaN in a bin of one
        position).
    """
    gain = baseline.nats - ours.nats
    found = []
    for rows in disagreement.argsort().tensor_split(min(bins, len(gain))):
        own = gain[rows]
        error = (own.std() / math.sqrt(len(own))).item() if len(own) > 1 else math.nan
        found.append({"disagreement": disagreement[rows].mean().item(), "gain": own.mean().item(), "error": error})
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's method: rejecting those of at most α errs anywhere with probability α at most.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics, 1979.

    Args:
        p: p-values; NaN, of a comparison that could not be made, stays and counts as none.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    known = sorted((k for k in range(len(p)) if not math.isnan(p[k])), key=p.__getitem__)
    found, least = list(p), 0.0
    for place, k in enumerate(known):
        least = max(least, min(1.0, (len(known) - place) * p[k]))
        found[k] = least
    return found


def all_pairs(rows: Mapping[str, Scores], within: Clusters) -> list[dict[str, Any]]:
    """Compare every two rows: the first one's mean loss minus the second's, in nats per token or byte.

    Returns:
        for each pair ``first``, ``second``, ``delta``, its interval ``ci95``, its p-value ``p`` and ``p_holm``, that of
        all pairs together.
    """
    pairs = list(combinations(rows, 2))
    differences = [paired(rows[one].nats, rows[other].nats, within) for one, other in pairs]
    adjusted = holm([own.p for own in differences])
    return [
        {"first": one, "second": other, **own.figures(), "p": own.p, "p_holm": p}
        for (one, other), own, p in zip(pairs, differences, adjusted, strict=True)
    ]
