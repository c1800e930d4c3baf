"""Random heads and a known truth: what each rule makes of members that err by their width alone, or by more.

For nd/v from 1/16 to 5/4: heads with normal entries, truths from Zipf's law in a random order and from a Dirichlet
distribution, each member's hidden state the best for that truth, so that the premise holds exactly. Then noise on the
hidden states, relative to their length, so that it fails by a known amount.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.evaluation.premise import best_hidden
from softmeet.evaluation.study.entries import score_all
from softmeet.evaluation.study.report import (
    Columns,
    LinePlot,
    Report,
    all_rows,
    by_column,
    largest,
    lines_by,
    never_worse,
    number,
    outcomes,
)
from softmeet.evaluation.study.runs import Cell, Json
from softmeet.heads import SoftmaxHead
from softmeet.simplex import log_normalize

RATIOS = ("1/16", "1/8", "1/4", "1/2", "3/4", "7/8", "1", "5/4")
TRUTHS = ("zipf", "dirichlet")
NOISES = (0.0, 0.01, 0.03, 0.1, 0.3)
TOL = 1e-8
# Rules whose objective's range over the feasible set is shown.
_RANGED = ("min-cross-entropy", "min-squared-cross-entropy")


@dataclass(frozen=True)
class SyntheticSettings:
    """The size of the study.

    Attributes:
        v: tokens.
        members: how many.
        rows: truths of a cell, which is one set of heads.
        trials: cells of each kind.
        ratios: of the heads' total width to v.
        noises: on the hidden states, relative to their length.
        seed: of everything random.
    """

    v: int = 256
    members: int = 2
    rows: int = 5
    trials: int = 4
    ratios: tuple[str, ...] = RATIOS
    noises: tuple[float, ...] = NOISES
    seed: int = 0


SMOKE = SyntheticSettings(v=64, rows=2, trials=1, ratios=("1/4", "1", "5/4"), noises=(0.0, 0.1))


def cells(settings: SyntheticSettings) -> Iterator[Cell]:
    """Yield a cell for every ratio, kind of truth, noise and trial."""
    kinds = itertools.product(settings.ratios, TRUTHS, settings.noises, range(settings.trials))
    for ratio, truth, noise, trial in kinds:
        yield Cell(f"{ratio} {truth} {noise:g} {trial}", partial(_scores, settings, ratio, truth, noise, trial))


def _scores(settings: SyntheticSettings, ratio: str, truth: str, noise: float, trial: int) -> Json:
    v, n, of_v = settings.v, settings.members, Fraction(ratio)
    d = max(1, int(of_v * v / n))
    # The same heads and truths at every noise, so that only the noise differs.
    random = _generator(settings.seed, of_v.numerator, of_v.denominator, TRUTHS.index(truth), trial)
    heads = [SoftmaxHead(torch.randn(v, d, generator=random, dtype=torch.float64)) for _ in range(n)]
    log_truth = sample_truth(truth, settings.rows, v, random)
    hidden = [best_hidden(head, log_truth) for head in heads]
    log_p = torch.stack([h.log_probs(_noisy(x, noise, random)) for h, x in zip(heads, hidden, strict=True)])
    return {"ratio": ratio, "truth": truth, "noise": noise} | score_all(heads, log_p, log_truth, TOL)


def _generator(*seed: int) -> torch.Generator:
    """Make a generator that depends on all of ``seed``."""
    state = 0
    for part in seed:
        state = (state * 1_000_003 + part + 1) % (1 << 62)
    return torch.Generator().manual_seed(state)


def sample_truth(kind: str, rows: int, v: int, random: torch.Generator) -> Float[Tensor, "B v"]:
    """Draw log-probabilities in nats, fp64.

    Args:
        kind: ``zipf`` for Zipf's law in a random order, or ``dirichlet``, with concentration 1/2.
        rows: how many distributions.
        v: over how many tokens.
        random: what they are drawn from.
    """
    if kind == "zipf":
        ranks = torch.stack([torch.randperm(v, generator=random) for _ in range(rows)]).double() + 1
        return log_normalize(-ranks.log())
    # A gamma variate of shape 1/2 is half a squared normal one.
    return log_normalize(torch.randn(rows, v, generator=random, dtype=torch.float64).square().log())


def _noisy(x: Float[Tensor, "B d"], noise: float, random: torch.Generator) -> Float[Tensor, "B d"]:
    away = torch.randn(x.shape, generator=random, dtype=x.dtype)
    ratio: Tensor = x.norm(dim=-1, keepdim=True) / away.norm(dim=-1, keepdim=True)
    return x + noise * ratio * away


def report(settings: SyntheticSettings, results: dict[str, Json], command: str) -> Report:
    """Make tables by nd/v and by noise, claims that check the theorems row by row, and two plots."""
    cells = list(results.values())
    exact = [c for c in cells if c["noise"] == 0]
    columns = _by_ratio(settings, exact)
    ranges = {rule: [largest(cells, rule, "range") for _, cells in columns] for rule in _RANGED}
    shown = {rule: ["-" if x is None else number(x) for x in values] for rule, values in ranges.items()}
    tables = [
        *outcomes(columns, ", where the premise holds"),
        by_column("Largest range of the objective over the feasible set", columns, shown),
    ]
    for noise in settings.noises[1:]:
        columns = _by_ratio(settings, [c for c in cells if c["noise"] == noise])
        tables += outcomes(columns, f", noise of {100 * noise:g} % on the hidden states")
    ratio = "1/2" if "1/2" in settings.ratios else settings.ratios[0]
    widths = lines_by(exact, lambda c: float(Fraction(c["ratio"])))
    noises = lines_by([c for c in cells if c["ratio"] == ratio], lambda c: 100 * c["noise"])
    kl, size = "KL(p*‖·), nats", settings.rows * settings.trials
    return Report(
        f"Random heads, v = {settings.v}, {settings.members} members, {size} rows of each kind",
        command,
        _claims(exact),
        tables,
        [
            LinePlot("width", "Random heads: the premise holds", "nd / v", kl, widths),
            LinePlot("noise", f"Random heads, nd/v = {ratio}", "noise on the hidden states, %", kl, noises),
        ],
    )


def _by_ratio(settings: SyntheticSettings, cells: list[Json]) -> Columns:
    return [(f"nd/v = {r}", [c for c in cells if c["ratio"] == r]) for r in settings.ratios]


def _claims(exact: list[Json]) -> list[str]:
    found = [never_worse(exact, "max-entropy", "logit-mean", TOL)]
    if complete := [c for c in exact if Fraction(c["ratio"]) >= 1]:
        worst, rows = number(largest(complete, "max-entropy")), len(all_rows(complete, "max-entropy"))
        found.append(f"`max-entropy` at nd ≥ v: the largest KL to the truth of {rows} rows is {worst} nats")
    if (widest := largest(exact, "min-cross-entropy", "range")) is not None:
        found.append(f"the LP's objective over the feasible set: largest range {number(widest)} nats")
    return found
