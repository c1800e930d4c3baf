"""``fit``: from members and a text to an ensemble to save, a fitted baseline unless a rule is shown to be better.

1. The text is split by document into three parts: to fit on, to choose by, to judge by. With ``folds`` every document
   serves all three ends in turn: candidates are fitted anew without each fold, and judged there.
2. Each single member gets a temperature, each average weights and a temperature, and the power mean an order too, by
   Fisher scoring on the first part; with ``signed_weights`` a second logit mean gets weights that may be below zero.
3. Starting from each fitted average (from the better one only, with minibatches), with trusts that the premise test
   suggests, weights, temperature and trusts of ``meet`` are fitted together on a subset of the first part, by gradients
   through the solver.
4. The second part chooses the best candidate and the best baseline (a member or an average). The third compares these
   two once: unless the 95 % interval of their paired difference shows the candidate to be better, the baseline is
   saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.evaluation.candidates import DEFAULTS, Begin, Candidate, Fitter
from softmeet.evaluation.candidates import Options as Options
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.folds import adaptive_averages, best_elsewhere, folds_of, joined, tempered_meets
from softmeet.evaluation.intervals import PARTS, Difference, SplitPart, clusters, paired, split
from softmeet.evaluation.perplexity import distinct_names, evaluate_positions
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.premise import Premise
from softmeet.evaluation.scores import Evaluation
from softmeet.evaluation.scoring import Text
from softmeet.rules.settings import Settings
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine


@dataclass
class Fitted:
    """The result of a fit: the candidates, and how one of them was chosen.

    Attributes:
        candidates: all candidates, baselines among them, in the order in which they were made.
        chosen: the one to save, ``rival`` or ``best_baseline``.
        rival: the candidate of the lowest loss on the second part, to choose by.
        best_baseline: the baseline (single member or average) of the lowest loss on the second part.
        difference: the loss of ``rival`` minus that of ``best_baseline`` on the third part, to judge by, with its 95 %
            interval; 0 if they are the same.
        select, test: the scores of every candidate on the second and on the third part.
        parts: the three parts of the text, named ``fit``, ``select`` and ``test``; with folds each is the whole text,
            or, if there is a limit to judging, what of it is judged.
        premise: a result of the premise test for each member, in order; empty for a single member, over bytes, or
            without ``meet``.
        fold: the fold of each position that is judged, (N,), int64; None without folds. Scores at a position are then
            those of candidates fitted without its fold.
        refits: with folds, the candidates that were fitted without each of them.
    """

    candidates: list[Candidate]
    chosen: Candidate
    rival: Candidate
    best_baseline: Candidate
    difference: Difference
    select: Evaluation
    test: Evaluation
    parts: dict[str, SplitPart]
    premise: list[Premise]
    fold: Int[Tensor, " N"] | None = None
    refits: list[list[Candidate]] = field(default_factory=list)

    @property
    def fell_back(self) -> bool:
        """Whether ``best_baseline`` was chosen although ``rival`` was better on the second part.

        So it is if the interval of ``difference``, on the third part, is not all below 0.
        """
        return self.rival is not self.chosen


def fit(
    ensemble: Ensemble,
    positions: Positions,
    options: Options | None = None,
    begin: Begin = lambda description, done, total: lambda count: None,
    *,
    engine: Engine | None = None,
    cache: PieceCache | None = None,
) -> Fitted:
    """Fit every candidate on one part of a text, choose by the second, and judge on the third.

    Args:
        ensemble: the members; its own rule and settings are ignored, and are not saved.
        positions: the text's positions, with hidden states, as :func:`observe_text` or :meth:`Trace.read` returns them.
        options: settings of the fit; None for the defaults.
        begin: called in this process as each stage begins (the fit of one candidate, or the scoring of one part), with
            (a description, 0, the number of positions to work on, or None if it is unknown); returns a function that is
            then called with the number of positions of each finished piece of the stage.
        engine: evaluates losses and scores; None for this process.
        cache: keeps evaluations and scores, and supplies those of an earlier run of the same fit; its ``settings`` have
            to name all that the fit depends on. None to keep nothing.

    Raises:
        InvalidInputError: if the text is too short to split, or a rule in ``options.rules`` is unknown or has a bad
            value.
        UnsupportedHeadError: if such a rule needs softmax matrices, as ``meet`` does, and the ensemble is over bytes.
    """
    options = options or Options()
    for rule in options.rules:
        ensemble.model.require(Settings.of({"rule": rule}))
    fitter = Fitter(ensemble, options, begin, engine or LocalEngine(), cache or PieceCache())
    if options.folds is not None:
        return _by_folds(fitter, positions, options.folds)
    parts = split(positions)
    parts["select"] = parts["select"].spread(options.select_positions)
    parts["test"] = parts["test"].spread(options.judge_positions)
    text = Text(ensemble.model, parts["fit"].positions, fitter.engine, sample=options.fit_positions, cache=fitter.cache)
    candidates, premise = fitter.candidates(parts["fit"], text)
    select, test = (_scored(fitter, name, parts[name].positions, candidates) for name in ("select", "test"))
    rival, best = _two_best(candidates, select)
    ours, theirs = (test.choices[candidate.label].nats for candidate in (rival, best))
    difference = paired(ours, theirs, parts["test"].within)
    chosen = rival if rival is best or difference.high < 0 else best
    return Fitted(candidates, chosen, rival, best, difference, select, test, parts, premise)


def _by_folds(fitter: Fitter, positions: Positions, count: int) -> Fitted:
    """Fit every candidate on the whole text, and without each of ``count`` folds; choose and judge on those."""
    options, whole = fitter.options, SplitPart(positions, clusters(positions.document))
    fold = folds_of(whole.within, count)
    text = Text(fitter.ensemble.model, positions, fitter.engine, fold, sample=options.fit_positions, cache=fitter.cache)
    candidates, premise = fitter.candidates(whole, text)
    refits = [fitter.candidates(whole.take(fold != k), text, k, candidates)[0] for k in range(count)]
    judged = whole.spread_rows(options.judge_positions)
    found, part = _scored_by_folds(fitter, whole, text, fold, refits, judged), whole.take(judged)
    fold = fold[judged]
    if options.trusts:
        more, scores = tempered_meets(fitter, part.positions, fold, candidates, refits)
        candidates, refits = [*candidates, *more[0]], [[*a, *b] for a, b in zip(refits, more[1:], strict=True)]
        found = replace(found, choices=found.choices | scores)
    rival, best = _two_best(candidates, found)

    def chosen_elsewhere(some: Sequence[Candidate]) -> Float[Tensor, " N"]:
        return best_elsewhere({candidate.name: found.choices[candidate.label].nats for candidate in some}, fold)

    # The choice, too, is judged on documents that it was not made by.
    baselines = [candidate for candidate in candidates if candidate.baseline]
    difference = paired(chosen_elsewhere(candidates), chosen_elsewhere(baselines), part.within)
    chosen = rival if rival is best or difference.high < 0 else best
    parts = dict(zip(PARTS, (whole, part, part), strict=True))
    return Fitted(candidates, chosen, rival, best, difference, found, found, parts, premise, fold, refits)


def _scored_by_folds(
    fitter: Fitter, whole: SplitPart, text: Text, fold: Tensor, refits: Sequence[Sequence[Candidate]], rows: Tensor
) -> Evaluation:
    """Score candidates that were fitted without each fold at the positions ``rows`` of that fold.

    Averages are scored from the members' log-probabilities in ``text``, all other rules as :func:`evaluate_positions`
    does.
    """
    beside = fitter.options.beside
    averages = [{**beside, **{own.label: own.average for own in some if own.average is not None}} for some in refits]
    advance = fitter.reads("scoring averages", len(whole.positions))
    found = text.scores(distinct_names(fitter.ensemble), averages, advance)
    if fitter.options.adaptive:
        advance = fitter.reads("scoring averages of adaptive weights", len(whole.positions))
        found = replace(found, choices=found.choices | adaptive_averages(text, found, fold, refits, advance))
    found = found.take(rows)
    if not (rules := [[own for own in some if own.average is None] for some in refits])[0]:
        return found
    at = whole.positions.take(rows)
    scored = [_scored(fitter, f"fold {k + 1}", at.take(fold[rows] == k), some) for k, some in enumerate(rules)]
    return replace(found, choices=found.choices | joined(scored, at, fold[rows]).choices)


def _two_best(candidates: Sequence[Candidate], scored: Evaluation) -> tuple[Candidate, Candidate]:
    """Return the candidate, and the baseline, of the lowest loss in an evaluation."""

    def loss(candidate: Candidate) -> float:
        return scored.choices[candidate.label].mean

    return min(candidates, key=loss), min((own for own in candidates if own.baseline), key=loss)


def _scored(fitter: Fitter, name: str, positions: Positions, candidates: Sequence[Candidate]) -> Evaluation:
    """Score candidates on a part."""
    advance = fitter.reads(f"scoring the {name} part", len(positions))
    choices = [RuleChoice(candidate.label, {**DEFAULTS, **candidate.settings}) for candidate in candidates]
    where: dict[str, Any] = {"engine": fitter.engine, "cache": fitter.cache, "stage": name}
    return evaluate_positions(fitter.ensemble, positions, choices, **where, on_progress=advance)
