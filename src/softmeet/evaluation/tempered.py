"""``meet`` at some trusts, each with a fitted temperature, judged by folds without gradients through the solver.

The pool and its weights at a position are those of the average that was fitted without its fold, so the answers there
know nothing of its targets. The temperature is then fitted as for a single member, whose predictions these answers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from softmeet.evaluation.average import Family
from softmeet.evaluation.candidates import DEFAULTS, Averages, Candidate, Fitter
from softmeet.evaluation.layout import Layout
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.scores import Scores
from softmeet.evaluation.scoring import Text
from softmeet.rules.registry import DEFAULT
from softmeet.rules.values import POOLS


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
