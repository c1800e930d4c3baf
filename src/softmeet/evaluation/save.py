"""Save a fitted ensemble as a folder that loads like any ensemble, with the fit's figures and a description of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from softmeet.ensemble import Ensemble
from softmeet.evaluation.files import replace_together, require_ensemble_folder, write_json
from softmeet.evaluation.fit import Fitted
from softmeet.evaluation.intervals import Difference, paired
from softmeet.evaluation.own_files import Worth
from softmeet.evaluation.perplexity import distinct_names
from softmeet.hf.checkpoint import relative
from softmeet.hf.configuration import EnsembleConfig
from softmeet.rules.settings import rule_of
from softmeet.rules.values import POOLS

# Fields of the configuration that depend on the members alone, and stay.
_KEPT = (
    "vocabulary", "prune", "prefixes", "files", "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
_CARD = """
## How it was chosen

{how} Differences are against the best fitted baseline, `{best}`; 95 %, paired, by {test[kind]}; negative is better.

| candidate | nats/{unit} | against the best baseline | weights | trust | temperature |
|---|---|---|---|---|---|
{rows}

**{verdict}**{caution}

All figures are in `fit.json`.
"""
_PARTS = (
    "Fitted on {fit[tokens]:,} {vocabulary}, chosen on {select[tokens]:,}, judged once on {test[tokens]:,}, in "
    "{fit[clusters]}, {select[clusters]} and {test[clusters]} {test[kind]}."
)
_FOLDS = (
    "Fitted on {fit[tokens]:,} {vocabulary} in {fit[clusters]} {fit[kind]}. Figures are of fits without one of {folds} "
    "folds, at {test[tokens]:,} {vocabulary} of that fold, in turn."
)
# From fewer tokens, fitted values may be chance: a temperature of 0.3 was once found from 35.
_ENOUGH = 1000
_CLUSTERS = 6


def figures(fitted: Fitted) -> dict[str, Any]:
    """Return a fit's figures as a dictionary, for ``fit.json`` and ``softmeet fit --json``.

    Losses (``nll``) are in nats per token, or per byte over bytes. A difference is ``delta``, negative if the candidate
    is better than the best baseline, with ``ci95``, the ends of its 95 % interval.

    ``chosen`` (the rule), ``candidate`` (its name), ``weights``, ``trust``, ``temperature`` and ``pool`` are of the
    chosen candidate. ``test`` has its loss on the part to judge by, and its difference there from the best baseline.
    ``files`` has the bits a byte there ``alone`` and ``beside`` the files, with ``gain`` and its 95 % ``interval``, or
    is None without files. ``rival`` has the difference there of the candidate that was best on the part to choose by,
    and ``fell_back`` says whether the best baseline was chosen in its place. ``candidates`` has settings, losses and
    differences of all, ``caution`` is a sentence if the text was short, else empty. ``members`` has the unfitted
    members' losses on the part to judge by, ``premise`` the results of the premise test, ``splits`` for each of the
    three parts the numbers of ``tokens`` and ``clusters``, the ``kind`` of cluster, and the names of the ``documents``;
    ``folds`` is 0, or the number of folds that take the place of three parts.
    """
    test, chosen, best = fitted.test, fitted.chosen, fitted.best_baseline
    worth = Worth.of(test.positions, test.choices[chosen.label].nats, fitted.parts["test"].within)
    rows = {}
    for candidate in fitted.candidates:
        scores = test.choices[candidate.label]
        rows[candidate.name] = {
            **candidate.settings,
            "baseline": candidate.baseline,
            "fit_nll": candidate.fit_nll,
            "evaluations": candidate.evaluations,
            "select_nll": fitted.select.choices[candidate.label].mean,
            "test_nll": scores.mean,
            **paired(scores.nats, test.choices[best.label].nats, fitted.parts["test"].within).figures(),
        }
    return {
        "vocabulary": test.vocabulary,
        "chosen": chosen.settings["rule"],
        "candidate": chosen.name,
        "weights": chosen.settings["weights"],
        "trust": chosen.settings["trust"],
        "temperature": chosen.settings["rule_temperature"],
        "pool": chosen.settings.get("pool", POOLS[0]),
        "test": {
            "nll": test.choices[chosen.label].mean,
            "best_baseline": best.name,
            **{key: rows[chosen.name][key] for key in ("delta", "ci95")},
        },
        "files": worth and worth.figures(),
        "fell_back": fitted.fell_back,
        "rival": {"candidate": fitted.rival.name, **fitted.difference.figures()},
        "folds": len(fitted.refits),
        "caution": _caution(len(fitted.parts["fit"].positions), fitted.parts["test"].within.count, test.vocabulary),
        "members": {name: {"nll": scores.mean} for name, scores in test.members.items()},
        "premise": [asdict(p) | {"verdict": p.verdict} for p in fitted.premise],
        "splits": {
            name: {
                "tokens": len(part.positions),
                "clusters": part.within.count,
                "kind": part.within.kind,
                "documents": [part.positions.names[k] for k in part.positions.document.unique().tolist()],
            }
            for name, part in fitted.parts.items()
        },
        "candidates": rows,
    }


def _caution(fitted_on: int, clusters: int, vocabulary: str) -> str:
    """Return a sentence that warns of a text too short to fit on or to judge by; an empty one if it was long enough."""
    if fitted_on >= _ENOUGH:
        few = f"An interval from {clusters} documents or blocks is rough: give more of them."
        return few if clusters < _CLUSTERS else ""
    return (
        f"Fitted on {fitted_on:,} {vocabulary} only: weights, temperature and trusts may be those of chance. Give a "
        f"text that leaves {_ENOUGH:,} or more to fit on (a third of it)."
    )


def verdict(facts: dict[str, Any]) -> str:
    """Return a sentence that says which candidate was chosen and why, from ``facts``, as :func:`figures` returns it."""
    best, rival = facts["test"]["best_baseline"], facts["rival"]["candidate"]
    low, high = (f"{x:+.4f}" for x in facts["rival"]["ci95"])
    difference = f"{facts['rival']['delta']:+.4f} nats"
    chosen_on = "over all folds" if facts["folds"] else "on the part for choosing"
    if facts["fell_back"]:
        judged_on = "chosen without each fold, on that fold," if facts["folds"] else "on the part for judging"
        return (
            f"Falls back to {best}: {rival} was best {chosen_on}, but {judged_on} its "
            f"difference of {difference} has the interval [{low}, {high}], which does not exclude zero in its favour."
        )
    if facts["candidate"] == best:
        return f"Uses {best}: no rule did better {chosen_on}."
    return f"Uses {rival}: {difference} a {_unit(facts)} against {best} [{low}, {high}]."


def save(ensemble: Ensemble, fitted: Fitted, folder: str | Path, says: str | None = None) -> dict[str, Any]:
    """Write the chosen ensemble, its README and ``fit.json`` to a folder; ``ensemble`` itself gets the chosen settings.

    Args:
        ensemble: the ensemble that was fitted; its configuration is replaced.
        fitted: the result of :func:`softmeet.evaluation.fit.fit` for this ensemble.
        folder: made if there is none; an ensemble in it is replaced.
        says: why this one was chosen, for the README; None for what :func:`verdict` says.

    Returns:
        The figures of the fit, as in ``fit.json``.

    Raises:
        InvalidInputError: if the folder holds files without an ensemble's ``config.json``; nothing is written then.
        TraceError: if the disk is full; an ensemble that was there stays.
    """
    require_ensemble_folder(Path(folder))
    facts = figures(fitted)
    before = ensemble.model.config
    kept: dict[str, Any] = {key: getattr(before, key) for key in _KEPT if hasattr(before, key)}
    ensemble.model.config = EnsembleConfig(ensemble.names, **fitted.chosen.settings, **kept)
    with replace_together(Path(folder)) as new:
        ensemble.save_pretrained(new)
        card = ModelCard.load(new / "README.md")
        card.data.model_name, card.data.eval_results = Path(folder).resolve().name, _results(facts)
        names = zip(distinct_names(ensemble), ensemble.names, relative(ensemble.names, new), strict=True)
        card.text += _card(
            says or verdict(facts), _renamed(facts, {own: own.replace(plain, saved) for own, plain, saved in names})
        )
        card.save(new / "README.md")
        write_json(new / "fit.json", facts)
    return facts


def _renamed(facts: dict[str, Any], saved: dict[str, str]) -> dict[str, Any]:
    """Return the figures with the saved names of members, relative to the folder, in place of this machine's paths."""

    def name(own: str) -> str:
        return saved.get(own, own)

    return facts | {
        "candidate": name(facts["candidate"]),
        "test": facts["test"] | {"best_baseline": name(facts["test"]["best_baseline"])},
        "rival": facts["rival"] | {"candidate": name(facts["rival"]["candidate"])},
        "candidates": {name(own): row for own, row in facts["candidates"].items()},
    }


def _results(facts: dict[str, Any]) -> list[EvalResult]:
    """Return the loss on the part for judging as the Hub's metadata have it, which know a text by a name alone."""
    part = facts["splits"]["test"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=f"{part['tokens']:,} {facts['vocabulary']} of {part['clusters']} {part['kind']}, held out",
            metric_type="loss",
            metric_name=f"nats per {_unit(facts)}",
            metric_value=facts["test"]["nll"],
        )
    ]


def _card(says: str, facts: dict[str, Any]) -> str:
    rows = []
    for name, row in facts["candidates"].items():
        difference = Difference(row["delta"], *row["ci95"]) if name != facts["test"]["best_baseline"] else ""
        weights, trust = (", ".join(f"{x:.3g}" for x in row[key]) for key in ("weights", "trust"))
        trust = trust if rule_of(row["rule"]).uses_trust else ""
        title = name.replace("|", r"\|")
        rows.append(
            f"| {title} | {row['test_nll']:.4f} | {difference} | {weights} | {trust} | {row['rule_temperature']:.3f} |"
        )
    return _CARD.format(
        how=(_FOLDS if facts["folds"] else _PARTS).format(**facts | facts["splits"]),
        rows="\n".join(rows), best=facts["test"]["best_baseline"], verdict=says, unit=_unit(facts),
        caution=f" {facts['caution']}".rstrip(),
        test=facts["splits"]["test"],
    )  # fmt: skip


def _unit(facts: dict[str, Any]) -> str:
    """Return the unit that losses are per, ``token`` or ``byte``."""
    return str(facts["vocabulary"]).removesuffix("s")
