"""``fit``: from members and a text to the ensemble that is worth saving, never worse than the best fitted average.

1. The text is split by document: to fit on, to choose by, to judge by.
2. Each single member gets a temperature, each average weights and a temperature, by L-BFGS on all positions to fit on.
3. From each fitted average, ``meet`` starts with trusts that the premise test suggests, and weights, temperature and
   trusts are fitted together on a subset, by gradients through the solver, all of it at once or in minibatches.
4. On the second part the best candidate and the best baseline are chosen. On the third they meet once: unless the 95 %
   interval of their paired difference excludes zero, the baseline is the answer.
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

# Where a trust starts that the premise test does not support, and the most it starts with.
_LOW, _HIGH = 0.05, 1.0
# Averages cost little: they get so many times the evaluations.
_CHEAPER = 5

# Of a rule, where a candidate does not say: what its saved ensemble has, and not what the ensemble at hand has.
_DEFAULTS = {
    name: value for name, value in Settings().plain().items() if name not in ("rule", "weights", "trust", "gate")
}

Begin = Callable[[str, int, int | None], Callable[[int], None]]


@dataclass(frozen=True)
class Options:
    """Settings of a fit.

    Attributes:
        free_weights: let weights sum to anything, not only to one.
        bands: of principal directions of each head; more than one adds a ``meet`` with a trust for each.
        meet_positions: size of the subset that ``meet`` is fitted on.
        premise_positions: size of the subset of the premise test.
        evaluations: of the loss and its gradient, at most, for each ``meet``; averages get five times as many.
        batch: positions of each evaluation for ``meet``, drawn from its subset in turn, where the whole of it would
            take too long; then it starts from the better average only. None for the whole.
        select_positions, judge_positions: of the parts to choose and to judge by, at most, evenly spread; None for all.
        rules: further candidates, as ``--rule`` has them; a setting that one does not name is the better average's.
    """

    free_weights: bool = False
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
    """A fitted rule, one of those that a fit chooses from.

    Attributes:
        name: as reports have it.
        settings: what was fitted and chosen, under the settings' names.
        baseline: whether it is a member or a fitted average.
        fit_nll: its loss on the part to fit on, in nats a token; NaN if it was not fitted.
        evaluations: of the loss.
    """

    name: str
    settings: dict[str, Any]
    baseline: bool
    fit_nll: float
    evaluations: int

    @property
    def label(self) -> str:
        """The candidate's name among scores, where a member's own name stands for the member as it is."""
        return f"fitted {self.name}"


@dataclass
class Fitted:
    """The result of a fit: the candidates, and how one of them was chosen.

    Attributes:
        candidates: in the order tried.
        chosen: the one to save.
        rival: the one of the lowest loss on the second part; what ``chosen`` is unless the third denied it.
        best_baseline: the baseline of the lowest loss on the second part.
        difference: ``rival`` minus ``best_baseline`` on the third part.
        select, test: every candidate on the second and the third part.
        parts: the three parts of the text, by name.
        premise: the test that the trusts started from, a member each.
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
        """Whether a rule won on the second part and the third did not confirm it."""
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
    """Fit every candidate on one part of a text, choose on the second, and judge on the third.

    Args:
        ensemble: the members; its own rule and settings do not matter, and are not what is saved.
        positions: of the text.
        options: how.
        begin: called with a description, 0 and a number of positions or None; gives what to call with each advance.
        engine: where to evaluate losses and scores; None for this process.
        cache: what an earlier run of the same fit has found.

    Raises:
        InvalidInputError: the text is too short to split, or a further rule is not one for these members.
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
    if not ensemble.model.over_bytes:
        few = parts["fit"].spread(options.premise_positions).positions
        pool = {name: best.settings[name] for name in ("weights", "pool", "free_weights")}
        premise = premise_at(ensemble, [(few.hidden, few.targets)], **_DEFAULTS | pool)
        subset = parts["fit"].spread(options.meet_positions).positions
        # Minibatches are for heads that take long: one start has to do.
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
    """Fits one candidate after another; what costs time goes through the engine."""

    ensemble: Ensemble
    options: Options
    begin: Begin
    engine: Engine
    cache: PieceCache

    def _minimise(self, name: str, whole: Objective, start: Values, *, cheap: bool) -> tuple[Values, float, int]:
        """Return (values, loss, evaluations), on all positions at once or in minibatches."""
        evaluations = self.options.evaluations * (_CHEAPER if cheap else 1)
        batch = None if cheap else self.options.batch
        advance = self.begin(f"fitting {name}", 0, batch and evaluations * batch)
        how: dict[str, Any] = {"batch": batch, "cache": self.cache, "name": name, "on_progress": advance}
        return minimise(whole, start, evaluations, self.engine, **how)

    def single(self, positions: Positions, i: int) -> Candidate:
        """Fit the temperature of a member."""
        n, alone = len(self.ensemble.names), Objective(self.ensemble.model, positions, Layout(1), POOLS[0], members=[i])
        values, loss, count = self._minimise(f"member {i}", alone, Values((1.0,)), cheap=True)
        weights = [1.0 if k == i else 0.0 for k in range(n)]
        own = {"rule": POOLS[0], "weights": weights, "trust": [0.0] * n, "rule_temperature": values.temperature}
        return Candidate(distinct_names(self.ensemble)[i], own, True, loss, count)

    def average(self, positions: Positions, pool: Pool) -> Candidate:
        """Fit the weights and the temperature of a pool."""
        n, free = len(self.ensemble.names), self._free(pool)
        # A free scale of the weights is a logit mean's temperature already.
        layout = Layout(n, free=free, tempered=not free)
        whole = Objective(self.ensemble.model, positions, layout, pool)
        values, loss, count = self._minimise(pool, whole, Values((1 / n,) * n), cheap=True)
        return Candidate(pool, self._settings(pool, pool, values), True, loss, count)

    def meet(self, positions: Positions, name: str, start: Candidate, trust: Sequence[float], bands: int) -> Candidate:
        """Fit weights, temperature and trusts of ``meet`` together, from those of ``start`` and from given trusts.

        A member that starts with next to no trust keeps none: its moments would be the costliest to meet.
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
        """Return whether weights may sum to anything; a probability mean has no use for that."""
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
        """Evaluate candidates on a part; those of one number of bands at once, so that other fits can reuse scores."""
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
        """Choose the best candidate and the best baseline on the second part, and have the third confirm the choice."""
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
    """Bound each premise score, and lower it where the fitted average has next to no use for the member."""
    scores = [min(max(p.score, _LOW), _HIGH) if math.isfinite(p.score) else _LOW for p in premise]
    weights = average.settings["weights"]
    return [score * min(1.0, len(weights) * w / sum(weights)) for score, w in zip(scores, weights, strict=True)]


def _piece(name: str, bands: int) -> str:
    """Name what is stored in the cache for one number of bands."""
    return name if bands == 1 else f"{name} {bands}"


def _as_written(text: str, average: Candidate, n: int) -> Candidate:
    """Make a candidate of a rule; weights and pool that it does not name are those of a fitted average."""
    rule, given = parse_rule(text)
    own = {key: average.settings[key] for key in ("pool", "weights", "free_weights")} | given
    complete = Settings(**own).for_members(n).plain()
    named = {key: complete[key] for key in ("trust", "rule_temperature", *own)}
    return Candidate(text, {**named, "rule": str(rule)}, baseline=False, fit_nll=math.nan, evaluations=0)
