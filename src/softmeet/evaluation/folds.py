"""Cross-validation by document: what is fitted on all folds but one is judged on that one, in turn."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.evaluation.average import Family
from softmeet.evaluation.candidates import DEFAULTS, Averages, Candidate, Fitter
from softmeet.evaluation.choices import FITTED
from softmeet.evaluation.intervals import Clusters
from softmeet.evaluation.layout import Layout
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.scores import Evaluation, Scores
from softmeet.evaluation.scoring import Average, Text
from softmeet.members.weighting import Adaptation, faded
from softmeet.rules.registry import DEFAULT
from softmeet.rules.values import POOLS

K = TypeVar("K", bound=Hashable)


def folds_of(within: Clusters, count: int) -> Int[Tensor, " N"]:
    """Deal clusters (documents, or blocks of text) out to folds in turn; return the fold of each position.

    Args:
        within: the clusters of N positions.
        count: the number of folds.

    Raises:
        InvalidInputError: if ``count`` is below 2, or there are fewer clusters.

    >>> folds_of(Clusters(torch.tensor([0, 0, 1, 2, 2, 3]), "documents"), 2)
    tensor([0, 0, 1, 0, 0, 1])
    """
    if count < 2:
        raise InvalidInputError(f"expected at least 2 folds, got {count}")
    if within.count < count:
        raise InvalidInputError(
            f"expected text enough for {count} folds, got {within.count} {within.kind}: give more text, or fewer folds"
        )
    return within.of % count


def best_elsewhere(losses: Mapping[K, Float[Tensor, " N"]], fold: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the losses of whichever candidate is best on the other folds, at each position.

    This is what choosing the best candidate by a text costs on documents that the choice was not made by.

    Args:
        losses: of each candidate, in nats, (N,).
        fold: of each position, (N,), int64.

    >>> best_elsewhere({"a": torch.tensor([0.0, 9.0]), "b": torch.tensor([1.0, 1.0])}, torch.tensor([0, 1]))
    tensor([1., 9.])
    """
    table = torch.stack(list(losses.values()))
    found = torch.empty_like(table[0])
    for k in fold.unique().tolist():
        here = fold == k
        found[here] = table[table[:, ~here].mean(-1).argmin(), here]
    return found


def joined(found: Sequence[Evaluation], positions: Positions, fold: Int[Tensor, " N"]) -> Evaluation:
    """Join evaluations of folds, the first fold first, to one of the whole text.

    Args:
        found: an evaluation at the positions of each fold.
        positions: those of the whole text.
        fold: of each position, (N,), int64.
    """
    # Positions in the order in which folds have them; the inverse puts scores back in the text's order.
    back = fold.argsort(stable=True).argsort()

    def one(parts: Sequence[Scores]) -> Scores:
        whole = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Scores)}
        return Scores(**{name: values[back] if len(values) == len(back) else values for name, values in whole.items()})

    return replace(
        found[0],
        positions=positions,
        members={name: one([part.members[name] for part in found]) for name in found[0].members},
        choices={name: one([part.choices[name] for part in found]) for name in found[0].choices},
        disagreement=torch.cat([part.disagreement for part in found])[back],
    )


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


def tempered_meets(
    fitter: Fitter,
    positions: Positions,
    fold: Int[Tensor, " N"],
    whole: Sequence[Candidate],
    refits: Sequence[Sequence[Candidate]],
) -> tuple[list[list[Candidate]], dict[str, Scores]]:
    """Fit a temperature for ``meet`` at each of ``fitter.options.trusts``, and score it on the folds.

    Args:
        fitter: supplies the members, the trusts and the engine.
        positions: those that are judged, with hidden states.
        fold: of each position, numbered from 0 without gaps.
        whole: the candidates that were fitted on the whole text, averages among them.
        refits: those that were fitted without each fold.

    Returns:
        (the candidates fitted on all positions, then those without each fold; their scores by label).
    """
    trusts, n = fitter.options.trusts, len(fitter.ensemble.names)
    own = fitter.ensemble.model.settings.ungated()
    chosen = [_settings(some, trusts, n) for some in (whole, *refits)]
    solved = [[own.changed(**DEFAULTS | settings) for settings in some] for some in chosen[1:]]
    text = Text(fitter.ensemble.model, positions, fitter.engine, fold, cache=fitter.cache, solved=solved, stage=DEFAULT)
    fitted = list[list[Candidate]]()
    for without, settings in zip((None, *range(len(refits))), chosen, strict=True):
        fits = Averages(fitter, text, without, {})
        fitted.append([])
        for i, (trust, named) in enumerate(zip(trusts, settings, strict=True)):
            name, family = f"{DEFAULT}:trust={trust:g}", Family(Layout(1), members=(i,))
            fitted[-1].append(fits.fit(name, family, baseline=False, cheaper=1, **named))
    averages = [{c.label: c.average for c in some if c.average is not None} for some in fitted[1:]]
    advance = fitter.reads(f"scoring {DEFAULT}", len(positions))
    return fitted, dict(text.scores([f"{trust:g}" for trust in trusts], averages, advance).choices)


def _settings(candidates: Sequence[Candidate], trusts: Sequence[float], n: int) -> list[dict[str, Any]]:
    """Return settings of ``meet`` at each trust, from the better of the two averages that can be its pool."""
    best = min((own for own in candidates if own.name in POOLS), key=lambda own: own.fit_nll)
    pool = {name: best.settings[name] for name in ("pool", "weights", "free_weights")}
    return [{**pool, "rule": DEFAULT, "trust": [trust] * n} for trust in trusts]
