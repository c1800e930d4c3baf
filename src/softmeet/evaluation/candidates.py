"""The candidates of a fit: single members, averages and ``meet``, each with the settings of least loss on a text.

Each single member gets a temperature, each average weights and a temperature, and the power mean an order too, by
Fisher scoring. Then ``meet`` starts from a fitted average, with trusts that the premise test suggests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softmeet.ensemble import Ensemble
from softmeet.evaluation.average import Family
from softmeet.evaluation.choices import FITTED
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.intervals import SplitPart
from softmeet.evaluation.layout import NO_TRUST, Layout, Values
from softmeet.evaluation.objective import Objective, minimise
from softmeet.evaluation.perplexity import distinct_names
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.premise import Premise, premise_at
from softmeet.evaluation.scoring import Average, Text
from softmeet.members.opaque import OpaqueHead
from softmeet.rules.pools import PowerMean
from softmeet.rules.registry import DEFAULT
from softmeet.rules.settings import Settings, parse_rule
from softmeet.rules.values import POOLS, Pool
from softmeet.scaling.base import Engine

# The least and the largest first trust that a premise score gives.
_LOW, _HIGH = 0.05, 1.0
# Log-probabilities of all members at the positions on which averages are fitted.
_FITTED = 600_000_000
# Averages cost little: they get this many times the evaluations of ``meet``.
_CHEAPER = 5

# Settings that a candidate does not name: the defaults, as in its saved ensemble, not those of the ensemble at hand.
DEFAULTS = {
    name: value for name, value in Settings().plain().items() if name not in ("rule", "weights", "trust", "gate")
}

Begin = Callable[[str, int, int | None], Callable[[int], None]]


@dataclass(frozen=True)
class Options:
    """Settings of a fit.

    Attributes:
        free_weights: whether a logit mean's weights may sum to anything, not only to one.
        signed_weights: whether to add a candidate, a logit mean with weights that may be below zero and sum to one. It
            is no baseline: like any rule it is used only if the third part shows it to be better.
        meet_positions: the most positions that ``meet`` is fitted on.
        premise_positions: the most positions of the premise test (:class:`~softmeet.evaluation.premise.Premise`), which
            suggests the first trusts.
        evaluations: the most evaluations of the loss with its gradient for each ``meet``; averages and single members
            get five times this.
        batch: positions in each evaluation for ``meet``, as minibatches of its subset; it then starts from the better
            average only. None for the whole subset at once.
        select_positions, judge_positions: the most positions to choose by and to judge by, evenly spread; None for all.
            With folds the second serves for both.
        folds: the number of folds; each candidate is fitted on all but one of them and judged on that one, in turn, and
            what is saved is fitted on all. None for three parts, each for one end.
        fit_positions: at about how many positions, evenly spread, averages are fitted; None for all.
        beside: with folds, averages by name that are given, not fitted, and scored beside the fitted ones.
        meets: whether to fit ``meet``.
        adaptive: with folds, whether to score fitted averages with weights that adapt to a document as well.
        trusts: with folds, trusts at which ``meet`` is tried, from the better average, with a fitted temperature each.
        rules: further candidates, such as ``"meet:trust=0.3"``; unless a rule names its pool, weights or
            ``free_weights``, the better average's are used.
    """

    free_weights: bool = False
    signed_weights: bool = False
    meet_positions: int = 2000
    premise_positions: int = 512
    evaluations: int = 15
    batch: int | None = None
    select_positions: int | None = None
    judge_positions: int | None = None
    folds: int | None = None
    fit_positions: int | None = None
    meets: bool = True
    adaptive: bool = False
    trusts: tuple[float, ...] = ()
    rules: tuple[str, ...] = ()
    beside: Mapping[str, Average] = field(default_factory=dict)


def sample_size(ensemble: Ensemble) -> int:
    """Return at how many positions averages have to be fitted: as many as minutes allow, for the few values they have.

    At 151,936 tokens and two members these are 1,974, at 4,096 and two 73,242.
    """
    v: int = ensemble.model.config.vocab_size
    return _FITTED // (len(ensemble.names) * v)


@dataclass(frozen=True)
class Candidate:
    """A rule with fitted or given settings, one that a fit can choose.

    Attributes:
        name: its name in reports.
        settings: fitted or given values by name, the arguments of :meth:`softmeet.rules.settings.Settings.changed`;
            settings that are not named have their defaults.
        baseline: whether it is a single member (with a fitted temperature) or a fitted average.
        fit_nll: its loss on the positions that it was fitted on, in nats per token; NaN if it was not fitted.
        evaluations: the number of evaluations of the loss that its fit took.
        average: of a single member or an average, its family and values there.
    """

    name: str
    settings: dict[str, Any]
    baseline: bool
    fit_nll: float
    evaluations: int
    average: Average | None = field(default=None, repr=False, compare=False)

    @property
    def label(self) -> str:
        """The candidate's name in an :class:`Evaluation`, ``fitted NAME``; NAME alone may be an unfitted member's."""
        return f"{FITTED}{self.name}"


@dataclass(frozen=True)
class Fitter:
    """A fitter of one candidate after another; losses and scores are computed by the engine."""

    ensemble: Ensemble
    options: Options
    begin: Begin
    engine: Engine
    cache: PieceCache

    def reads(self, what: str, total: int) -> Callable[[int], None]:
        """Begin a stage that goes once over ``total`` tokens or bytes, which its name says; return how it advances."""
        return self.begin(f"{what}, in {self.ensemble.model.config.vocabulary}", 0, total)

    def candidates(
        self, part: SplitPart, text: Text, without: int | None = None, start: Sequence[Candidate] = ()
    ) -> tuple[list[Candidate], list[Premise]]:
        """Fit every candidate on a part of a text, and test the premise there.

        Args:
            part: the part.
            text: of which the part is all, or all but a fold.
            without: that fold.
            start: the same candidates, fitted on all of ``text``, to begin at; none to begin afresh.
        """
        n = len(self.ensemble.names)
        fits = Averages(self, text, without, {own.name: own.average[1] for own in start if own.average})
        candidates = [fits.single(i) for i in range(n)]
        if n == 1:
            return candidates, []
        averages = [fits.average(pool) for pool in POOLS]
        # Averages of every order between those two.
        candidates += [*averages, fits.fit(PowerMean.name, Family(Layout(n, ordered=True)))]
        if self.options.signed_weights:
            candidates.append(fits.signed(averages[0]))
        best, premise = min(averages, key=lambda candidate: candidate.fit_nll), list[Premise]()
        heads = self.ensemble.model.combiner.heads
        if self.options.meets and not any(isinstance(head, OpaqueHead) and head.is_told for head in heads):
            few = part.spread(self.options.premise_positions).positions
            pool = {name: best.settings[name] for name in ("weights", "pool", "free_weights")}
            premise = premise_at(self.ensemble, [(few.hidden, few.targets)], **DEFAULTS | pool)
            # Minibatches are for heads that take long: start from the better average only.
            begun = averages if self.options.batch is None else [best]
            candidates += self._meets(part, begun, premise, suffix_of(without))
        return [*candidates, *(_as_written(rule, best, n) for rule in self.options.rules)], premise

    def _meets(
        self, part: SplitPart, begun: Sequence[Candidate], premise: Sequence[Premise], suffix: str
    ) -> list[Candidate]:
        """Fit ``meet`` from each of the averages ``begun``.

        ``suffix`` ends the names of what is kept of these fits.
        """
        subset, meets = part.spread(self.options.meet_positions).positions, []
        for average in begun:
            name = DEFAULT if average.name == POOLS[0] else f"{DEFAULT} from {average.name}"
            meets.append(self.meet(subset, name, average, _first_trusts(premise, average), suffix))
        return meets

    def meet(
        self, positions: Positions, name: str, start: Candidate, trust: Sequence[float], suffix: str = ""
    ) -> Candidate:
        """Fit weights, temperature and trusts of ``meet`` together, beginning at those of ``start`` and at ``trust``.

        A member whose first trust is below 0.005 keeps trust 0: its moments would be the costliest to meet.

        Args:
            positions: to fit on.
            name: the candidate's name.
            start: a fitted average, or a fitted ``meet``.
            trust: the first trusts, one for each member.
            suffix: ends the names of what is kept of the fit.
        """
        n, pool = len(self.ensemble.names), start.settings["pool"]
        trusted = [i for i in range(n) if trust[i] >= NO_TRUST]
        begun = tuple(trust[i] for i in trusted)
        layout = Layout(n, len(begun), free=self.free(pool))
        at = Values(tuple(start.settings["weights"]), start.settings["rule_temperature"], begun)
        whole = Objective(self.ensemble.model, positions, layout, pool, trusted=trusted)
        piece, batch, evaluations = name + suffix, self.options.batch, self.options.evaluations
        advance = self.begin(f"fitting {piece}", 0, evaluations * (batch or len(positions)))
        how: dict[str, Any] = {"batch": batch, "cache": self.cache, "name": piece, "on_progress": advance}
        values, loss, count = minimise(whole, at, evaluations, self.engine, **how)
        found = iter(values.trust)
        every = tuple(next(found) if i in trusted else 0.0 for i in range(n))
        own = self.settings(DEFAULT, values, every) | {"pool": pool, "free_weights": self.free(pool)}
        return Candidate(name, own, False, loss, count)

    def free(self, pool: Pool) -> bool:
        """Return whether weights may sum to anything; the sum of a probability mean's weights makes no difference."""
        return self.options.free_weights and pool == POOLS[0]

    def settings(self, rule: str, values: Values, trust: Sequence[float] = ()) -> dict[str, Any]:
        """Return fitted values as settings of a rule, with no trust unless there is some."""
        return {
            "rule": rule,
            "weights": list(values.weights),
            "trust": list(trust) or [0.0] * len(self.ensemble.names),
            "rule_temperature": values.temperature,
        }


@dataclass(frozen=True)
class Averages:
    """A fitter of averages on a text without one fold, or on all of it; ``begun`` has values to begin at, by name."""

    fitter: Fitter
    text: Text
    without: int | None
    begun: dict[str, Values]

    def fit(
        self, name: str, family: Family, start: Values | None = None, *, piece: str = "", baseline: bool = True,
        cheaper: int = _CHEAPER, **named: Any,
    ) -> Candidate:  # fmt: skip
        """Fit a family of averages, and make a candidate of it.

        Args:
            name: the candidate's name.
            family: the averages.
            start: the values to begin at; None for those of an earlier fit of that name, or else equal weights.
            piece: names what is kept of the fit, instead of ``name``.
            baseline: whether the candidate is a baseline.
            cheaper: how many times the evaluations of a ``meet`` it gets at the most.
            named: settings of the candidate in place of the fitted ones, or beside them.
        """
        n = family.layout.n
        start = start or self.begun.get(name, Values((1 / n,) * n))
        piece, suffix = piece or name, suffix_of(self.without)
        evaluations = self.fitter.options.evaluations * cheaper
        advance = self.fitter.begin(f"fitting {name}{suffix}", 0, None)
        values, loss, count = self.text.fit(
            family, start, evaluations, piece + suffix, without=self.without, on_progress=advance
        )
        rule = str(PowerMean(order=values.order)) if family.layout.ordered else POOLS[int(family.order)]
        settings = self.fitter.settings(rule, values) | named
        return Candidate(name, settings, baseline, loss, count, (family, values))

    def single(self, i: int) -> Candidate:
        """Fit the temperature of member ``i``, as a logit mean that gives it all the weight."""
        names = distinct_names(self.fitter.ensemble)
        weights = [1.0 if k == i else 0.0 for k in range(len(names))]
        return self.fit(names[i], Family(Layout(1), members=(i,)), piece=f"member {i}", weights=weights)

    def average(self, pool: Pool) -> Candidate:
        """Fit the weights and the temperature of an average."""
        n, free = len(self.fitter.ensemble.names), self.fitter.free(pool)
        # If weights are free, their scale already is a logit mean's temperature.
        family = Family(Layout(n, free=free, tempered=not free), float(POOLS.index(pool)))
        return self.fit(pool, family, pool=pool, free_weights=free)

    def signed(self, start: Candidate) -> Candidate:
        """Fit weights that may be below zero, and a temperature, of a logit mean, beginning at those of ``start``.

        The loss is convex in the weights divided by the temperature, so where it begins makes no difference.
        """
        name = f"{POOLS[0]} with signed weights"
        scale = sum(start.settings["weights"])
        at = Values(tuple(w / scale for w in start.settings["weights"]), start.settings["rule_temperature"])
        family = Family(Layout(len(self.fitter.ensemble.names), signed=True))
        return self.fit(name, family, at, baseline=False, pool=POOLS[0], free_weights=False)


def suffix_of(fold: int | None) -> str:
    """Return what ends the names of fits without a fold."""
    return "" if fold is None else f" without fold {fold + 1}"


def _first_trusts(premise: Sequence[Premise], average: Candidate) -> list[float]:
    """Return each member's first trust: its premise score, from 0.05 to 1, lower if its weight is below average."""
    scores = [min(max(p.score, _LOW), _HIGH) if math.isfinite(p.score) else _LOW for p in premise]
    weights = average.settings["weights"]
    return [score * min(1.0, len(weights) * w / sum(weights)) for score, w in zip(scores, weights, strict=True)]


def _as_written(text: str, average: Candidate, n: int) -> Candidate:
    """Make a candidate of a rule's text; pool, weights and ``free_weights`` that it does not name are the average's."""
    rule, given = parse_rule(text)
    own = {key: average.settings[key] for key in ("pool", "weights", "free_weights")} | given
    complete = Settings(**own).for_members(n).plain()
    named = {key: complete[key] for key in ("trust", "rule_temperature", *own)}
    return Candidate(text, {**named, "rule": str(rule)}, baseline=False, fit_nll=math.nan, evaluations=0)
