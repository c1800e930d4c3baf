"""Saving a fitted ensemble: a directory that loads as any ensemble does, with a card of what was tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softmeet.ensemble import Ensemble
from softmeet.evaluation.files import require_ensemble_folder, write_json, written_together
from softmeet.evaluation.fit import Fitted, figures
from softmeet.hf.configuration import EnsembleConfig
from softmeet.rules.settings import rule_of

# What an ensemble knows of its members.
_KEPT = (
    "vocabulary",
    "prune",
    "prefixes",
    "vocab_size",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
CARD = """
## How it was chosen

Fitted on {fit[tokens]:,} {vocabulary}, chosen on {select[tokens]:,}, judged once on {test[tokens]:,}, in
{fit[clusters]}, {select[clusters]} and {test[clusters]} {test[kind]}. Differences are against the best fitted baseline,
`{best}`, on the part for judging; 95 %, paired, by {test[kind]}; negative is better.

| candidate | nats/{unit} | against the best baseline | weights | trust | temperature |
|---|---|---|---|---|---|
{rows}

**{verdict}**

All figures are in `fit.json`.
"""


def unit(facts: dict[str, Any]) -> str:
    """What a figure is of: a token or a byte."""
    return str(facts["vocabulary"]).removesuffix("s")


def verdict(facts: dict[str, Any]) -> str:
    """What was chosen and why, in a sentence or two."""
    best, rival = facts["test"]["best_baseline"], facts["rival"]["candidate"]
    low, high = facts["rival"]["ci95"]
    if facts["fell_back"]:
        return (
            f"Falls back to {best}: {rival} was best on the part for choosing, but on the part for judging its "
            f"difference of {facts['rival']['delta']:+.4f} nats has the interval [{low:+.4f}, {high:+.4f}], which does "
            "not exclude zero in its favour."
        )
    if facts["candidate"] == best:
        return f"Uses {best}: no rule did better on the part for choosing."
    return (
        f"Uses {rival}: {facts['rival']['delta']:+.4f} nats a {unit(facts)} against {best} [{low:+.4f}, {high:+.4f}]."
    )


def save(ensemble: Ensemble, fitted: Fitted, folder: str | Path) -> dict[str, Any]:
    """Write the chosen ensemble and its card; the ensemble in memory takes the chosen settings too.

    Returns:
        The figures, as ``fit.json`` has them.

    Raises:
        InvalidInputError: the folder holds something other than an ensemble.
        TraceError: the disk is full; an ensemble that was there stays as it was.
    """
    require_ensemble_folder(Path(folder))
    facts = figures(fitted)
    before = ensemble.model.config
    kept: dict[str, Any] = {key: getattr(before, key) for key in _KEPT if hasattr(before, key)}
    ensemble.model.config = EnsembleConfig(ensemble.names, **fitted.chosen.settings, **kept)
    with written_together(Path(folder)) as new:
        ensemble.save_pretrained(new)
        with (new / "README.md").open("a", encoding="utf-8") as card:
            card.write(_card(facts))
        write_json(new / "fit.json", facts)
    return facts


def _card(facts: dict[str, Any]) -> str:
    rows = []
    for name, row in facts["candidates"].items():
        low, high = row["ci95"]
        difference = f"{row['delta']:+.4f} [{low:+.4f}, {high:+.4f}]" if name != facts["test"]["best_baseline"] else ""
        weights, trust = (", ".join(f"{x:.3g}" for x in row[key]) for key in ("weights", "trust"))
        trust = trust if rule_of(row["rule"]).uses_trust else ""
        cells = [
            name.replace("|", r"\|"),
            f"{row['test_nll']:.4f}",
            difference,
            weights,
            trust,
            f"{row['rule_temperature']:.3f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return CARD.format(
        rows="\n".join(rows), best=facts["test"]["best_baseline"], verdict=verdict(facts), unit=unit(facts),
        vocabulary=facts["vocabulary"], **facts["splits"],
    )  # fmt: skip
