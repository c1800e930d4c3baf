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

from softmeet.evaluation.family import best_hidden
from softmeet.evaluation.study.entries import Rows, generator, score_all
from softmeet.evaluation.study.plots import Plot
from softmeet.evaluation.study.report import Report, Table, number
from softmeet.evaluation.study.runs import Cell, Json
from softmeet.evaluation.study.summary import gathered, largest, lines_by, never_worse, outcomes
from softmeet.heads import SoftmaxHead
from softmeet.simplex import log_normalize

RATIOS = tuple(Fraction(x) for x in ("1/16", "1/8", "1/4", "1/2", "3/4", "7/8", "1", "5/4"))
TRUTHS = ("zipf", "dirichlet")
NOISES = (0.0, 0.01, 0.03, 0.1, 0.3)
TOL = 1e-8
# Labels of the entries whose objective's range over the feasible set is shown.
_RANGED = ("min-cross-entropy", "min-squared-cross-entropy")


@dataclass(frozen=True)
class Settings:
    """Of the tier: v tokens, n members; a cell is one set of heads with ``rows`` truths, ``trials`` of each kind."""

    v: int = 256
    members: int = 2
    rows: int = 5
    trials: int = 4
    ratios: tuple[str, ...] = tuple(map(str, RATIOS))
    noises: tuple[float, ...] = NOISES
    seed: int = 0


SMOKE = Settings(v=64, rows=2, trials=1, ratios=("1/4", "1", "5/4"), noises=(0.0, 0.1))


def cells(settings: Settings) -> Iterator[Cell]:
    """Every ratio, kind of truth, noise and trial."""
    kinds = itertools.product(settings.ratios, TRUTHS, settings.noises, range(settings.trials))
    for ratio, truth, noise, trial in kinds:
        yield Cell(f"{ratio} {truth} {noise:g} {trial}", partial(_scores, settings, ratio, truth, noise, trial))


def _scores(settings: Settings, ratio: str, truth: str, noise: float, trial: int) -> Json:
    v, n, of_v = settings.v, settings.members, Fraction(ratio)
    d = max(1, int(of_v * v / n))
    # The same heads and truths at every noise, so that only the noise differs.
    random = generator(settings.seed, of_v.numerator, of_v.denominator, TRUTHS.index(truth), trial)
    heads = [SoftmaxHead(torch.randn(v, d, generator=random, dtype=torch.float64)) for _ in range(n)]
    log_truth = sample_truth(truth, settings.rows, v, random)
    hidden = [best_hidden(head, log_truth) for head in heads]
    log_p = torch.stack([h.log_probs(_noisy(x, noise, random)) for h, x in zip(heads, hidden, strict=True)])
    kind = {"ratio": ratio, "truth": truth, "noise": noise}
    return kind | score_all(Rows(heads, log_p, log_truth), TOL)


def sample_truth(kind: str, rows: int, v: int, random: torch.Generator) -> Float[Tensor, "B v"]:
    """Log-probabilities in nats, fp64: ``zipf`` in a random order, or ``dirichlet`` with concentration 1/2."""
    if kind == "zipf":
        ranks = torch.stack([torch.randperm(v, generator=random) for _ in range(rows)]).double() + 1
        return log_normalize(-ranks.log())
    # A gamma variate of shape 1/2 is half a squared normal one.
    return log_normalize(torch.randn(rows, v, generator=random, dtype=torch.float64).square().log())


def _noisy(x: Float[Tensor, "B d"], noise: float, random: torch.Generator) -> Float[Tensor, "B d"]:
    away = torch.randn(x.shape, generator=random, dtype=x.dtype)
    ratio: Tensor = x.norm(dim=-1, keepdim=True) / away.norm(dim=-1, keepdim=True)
    return x + noise * ratio * away


def report(settings: Settings, results: dict[str, Json], command: str) -> Report:
    """Tables by nd/v and by noise, the theorems checked row by row, and two plots."""
    cells = list(results.values())
    exact = [c for c in cells if c["noise"] == 0]
    columns = _by_ratio(settings, exact)
    tables = [*outcomes(columns, ", where the premise holds"), _ranges(columns)]
    for noise in settings.noises[1:]:
        columns = _by_ratio(settings, [c for c in cells if c["noise"] == noise])
        tables += outcomes(columns, f", noise of {100 * noise:g} % on the hidden states")
    size, lines = settings.rows * settings.trials, lines_by(exact, lambda c: float(Fraction(c["ratio"])))
    return Report(
        f"Random heads, v = {settings.v}, {settings.members} members, {size} rows of each kind",
        command,
        _claims(exact),
        tables,
        [
            Plot("width", "Random heads: the premise holds", "nd / v", "KL(p*‖·), nats", lines),
            _against_noise(settings, cells),
        ],
    )


def _by_ratio(settings: Settings, cells: list[Json]) -> list[tuple[str, list[Json]]]:
    return [(f"nd/v = {r}", [c for c in cells if c["ratio"] == r]) for r in settings.ratios]


def _claims(exact: list[Json]) -> list[str]:
    found = [never_worse(exact, "max-entropy", "logit-mean", TOL)]
    complete = [c for c in exact if Fraction(c["ratio"]) >= 1]
    if complete:
        worst, rows = largest(complete, "max-entropy"), len(gathered(complete, "max-entropy"))
        text = "∞" if worst is None else number(worst)
        found.append(f"`max-entropy` at nd ≥ v: the largest KL to the truth of {rows} rows is {text} nats")
    widest = largest(exact, "min-cross-entropy", "range")
    if widest is not None:
        found.append(f"the LP's objective over the feasible set: largest range {number(widest)} nats")
    return found


def _ranges(columns: list[tuple[str, list[Json]]]) -> Table:
    rows = []
    for label in _RANGED:
        values = [largest(cells, label, "range") for _, cells in columns]
        rows.append([label, *("-" if x is None else number(x) for x in values)])
    return Table("Largest range of the objective over the feasible set", ["rule", *(name for name, _ in columns)], rows)


def _against_noise(settings: Settings, cells: list[Json]) -> Plot:
    ratio = "1/2" if "1/2" in settings.ratios else settings.ratios[0]
    lines = lines_by([c for c in cells if c["ratio"] == ratio], lambda c: 100 * c["noise"])
    return Plot("noise", f"Random heads, nd/v = {ratio}", "noise on the hidden states, %", "KL(p*‖·), nats", lines)
