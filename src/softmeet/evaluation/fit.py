"""``fit``: from members and a text to an ensemble to save, a fitted baseline unless a rule is shown to be better.

1. The text is split by document into three parts: to fit on, to choose by, to judge by.
2. Each single member gets a temperature, and each average weights and a temperature, by L-BFGS on the first part; with
   ``signed_weights`` a second logit mean gets weights that may be below zero.
3. Starting from each fitted average (from the better one only, with minibatches), with trusts that the premise test
   suggests, weights, temperature and trusts of ``meet`` are fitted together on a subset of the first part, by gradients
   through the solver.
4. The second part chooses the best candidate and the best baseline (a member or an average). The third compares these
   two once: unless the 95 % interval of their paired difference shows the candidate to be better, the baseline is
   saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from softmeet.ensemble import Ensemble
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.intervals import Difference, SplitPart, paired, split
from softmeet.evaluation.objective import NO_TRUST, Layout, Objective, Values, minimise
from softmeet.evaluation.perplexity import Evaluation, distinct_names, evaluate_positions
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.premise import Premise, premise_at
from softmeet.rules.registry import DEFAULT
from softmeet.rules.settings import POOLS, Pool, Settings, parse_rule
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine

# The least and the largest first trust that a premise score gives.
_LOW, _HIGH = 0.05, 1.0
# Averages cost little: they get this many times the evaluations of ``meet``.
_CHEAPER = 5

# Settings that a candidate does not name: the defaults, as in its saved ensemble, not those of the ensemble at hand.
_DEFAULTS = {
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
        bands: the number of bands, groups of principal directions, that each head is cut into; more than one adds a
            candidate, ``meet`` with a trust for each band.
        meet_positions: the most positions that ``meet`` is fitted on.
        premise_positions: the most positions of the premise test (:class:`~softmeet.evaluation.premise.Premise`), which
            suggests the first trusts.
        evaluations: the most evaluations of the loss with its gradient for each ``meet``; averages and single members
            get five times this.
        batch: positions in each evaluation for ``meet``, as minibatches of its subset; it then starts from the better
            average only. None for the whole subset at once.
        select_positions, judge_positions: the most positions to choose by and to judge by, evenly spread; None for all.
        rules: further candidates, such as ``"meet:trust=0.3"``; unless a rule names its pool, weights or
            ``free_weights``, the better average's are used.
    """

    free_weights: bool = False
    signed_weights: bool = False
    bands: int = 1
    meet_positions: int = 2000
    premise_positions: int = 512
    evaluations: int = 15
    batch: int | None = None
    select_positions: int | None = None
    judge_positions: int | None = None
    rules: tuple[str, ...] = ()


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
    """

    name: str
    settings: dict[str, Any]
    baseline: bool
    fit_nll: float
    evaluations: int

    @property
    def label(self) -> str:
        """The candidate's name in an :class:`Evaluation`, ``fitted NAME``; NAME alone may be an unfitted member's."""
        return f"fitted {self.name}"


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
        parts: the three parts of the text, named ``fit``, ``select`` and ``test``.
        premise: a result of the premise test for each member, in order; empty for a single member, or over bytes.
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
    for text in options.rules:
        ensemble.model.require(Settings.of({"rule": text}))
    fitter = _Fitter(ensemble, options, begin, engine or LocalEngine(), cache or PieceCache())
    parts = split(positions)
    parts["select"] = parts["select"].spread(options.select_positions)
    parts["test"] = parts["test"].spread(options.judge_positions)
    n, whole = len(ensemble.names), parts["fit"].positions
    candidates = [fitter.single(whole, i) for i in range(n)]
    if n == 1:
        return fitter.judge(parts, candidates, [])
    averages = [fitter.average(whole, pool) for pool in POOLS]
    best, premise = min(averages, key=lambda candidate: candidate.fit_nll), list[Premise]()
    candidates += averages
    if options.signed_weights:
        candidates.append(fitter.signed(whole, averages[0]))
    if not ensemble.model.over_bytes:
        few = parts["fit"].spread(options.premise_positions).positions
        pool = {name: best.settings[name] for name in ("weights", "pool", "free_weights")}
        premise = premise_at(ensemble, [(few.hidden, few.targets)], **_DEFAULTS | pool)
        subset = parts["fit"].spread(options.meet_positions).positions
        # Minibatches are for heads that take long: start from the better average only.
        begun = averages if options.batch is None else [best]
        names = [DEFAULT if a.name == POOLS[0] else f"{DEFAULT} from {a.name}" for a in begun]
        meets = [
            fitter.meet(subset, name, a, _first_trusts(premise, a), 1) for name, a in zip(names, begun, strict=True)
        ]
        candidates += meets
        if options.bands > 1:
            meet = min(meets, key=lambda candidate: candidate.fit_nll)
            trust = [rho for rho in meet.settings["trust"] for _ in range(options.bands)]
            candidates.append(fitter.meet(subset, f"{meet.name} by direction", meet, trust, options.bands))
    candidates += [_as_written(text, best, n) for text in options.rules]
    return fitter.judge(parts, candidates, premise)


@dataclass(frozen=True)
class _Fitter:
    """A fitter of one candidate after another; losses and scores are computed by the engine."""

    ensemble: Ensemble
    options: Options
    begin: Begin
    engine: Engine
    cache: PieceCache

    def _minimise(self, name: str, whole: Objective, start: Values, *, cheap: bool) -> tuple[Values, float, int]:
        """Return (values, loss in nats per position, evaluations); ``cheap`` is for averages and single members."""
        evaluations = self.options.evaluations * (_CHEAPER if cheap else 1)
        batch = None if cheap else self.options.batch
        advance = self.begin(f"fitting {name}", 0, evaluations * (batch or len(whole.positions)))
        how: dict[str, Any] = {"batch": batch, "cache": self.cache, "name": name, "on_progress": advance}
        return minimise(whole, start, evaluations, self.engine, **how)

    def single(self, positions: Positions, i: int) -> Candidate:
        """Fit the temperature of member ``i``, as a logit mean that gives it all the weight."""
        n, alone = len(self.ensemble.names), Objective(self.ensemble.model, positions, Layout(1), POOLS[0], members=[i])
        values, loss, count = self._minimise(f"member {i}", alone, Values((1.0,)), cheap=True)
        weights = [1.0 if k == i else 0.0 for k in range(n)]
        own = {"rule": POOLS[0], "weights": weights, "trust": [0.0] * n, "rule_temperature": values.temperature}
        return Candidate(distinct_names(self.ensemble)[i], own, True, loss, count)

    def average(self, positions: Positions, pool: Pool) -> Candidate:
        """Fit the weights and the temperature of an average."""
        n, free = len(self.ensemble.names), self._free(pool)
        # If weights are free, their scale already is a logit mean's temperature.
        layout = Layout(n, free=free, tempered=not free)
        whole = Objective(self.ensemble.model, positions, layout, pool)
        values, loss, count = self._minimise(pool, whole, Values((1 / n,) * n), cheap=True)
        return Candidate(pool, self._settings(pool, pool, values), True, loss, count)

    def signed(self, positions: Positions, start: Candidate) -> Candidate:
        """Fit weights that may be below zero, and a temperature, of a logit mean, beginning at those of ``start``.

        The loss is convex in the weights divided by the temperature, so where it begins makes no difference.
        """
        name = f"{POOLS[0]} with signed weights"
        whole = Objective(self.ensemble.model, positions, Layout(len(self.ensemble.names), signed=True), POOLS[0])
        scale = sum(start.settings["weights"])
        at = Values(tuple(w / scale for w in start.settings["weights"]), start.settings["rule_temperature"])
        values, loss, count = self._minimise(name, whole, at, cheap=True)
        own = self._settings(POOLS[0], POOLS[0], values) | {"free_weights": False}
        return Candidate(name, own, False, loss, count)

    def meet(self, positions: Positions, name: str, start: Candidate, trust: Sequence[float], bands: int) -> Candidate:
        """Fit weights, temperature and trusts of ``meet`` together, beginning at those of ``start`` and at ``trust``.

        A member whose first trusts are all below 0.005 keeps trust 0: its moments would be the costliest to meet.

        Args:
            positions: to fit on.
            name: the candidate's name.
            start: a fitted average, or a fitted ``meet``.
            trust: the first trusts, one for each band of each member.
            bands: the number of bands of each head.
        """
        n, pool = len(self.ensemble.names), start.settings["pool"]
        trusted = [i for i in range(n) if max(trust[i * bands : (i + 1) * bands]) >= NO_TRUST]
        begun = tuple(rho for i in trusted for rho in trust[i * bands : (i + 1) * bands])
        layout = Layout(n, len(begun), free=self._free(pool))
        at = Values(tuple(start.settings["weights"]), start.settings["rule_temperature"], begun)
        whole = Objective(self.ensemble.model, positions, layout, pool, bands=bands, trusted=trusted)
        values, loss, count = self._minimise(_piece(name, bands), whole, at, cheap=False)
        found = iter(values.trust)
        every = tuple(next(found) if i in trusted else 0.0 for i in range(n) for _ in range(bands))
        own = self._settings(DEFAULT, pool, replace(values, trust=every)) | {"bands": bands}
        return Candidate(name, own, False, loss, count)

    def _free(self, pool: Pool) -> bool:
        """Return whether weights may sum to anything; the sum of a probability mean's weights makes no difference."""
        return self.options.free_weights and pool == POOLS[0]

    def _settings(self, rule: str, pool: Pool, values: Values) -> dict[str, Any]:
        return {
            "rule": rule,
            "pool": pool,
            "weights": list(values.weights),
            "trust": list(values.trust) or [0.0] * len(self.ensemble.names),
            "rule_temperature": values.temperature,
            "free_weights": self._free(pool),
        }

    def _scored(self, name: str, positions: Positions, candidates: Sequence[Candidate]) -> Evaluation:
        """Score candidates on a part, one number of bands at a time, so that another fit can reuse the scores."""
        counts = [candidate.settings.get("bands", 1) for candidate in candidates]
        advance = self.begin(f"scoring the {name} part", 0, len(positions) * len(set(counts)))
        scored = []
        for bands in sorted(set(counts)):
            some = [candidate for candidate, count in zip(candidates, counts, strict=True) if count == bands]
            choices = [RuleChoice(candidate.label, {**_DEFAULTS, **candidate.settings}) for candidate in some]
            where: dict[str, Any] = {"engine": self.engine, "cache": self.cache, "stage": _piece(name, bands)}
            scored.append(evaluate_positions(self.ensemble, positions, choices, **where, on_progress=advance))
        return replace(scored[0], choices={name: s for one in scored for name, s in one.choices.items()})

    def judge(self, parts: dict[str, SplitPart], candidates: list[Candidate], premise: list[Premise]) -> Fitted:
        """Choose the best candidate and the best baseline by the second part, and confirm the choice on the third.

        Args:
            parts: the parts of the text, by name.
            candidates: all candidates, baselines among them.
            premise: results of the premise test, to be kept with the fit.
        """
        select, test = (self._scored(name, parts[name].positions, candidates) for name in ("select", "test"))

        def loss(candidate: Candidate) -> float:
            return select.choices[candidate.label].mean

        rival = min(candidates, key=loss)
        best = min((candidate for candidate in candidates if candidate.baseline), key=loss)
        ours, theirs = (test.choices[candidate.label].nats for candidate in (rival, best))
        difference = paired(ours, theirs, parts["test"].within)
        chosen = rival if rival is best or difference.high < 0 else best
        return Fitted(candidates, chosen, rival, best, difference, select, test, parts, premise)


def _first_trusts(premise: Sequence[Premise], average: Candidate) -> list[float]:
    """Return each member's first trust: its premise score, from 0.05 to 1, lower if its weight is below average."""
    scores = [min(max(p.score, _LOW), _HIGH) if math.isfinite(p.score) else _LOW for p in premise]
    weights = average.settings["weights"]
    return [score * min(1.0, len(weights) * w / sum(weights)) for score, w in zip(scores, weights, strict=True)]


def _piece(name: str, bands: int) -> str:
    """Name the pieces in the cache for a number of bands."""
    return name if bands == 1 else f"{name} {bands}"


def _as_written(text: str, average: Candidate, n: int) -> Candidate:
    """Make a candidate of a rule's text; pool, weights and ``free_weights`` that it does not name are the average's."""
    rule, given = parse_rule(text)
    own = {key: average.settings[key] for key in ("pool", "weights", "free_weights")} | given
    complete = Settings(**own).for_members(n).plain()
    named = {key: complete[key] for key in ("trust", "rule_temperature", *own)}
    return Candidate(text, {**named, "rule": str(rule)}, baseline=False, fit_nll=math.nan, evaluations=0)
