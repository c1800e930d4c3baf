"""What equal weights gain over the best member alone, kept so that nobody mixes members so without a word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.fit import Fitted
from softmeet.evaluation.intervals import Difference, clusters, paired
from softmeet.evaluation.perplexity import evaluate_positions
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.scores import Evaluation
from softmeet.hf.unequal import Measured, remember_equal
from softmeet.rules.values import POOLS
from softmeet.scaling.base import Engine

# So many log-probabilities of a member tell what equal weights gain.
_ELEMENTS = 100_000_000


@dataclass(frozen=True)
class Equal:
    """What an average with equal weights gains over the best member.

    Attributes:
        gain: in bits a byte, negative where it has fewer.
        best: the number of the best member.
        bytes: of the text.
    """

    gain: Difference
    best: int
    bytes: int

    @classmethod
    def of(cls, made: Evaluation, name: str, base: Float[Tensor, " N"] | None = None, best: int = 0) -> Equal:
        """Take it from an evaluation.

        Args:
            made: the evaluation.
            name: the row with equal weights.
            base: the losses of the best member, in nats, and ``best`` its number; None for those of the evaluation's.
        """
        if base is None:
            losses = [own.nats for own in made.members.values()]
            best = min(range(len(losses)), key=lambda k: float(losses[k].sum()))
            base = losses[best]
        ours, theirs = (nats / math.log(2) for nats in (made.choices[name].nats, base))
        positions = made.positions
        gain = paired(theirs, ours, clusters(positions.document), positions.sizes.double())
        return cls(gain, best, int(positions.sizes.sum()))


def spread_rows(ensemble: Ensemble, positions: Positions) -> Int[Tensor, " k"]:
    """Return the numbers of some positions, evenly spread over a text, that tell what equal weights gain."""
    many = min(len(positions), _ELEMENTS // ensemble.model.config.vocab_size)
    found: Tensor = torch.arange(many) * len(positions) // many
    return found


def evaluate_equal(
    ensemble: Ensemble, positions: Positions, engine: Engine | None = None, cache: PieceCache | None = None
) -> Evaluation:
    """Evaluate members and their ``logit-mean`` with equal weights, by the name ``equal``, at some positions."""
    n = len(ensemble.names)
    even = RuleChoice("equal", {"rule": POOLS[0], "weights": [1 / n] * n, "rule_temperature": 1.0})
    return evaluate_positions(ensemble, positions, [even], engine=engine, cache=cache, stage="equal")


def remember(ensemble: Ensemble, found: Equal, by: str, weights: Sequence[float] = (), said: str = "") -> None:
    """Keep what was measured for :func:`softmeet.hf.unequal.warn_of_unequal`.

    Args:
        ensemble: the members.
        found: what was measured; nothing is kept of a text without an interval.
        by: the command that measured it.
        weights: those that were fitted to the text, if any were.
        said: what was advised if that is not to mix the members.
    """
    mean, margin = found.gain.mean, (found.gain.high - found.gain.low) / 2
    if math.isfinite(margin):
        own = Measured(
            gain=mean, margin=margin, best=found.best, bytes=found.bytes, weights=list(weights), said=said, by=by
        )
        remember_equal(ensemble.model, own)


def remember_evaluated(ensemble: Ensemble, made: Evaluation) -> None:
    """Keep what an evaluation says of equal weights, if they are among its rows and members may differ."""
    even = next((name for name in (f"uniform {POOLS[0]}", POOLS[0]) if name in made.choices), None)
    if even is not None and len(ensemble.names) > 1:
        remember(ensemble, Equal.of(made, even), "softmeet evaluate")


def remember_fitted(ensemble: Ensemble, fitted: Fitted) -> None:
    """Measure equal weights where a fit judges its candidates, and keep that, if there are several members."""
    if len(ensemble.names) > 1:
        whole = fitted.parts["test"].positions
        even = evaluate_equal(ensemble, whole.take(spread_rows(ensemble, whole)))
        own = next(candidate for candidate in fitted.candidates if candidate.name == POOLS[0])
        remember(ensemble, Equal.of(even, "equal"), "softmeet fit", own.settings["weights"])
