"""``fit``: from members and a text to the ensemble that is worth saving, never worse than the best fitted average.

1. The text is split by document: to fit on, to choose by, to judge by.
2. Each single member gets a temperature, each average weights and a temperature, by L-BFGS on all positions to fit on.
3. From each fitted average, ``meet`` starts with trusts that the premise test suggests, and weights, temperature and
   trusts are fitted together on a subset, by gradients through the solver, all of it at once or in minibatches.
4. On the second part the best candidate and the best baseline are chosen. On the third they meet once: unless the 95 %
   interval of their paired difference excludes zero, the baseline is the answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.evaluation.choices import Choice
from softmeet.evaluation.descent import LossAndGradient, descend, minimise
from softmeet.evaluation.intervals import Difference, paired
from softmeet.evaluation.kept import Kept
from softmeet.evaluation.objective import Loss
from softmeet.evaluation.parameters import NO_TRUST, Layout, Values
from softmeet.evaluation.perplexity import Evaluation, distinct_names
from softmeet.evaluation.pieces import evaluate_positions
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.premise import Premise, premise_at
from softmeet.evaluation.splits import Part, split
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
    """How to fit.

    Attributes:
        free_weights: weights need not sum to one.
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
    """A fitted rule: its settings under their names; ``baseline`` if it is a member or a fitted average."""

    name: str
    settings: dict[str, Any]
    baseline: bool
    fit_nll: float
    evaluations: int

    @property
    def label(self) -> str:
        """Its name among scores, where a member's own name stands for the member as it is."""
        return f"fitted {self.name}"


@dataclass
class Fitted:
    """What a fit found.

    Attributes:
        candidates: in the order tried.
        chosen: the one to save.
        rival: the one of the lowest loss on the second part; what ``chosen`` is unless the third denied it.
        best_baseline: the baseline of the lowest loss on the second part.
        difference: ``rival`` minus ``best_baseline`` on the third part.
        select, test: every candidate on the second and the third part.
        premise: the test that the trusts started from.
        sizes: positions and clusters of each part.
    """

    candidates: list[Candidate]
    chosen: Candidate
    rival: Candidate
    best_baseline: Candidate
    difference: Difference
    select: Evaluation
    test: Evaluation
    test_part: Part
    premise: list[Premise]
    sizes: dict[str, Any] = field(default_factory=dict)

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
    kept: Kept | None = None,
) -> Fitted:
    """Fit every candidate, choose, and judge; see the module's docstring.

    Args:
        ensemble: the members; its own rule and settings do not matter, and are not what is saved.
        positions: of the text.
        options: how.
        begin: called with a description, 0 and a number of positions or None; gives what to call with each advance.
        engine: where to evaluate losses and scores; None for here.
        kept: what an earlier run of the same fit has found.

    Raises:
        InvalidInputError: the text is too short to split.
    """
    for text in (options or Options()).rules:
        ensemble.model.require(Settings.of({"rule": text}))
    fitter = _Fitter(ensemble, options or Options(), begin, engine or LocalEngine(), kept or Kept())
    options = fitter.options
    parts = split(positions)
    for name, count in (("select", options.select_positions), ("test", options.judge_positions)):
        if count is not None:
            parts[name] = parts[name].spread(count)
    n = len(ensemble.names)
    candidates = [fitter.single(parts["fit"].positions, i) for i in range(n)]
    premise: list[Premise] = []
    if n > 1:
        averages = [fitter.average(parts["fit"].positions, pool) for pool in POOLS]
        candidates += averages
        best = min(averages, key=lambda candidate: candidate.fit_nll)
    if n > 1 and not ensemble.model.over_bytes:
        premise = _premise(ensemble, parts["fit"].subset(options.premise_positions), best)
        subset = parts["fit"].subset(options.meet_positions)
        # Minibatches are for heads that take long: one start has to do.
        begun = averages if options.batch is None else [best]
        meets = [fitter.meet(subset, _named(a), a, _first_trusts(premise, a), 1) for a in begun]
        candidates += meets
        if options.bands > 1:
            meet = min(meets, key=lambda candidate: candidate.fit_nll)
            trust = [rho for rho in meet.settings["trust"] for _ in range(options.bands)]
            candidates.append(fitter.meet(subset, f"{meet.name} by direction", meet, trust, options.bands))
    if n > 1:
        candidates += [_as_written(text, best, n) for text in options.rules]
    return fitter.judge(parts, candidates, premise)


def _remembered(loss: LossAndGradient, kept: Kept, name: str, first: int = 1) -> LossAndGradient:
    """A loss whose evaluations are kept: the same steps lead to the same points again."""
    count = itertools.count(first)

    def remembered(theta: Tensor) -> tuple[float, Tensor]:
        def find() -> dict[str, Tensor]:
            value, gradient = loss(theta)
            return {"loss": torch.tensor(value, dtype=torch.float64), "gradient": gradient}

        found = kept.one(f"{name}-{next(count):04d}", find)
        return found["loss"].item(), found["gradient"]

    return remembered


@dataclass(frozen=True)
class _Fitter:
    """Fits one candidate after another; what costs time goes through the engine."""

    ensemble: Ensemble
    options: Options
    begin: Begin
    engine: Engine
    kept: Kept

    def _found(
        self, name: str, positions: Positions, layout: Layout, pool: Pool, start: Values, *, cheap: bool, **more: Any
    ) -> tuple[Values, float, int]:
        """(values, loss, evaluations), on all positions at once or in minibatches."""
        evaluations = self.options.evaluations * (_CHEAPER if cheap else 1)
        batch = None if cheap else self.options.batch
        advance = self.begin(f"fitting {name}", 0, batch and evaluations * batch)

        def on(some: Positions) -> Loss:
            return Loss(self.engine, self.ensemble.model, some, layout, pool, on_progress=advance, **more)

        if batch is None:
            return minimise(_remembered(on(positions), self.kept, name), layout, start, evaluations)
        order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))

        def losses(k: int) -> LossAndGradient:
            rows = order[torch.arange(k * batch, (k + 1) * batch) % len(order)]
            return _remembered(lambda theta: on(positions.take(rows))(theta), self.kept, name, k + 1)

        return descend(losses, layout, start, evaluations)

    def single(self, positions: Positions, i: int) -> Candidate:
        """A member at its best temperature."""
        n, start = len(self.ensemble.names), Values((1.0,))
        values, loss, count = self._found(f"member {i}", positions, Layout(1), POOLS[0], start, cheap=True, members=[i])
        weights = [1.0 if k == i else 0.0 for k in range(n)]
        own = {"rule": POOLS[0], "weights": weights, "trust": [0.0] * n, "rule_temperature": values.temperature}
        return Candidate(distinct_names(self.ensemble)[i], own, True, loss, count)

    def average(self, positions: Positions, pool: Pool) -> Candidate:
        """A pool with weights and temperature."""
        n, free = len(self.ensemble.names), _free(self.options, pool)
        # A free scale of the weights is a logit mean's temperature already.
        layout = Layout(n, free=free, tempered=not free)
        values, loss, count = self._found(pool, positions, layout, pool, Values((1 / n,) * n), cheap=True)
        return Candidate(pool, _settings(pool, pool, values, n, self.options), True, loss, count)

    def meet(self, positions: Positions, name: str, start: Candidate, trust: Sequence[float], bands: int) -> Candidate:
        """``meet`` from the pool of ``start``, everything fitted together, from those trusts.

        A member that starts with next to no trust has none: its moments would be the costliest to meet.
        """
        n, pool = len(self.ensemble.names), start.settings["pool"]
        trusted = [i for i in range(n) if max(trust[i * bands : (i + 1) * bands]) >= NO_TRUST]
        begun = tuple(rho for i in trusted for rho in trust[i * bands : (i + 1) * bands])
        layout = Layout(n, len(begun), free=_free(self.options, pool))
        at = Values(tuple(start.settings["weights"]), start.settings["rule_temperature"], begun)
        more = {"bands": bands, "trusted": trusted}
        values, loss, count = self._found(_piece(name, bands), positions, layout, pool, at, cheap=False, **more)
        found = iter(values.trust)
        every = tuple(next(found) if i in trusted else 0.0 for i in range(n) for _ in range(bands))
        own = _settings(DEFAULT, pool, replace(values, trust=every), n, self.options) | {"bands": bands}
        return Candidate(name, own, False, loss, count)

    def _scored(self, part: str, positions: Positions, candidates: Sequence[Candidate]) -> Evaluation:
        """Candidates of as many bands at a time, so that those of one number are kept for a fit with another, too."""
        counts = [candidate.settings.get("bands", 1) for candidate in candidates]
        advance = self.begin(f"scoring the {part} part", 0, len(positions) * len(set(counts)))
        scored = []
        for bands in sorted(set(counts)):
            some = [candidate for candidate, count in zip(candidates, counts, strict=True) if count == bands]
            choices = [Choice(candidate.label, {**_DEFAULTS, **candidate.settings}) for candidate in some]
            scored.append(
                evaluate_positions(
                    self.ensemble, positions, choices, engine=self.engine, kept=self.kept, stage=_piece(part, bands),
                    on_progress=advance,
                )
            )  # fmt: skip
        return replace(scored[0], choices={name: s for one in scored for name, s in one.choices.items()})

    def judge(self, parts: dict[str, Part], candidates: list[Candidate], premise: list[Premise]) -> Fitted:
        """Choose on the second part, and have the third confirm it."""
        found = {name: self._scored(name, parts[name].positions, candidates) for name in ("select", "test")}

        def loss(candidate: Candidate) -> float:
            return found["select"].choices[candidate.label].mean

        rival = min(candidates, key=loss)
        best = min((candidate for candidate in candidates if candidate.baseline), key=loss)
        test = found["test"].choices
        difference = paired(test[rival.label].nats, test[best.label].nats, parts["test"].within)
        chosen = rival if rival is best or difference.high < 0 else best
        sizes = {
            name: {"tokens": len(part.positions), "clusters": part.within.count, "kind": part.within.kind}
            for name, part in parts.items()
        }
        return Fitted(
            candidates, chosen, rival, best, difference, found["select"], found["test"], parts["test"], premise, sizes
        )


def _first_trusts(premise: Sequence[Premise], average: Candidate) -> list[float]:
    """Each premise score, within bounds; less where the fitted average has next to no use for the member."""
    scores = [min(max(p.score, _LOW), _HIGH) if math.isfinite(p.score) else _LOW for p in premise]
    weights = average.settings["weights"]
    return [score * min(1.0, len(weights) * w / sum(weights)) for score, w in zip(scores, weights, strict=True)]


def _piece(name: str, bands: int) -> str:
    """What is kept under that name, for one number of bands."""
    return name if bands == 1 else f"{name} {bands}"


def _named(average: Candidate) -> str:
    return DEFAULT if average.name == POOLS[0] else f"{DEFAULT} from {average.name}"


def _as_written(text: str, average: Candidate, n: int) -> Candidate:
    """A rule as it is written, where nothing is named with the weights and the pool of a fitted average."""
    rule, given = parse_rule(text)
    own = {key: average.settings[key] for key in ("pool", "weights", "free_weights")} | given
    complete = Settings(**own).for_members(n).plain()
    named = {key: complete[key] for key in ("trust", "rule_temperature", *own)}
    return Candidate(text, {**named, "rule": str(rule)}, baseline=False, fit_nll=math.nan, evaluations=0)


def _free(options: Options, pool: Pool) -> bool:
    """Whether weights may sum to anything; a probability mean has no use for that."""
    return options.free_weights and pool == POOLS[0]


def _settings(rule: str, pool: Pool, values: Values, n: int, options: Options) -> dict[str, Any]:
    return {
        "rule": rule,
        "pool": pool,
        "weights": list(values.weights),
        "trust": list(values.trust) or [0.0] * n,
        "rule_temperature": values.temperature,
        "free_weights": _free(options, pool),
    }


def _premise(ensemble: Ensemble, positions: Positions, average: Candidate) -> list[Premise]:
    pool = _DEFAULTS | {
        "weights": average.settings["weights"],
        "pool": average.settings["rule"],
        "free_weights": average.settings["free_weights"],
        "rule_temperature": 1.0,
    }
    return premise_at(ensemble, [(positions.hidden, positions.targets)], **pool)


def figures(fitted: Fitted) -> dict[str, Any]:
    """What ``softmeet fit --json`` writes."""
    test, chosen, best = fitted.test, fitted.chosen, fitted.best_baseline
    against = Difference(0.0, 0.0, 0.0) if chosen is best else fitted.difference
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
            **paired(scores.nats, test.choices[best.label].nats, fitted.test_part.within).figures(),
        }
    return {
        "vocabulary": test.vocabulary,
        "chosen": chosen.settings["rule"],
        "candidate": chosen.name,
        "weights": chosen.settings["weights"],
        "trust": chosen.settings["trust"],
        "temperature": chosen.settings["rule_temperature"],
        "pool": chosen.settings.get("pool", POOLS[0]),
        "test": {"nll": test.choices[chosen.label].mean, "best_baseline": best.name, **against.figures()},
        "fell_back": fitted.fell_back,
        "rival": {"candidate": fitted.rival.name, **fitted.difference.figures()},
        "members": {name: {"nll": scores.mean} for name, scores in test.members.items()},
        "premise": [asdict(p) | {"verdict": p.verdict} for p in fitted.premise],
        "splits": fitted.sizes,
        "candidates": rows,
    }
