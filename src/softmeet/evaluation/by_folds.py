"""An evaluation of rules beside members and averages at their best, fitted by folds of the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from softmeet.ensemble import Ensemble
from softmeet.evaluation.average import Family
from softmeet.evaluation.candidates import Begin, Options, sample_size
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.fit import fit
from softmeet.evaluation.layout import Layout, Values
from softmeet.evaluation.perplexity import evaluate_positions, settings_of
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.scores import Evaluation
from softmeet.evaluation.scoring import Average
from softmeet.rules.pools import PowerMean
from softmeet.rules.settings import Settings, rule_of
from softmeet.rules.values import POOLS
from softmeet.scaling.base import Engine


def evaluate_by_folds(
    ensemble: Ensemble,
    positions: Positions,
    choices: Sequence[RuleChoice],
    folds: int,
    begin: Begin = lambda description, done, total: lambda count: None,
    *,
    adaptive: bool = False,
    engine: Engine | None = None,
    cache: PieceCache | None = None,
) -> Evaluation:
    """Score members, choices, and members and averages at their best, each on documents that it was not fitted on.

    What is fitted is named ``fitted NAME``; averages with weights that adapt to a document ``fitted adaptive NAME``.
    Plain averages among the choices are scored with the fitted ones, from log-probabilities that are computed once;
    other rules as :func:`evaluate_positions` scores them.

    Args:
        ensemble: supplies the heads and the settings that choices change.
        positions: the text's positions, with hidden states.
        choices: rules, each with changes to the ensemble's settings.
        folds: the number of folds that documents are dealt out to.
        begin: as of :func:`softmeet.evaluation.fit.fit`.
        adaptive: whether to score averages with weights that adapt to a document, too, which nobody can generate with.
        engine: runs the pieces; None for this process.
        cache: keeps evaluations and scores, and supplies those of an earlier run.

    Raises:
        InvalidInputError, UnsupportedHeadError: as in :func:`evaluate_positions`; or if there are fewer documents (or
            blocks) than folds.
    """
    plain = _plain_averages(settings_of(ensemble, choices), choices, len(ensemble.names))
    options = Options(folds=folds, meets=False, adaptive=adaptive, fit_positions=sample_size(ensemble), beside=plain)
    fitted = fit(ensemble, positions, options, begin, engine=engine, cache=cache)
    found = replace(fitted.test, fitted={own.label: _with_order(own.settings) for own in fitted.candidates})
    scored, others = dict(found.choices), [choice for choice in choices if choice.name not in plain]
    if others:
        advance = begin(f"evaluating, in {ensemble.model.config.vocabulary}", 0, len(positions))
        more = evaluate_positions(ensemble, positions, others, engine=engine, cache=cache, on_progress=advance)
        scored |= more.choices
    return replace(found, choices={choice.name: scored[choice.name] for choice in choices} | scored)


def _with_order(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return fitted settings, with the order of a power mean by itself."""
    rule = rule_of(settings["rule"])
    return {**settings, **({"order": rule.order} if isinstance(rule, PowerMean) else {})}


def _plain_averages(settings: Mapping[str, Settings], choices: Sequence[RuleChoice], n: int) -> dict[str, Average]:
    """Return, by name, the logit means and probability means among some choices, without a gate or other options."""
    found = dict[str, Average]()
    for choice in choices:
        own = settings[choice.name].for_members(n).plain()
        if own["rule"] in POOLS and own["gate"] is None and not choice.prompt:
            family = Family(Layout(n), float(POOLS.index(own["rule"])))
            found[choice.name] = family, Values(tuple(own["weights"]), own["rule_temperature"])
    return found
