"""Studies of rules with a known truth, so that the premise holds exactly or fails by a known amount.

The premise: each member's hidden state is the best for the truth, so that the member errs only because its head is too
narrow.

**Synthetic.** Random heads with normal entries, with a total width nd from v/16 to 5v/4 (n members of width d, v
tokens). Truths follow Zipf's law in a random order, or are drawn from a Dirichlet distribution; each member's hidden
state is the best for that truth. Then noise is added to the hidden states, relative to their length.

**Known truth.** Trained heads. The truth at a position is the logit mean of one family, the stronger; each member of
the other family keeps its head, and gets the hidden state that is best for that truth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from statistics import fmean
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cells import Json
from softmeet import combine
from softmeet.ensemble import Ensemble
from softmeet.evaluation.documents import Document
from softmeet.evaluation.premise import best_hidden
from softmeet.heads import SoftmaxHead
from softmeet.rules.settings import rule_of
from softmeet.rules.values import DEFAULT_TRUST
from softmeet.simplex import kl, log_normalize
from softmeet.solvers.base import Status
from studies.entries import ALL
from studies.report import LinePlot, Report, StudyTable, finite_or_none, mean_text, number

Numbers = list[float | None]
Columns = Sequence[tuple[str, list[Json]]]
# Rules that plots show.
_SHOWN = (
    "logit-mean", "prob-mean", "meet 1", "meet 10", "max-entropy", "least-squares", "min-underestimation",
    "min-reverse-cross-entropy",
)  # fmt: skip
_RATIOS = ("1/16", "1/8", "1/4", "1/2", "3/4", "7/8", "1", "5/4")
_TRUTHS = ("zipf", "dirichlet")
# Rules whose objective's range over the feasible set is shown.
_RANGED = ("min-cross-entropy", "min-squared-cross-entropy")
# The distance between positions of a text that are used.
_APART = 32
_KL = "KL(p*‖·), nats"


@dataclass(frozen=True)
class SyntheticStudy:
    """A study of rules on random heads and random truths.

    Attributes:
        v: the number of tokens.
        members: the number of members n, all of the same width d.
        rows: truths in each cell; a cell is a piece of the study's work with one set of heads.
        trials: cells of each combination of ratio, kind of truth and noise.
        ratios: values of nd/v, the heads' total width divided by the number of tokens, as fractions.
        noises: Euclidean lengths of the noise on a hidden state, relative to the state's own length; the first is 0.
        seed: the seed of everything random.
        tol: the rules' tolerance, in nats.
    """

    v: int = 256
    members: int = 2
    rows: int = 5
    trials: int = 4
    ratios: tuple[str, ...] = _RATIOS
    noises: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3)
    seed: int = 0
    tol: ClassVar[float] = 1e-8

    def cells(self) -> Iterator[tuple[str, Callable[[], Json]]]:
        """Yield (key, function) for every cell: every ratio, kind of truth, noise and trial.

        The function has no arguments, is picklable, and returns the cell's result; :meth:`Run.each` takes the pairs as
        a dict.

        A result has the cell's ``ratio``, ``truth`` (``"zipf"`` or ``"dirichlet"``) and ``noise``, and for each row
        KL(truth‖·), in nats, of ``members`` and ``rules``.
        """
        for kind in itertools.product(self.ratios, _TRUTHS, self.noises, range(self.trials)):
            yield "{} {} {:g} {}".format(*kind), partial(self._scores, *kind)

    def _scores(self, ratio: str, truth: str, noise: float, trial: int) -> Json:
        v, n, of_v = self.v, self.members, Fraction(ratio)
        d = max(1, int(of_v * v / n))
        # The same heads and truths at every noise, so that only the noise differs.
        random = _generator(self.seed, of_v.numerator, of_v.denominator, _TRUTHS.index(truth), trial)
        heads = [SoftmaxHead(torch.randn(v, d, generator=random, dtype=torch.float64)) for _ in range(n)]
        log_truth = sample_truth(truth, self.rows, v, random)
        hidden = [best_hidden(head, log_truth) for head in heads]
        log_p = torch.stack([h.log_probs(_noisy(x, noise, random)) for h, x in zip(heads, hidden, strict=True)])
        return {"ratio": ratio, "truth": truth, "noise": noise} | _score_all(heads, log_p, log_truth, self.tol)

    def report(self, results: dict[str, Json], command: str) -> Report:
        """Make the report: tables by nd/v for each noise, claims that check the theorems row by row, and two plots.

        Args:
            results: the results of all cells of :meth:`cells`, by key, as :meth:`Run.each` returns them.
            command: the command that made them, as text.
        """
        cells = list(results.values())
        exact = [c for c in cells if c["noise"] == 0]
        columns = self._by_ratio(exact)
        ranges = {rule: [_largest(cells, rule, "range") for _, cells in columns] for rule in _RANGED}
        shown = {rule: ["-" if x is None else number(x) for x in values] for rule, values in ranges.items()}
        tables = [
            *_outcomes(columns, ", where the premise holds"),
            _by_column("Largest range of the objective over the feasible set", columns, shown),
        ]
        for noise in self.noises[1:]:
            columns = self._by_ratio([c for c in cells if c["noise"] == noise])
            tables += _outcomes(columns, f", noise of {100 * noise:g} % on the hidden states")
        ratio = "1/2" if "1/2" in self.ratios else self.ratios[0]
        widths = _lines_by(exact, lambda c: float(Fraction(c["ratio"])))
        noises = _lines_by([c for c in cells if c["ratio"] == ratio], lambda c: 100 * c["noise"])
        plots = [
            LinePlot("width", "Random heads: the premise holds", "nd / v", _KL, widths),
            LinePlot("noise", f"Random heads, nd/v = {ratio}", "noise on the hidden states, %", _KL, noises),
        ]
        size = f"v = {self.v}, {self.members} members, {self.rows * self.trials} rows of each kind"
        return Report(f"Random heads, {size}", command, self._claims(exact), tables, plots)

    def _by_ratio(self, cells: list[Json]) -> Columns:
        return [(f"nd/v = {r}", [c for c in cells if c["ratio"] == r]) for r in self.ratios]

    def _claims(self, exact: list[Json]) -> list[str]:
        found = [never_worse(exact, "max-entropy", "logit-mean", self.tol)]
        if complete := [c for c in exact if Fraction(c["ratio"]) >= 1]:
            worst, rows = number(_largest(complete, "max-entropy")), len(_all_rows(complete, "max-entropy"))
            found.append(f"`max-entropy` at nd ≥ v: the largest KL to the truth of {rows} rows is {worst} nats")
        if (widest := _largest(exact, "min-cross-entropy", "range")) is not None:
            found.append(f"the LP's objective over the feasible set: largest range {number(widest)} nats")
        return found


SMOKE_SYNTHETIC = SyntheticStudy(v=64, rows=2, trials=1, ratios=("1/4", "1", "5/4"), noises=(0.0, 0.1))


def _generator(*seed: int) -> torch.Generator:
    """Make a generator whose state depends on all the integers in ``seed``."""
    state = 0
    for part in seed:
        state = (state * 1_000_003 + part + 1) % (1 << 62)
    return torch.Generator().manual_seed(state)


def sample_truth(kind: str, rows: int, v: int, random: torch.Generator) -> Float[Tensor, "B v"]:
    """Draw random distributions over v tokens, and return their log-probabilities in nats, (B, v), fp64.

    Args:
        kind: ``"zipf"`` for probabilities ∝ 1/rank, the ranks in a random order; ``"dirichlet"`` for a Dirichlet
            distribution with concentration 1/2.
        rows: the number of distributions, B.
        v: the number of tokens.
        random: the generator that is drawn from.
    """
    if kind == "zipf":
        ranks = torch.stack([torch.randperm(v, generator=random) for _ in range(rows)]).double() + 1
        return log_normalize(-ranks.log())
    # A gamma variate of shape 1/2 is half a squared normal one.
    return log_normalize(torch.randn(rows, v, generator=random, dtype=torch.float64).square().log())


def _noisy(x: Float[Tensor, "B d"], noise: float, random: torch.Generator) -> Float[Tensor, "B d"]:
    """Add normal noise to hidden states, of ``noise`` times each one's length."""
    away = torch.randn(x.shape, generator=random, dtype=x.dtype)
    ratio: Tensor = x.norm(dim=-1, keepdim=True) / away.norm(dim=-1, keepdim=True)
    return x + noise * ratio * away


@dataclass(frozen=True)
class KnownTruthStudy:
    """A study of rules on trained heads, with the logit mean of stronger members as the truth.

    Attributes:
        members: names of the members, or of the family, whose heads are used.
        truth: names of the members, or of the family, whose logit mean is the truth.
        positions: the number of positions in every document, spread evenly over its first 32 · ``positions``.
        rows: positions in each cell (a piece of the study's work).
        documents: the most documents that are used, the first ones.
        sizes: numbers k of members; for each, the first k members are combined.
        tol: the rules' tolerance, in nats.
    """

    members: tuple[str, ...] = ("narrow",)
    truth: tuple[str, ...] = ("wide",)
    positions: int = 8
    rows: int = 8
    documents: int = 20
    sizes: tuple[int, ...] = (1, 2, 3, 4)
    tol: ClassVar[float] = 1e-6

    def load(self) -> Ensemble:
        """Load the members whose heads are used, as an ensemble."""
        return Ensemble.from_pretrained(list(self.members))

    def cells(self, documents: Sequence[Document], ensemble: Ensemble) -> Iterator[tuple[str, Callable[[], Json]]]:
        """Yield (key, function) for every cell: some positions of a document, with one number of members.

        The function has no arguments, is picklable, and returns the cell's result; :meth:`Run.each` takes the pairs as
        a dict.

        A result has the number of members, ``size``, and for each row KL(truth‖·), in nats, of ``members`` and
        ``rules``. The members of ``truth`` are loaded when the first cell is asked for.

        Args:
            documents: the text.
            ensemble: the members, as :meth:`load` returns them.
        """
        heads, stronger = ensemble.model.heads, Ensemble.from_pretrained(list(self.truth), "logit-mean")
        for document in documents[: self.documents]:
            truths = self._truths(stronger, document.text)
            for start in range(0, self.positions, self.rows):
                part = truths[start : start + self.rows]
                for size in self.sizes:
                    yield f"{document.name} {start} {size}", partial(self._scores, heads[:size], part)

    @torch.inference_mode()
    def _truths(self, ensemble: Ensemble, text: str) -> Float[Tensor, "B v"]:
        """Return the pool's log-probabilities at positions spread over a text's beginning: neighbours are similar."""
        seen = ensemble.positions(text, _APART * self.positions)
        plain = ensemble.model.settings.ungated()
        every = torch.cat([ensemble.model.combiner.solve_rows(hidden, plain)[1].log_probs for hidden, _ in seen])
        return log_normalize(every[torch.linspace(0, len(every) - 1, self.positions).long()].double())

    @torch.inference_mode()
    def _scores(self, heads: Sequence[SoftmaxHead], log_truth: Float[Tensor, "B v"]) -> Json:
        log_p = torch.stack([head.log_probs(best_hidden(head, log_truth)) for head in heads])
        return {"size": len(heads)} | _score_all(heads, log_p, log_truth, self.tol)

    def report(self, results: dict[str, Json], command: str) -> Report:
        """Make the report: tables with a column for each number of members, a claim and a plot.

        Args:
            results: the results of all cells of :meth:`cells`, by key, as :meth:`Run.each` returns them.
            command: the command that made them, as text.
        """
        cells = list(results.values())
        columns = [(f"n = {k}", [c for c in cells if c["size"] == k]) for k in self.sizes]
        several = [c for c in cells if c["size"] > 1]
        lines = _lines_by(cells, lambda c: float(c["size"]))
        return Report(
            f"Trained heads, known truths: {len(_all_rows(columns[0][1], 'logit-mean'))} contexts of held-out text",
            command,
            [never_worse(several, "max-entropy", "logit-mean", self.tol)],
            _outcomes(columns),
            [LinePlot("members", "Trained heads: the premise holds", "members", _KL, lines, count=True)],
        )


SMOKE_KNOWN_TRUTH = KnownTruthStudy(positions=2, rows=2, documents=2, sizes=(2,))


def _score_all(
    heads: Sequence[SoftmaxHead], log_p: Float[Tensor, "n B v"], log_truth: Float[Tensor, "B v"], tol: float
) -> dict[str, Any]:
    """Compare every member and every rule with a known truth.

    Args:
        heads: the members' heads.
        log_p: the members' log-probabilities in nats, fp64.
        log_truth: the true log-probabilities in nats.
        tol: the rules' tolerance, in nats.

    Returns:
        ``members``, the KL(truth‖p̂_i) of each member and row in nats, None if infinite, p̂_i the member's
        distribution; and ``rules``, for each name ``kl``, the KL(truth‖answer) of each row; the numbers of rows that
        are ``infeasible`` (even if the fallback answered), ``degenerate`` (every feasible distribution is optimal) or
        ``unsolved``; and ``range``, the difference between the objective's largest and least value over the feasible
        set, of the rows in which it is known.
    """
    members = [finite_or_none(kl(log_truth, own.double())) for own in log_p]
    rules = {}
    for entry in ALL:
        found = combine(log_p, heads, **entry.settings, tol=tol, max_steps=100)
        proved = torch.stack([lam.ne(0).any(-1) for lam in found.proof]).any(0)
        least, most = found.objective_range
        rules[entry.name] = {
            "kl": finite_or_none(kl(log_truth, found.log_probs.double())),
            "infeasible": int((found.fallback | proved).sum()),
            "degenerate": int((found.status == Status.DEGENERATE).sum()),
            "unsolved": int((found.status == Status.NOT_CONVERGED).sum()),
            "range": finite_or_none((most - least)[~found.fallback & ~least.isnan()]),
        }
    return {"members": members, "rules": rules}


def _all_rows(cells: Iterable[Json], rule: str, what: str = "kl") -> Numbers:
    """Return one rule's values over all rows of some cells."""
    return [x for cell in cells for x in cell["rules"][rule].get(what, [])]


def _largest(cells: list[Json], rule: str, what: str = "kl") -> float | None:
    """Return the largest value of a rule; None if one is infinite or there is none."""
    values = _all_rows(cells, rule, what)
    return None if not values or None in values else max(x for x in values if x is not None)


def _outcomes(columns: Columns, where: str = "") -> list[StudyTable]:
    """Make a table of how far each rule is from the truth, and one of how its rows ended.

    Args:
        columns: pairs of (a column's name, its cells).
        where: the end of the tables' titles.
    """
    return [
        _distances(f"KL(p*‖·), nats{where}", columns),
        _endings(f"Rows with a feasible distribution{where}", columns),
    ]


def _by_column(title: str, columns: Columns, rows: Mapping[str, Sequence[str]]) -> StudyTable:
    """Make a table with a row for each rule and a column for each group of cells."""
    return StudyTable(title, ["rule", *(name for name, _ in columns)], [[name, *row] for name, row in rows.items()])


def _distances(title: str, columns: Columns) -> StudyTable:
    """Make a table of every rule's mean KL from the truth, and of each row's best member; the least are in bold."""
    text = {"best member of each row": [mean_text(_best_member(cells)) for _, cells in columns]}
    text |= {entry.name: [mean_text(_all_rows(cells, entry.name)) for _, cells in columns] for entry in ALL}
    for k in range(len(columns)):
        finite = [float(row[k]) for row in text.values() if "∞" not in row[k] and row[k] != "-"]
        for row in text.values():
            # Rules that are equal after rounding are all in bold.
            if finite and "∞" not in row[k] and round(float(row[k]), 4) == round(min(finite), 4):
                row[k] = f"**{row[k]}**"
    return _by_column(title, columns, text)


def _best_member(cells: Iterable[Json]) -> Numbers:
    """Return each row's least KL over members, which no choice of a single member for all rows can beat."""
    rows = (row for cell in cells for row in zip(*cell["members"], strict=True))
    return [min((x for x in row if x is not None), default=None) for row in rows]


def _endings(title: str, columns: Columns) -> StudyTable:
    """Make a table of each rule's share of rows with a feasible distribution, and its number of unsolved rows."""

    def ending(cells: list[Json], rule: str) -> str:
        infeasible, unsolved = (sum(cell["rules"][rule][what] for cell in cells) for what in ("infeasible", "unsolved"))
        share = 100 * (1 - infeasible / max(len(_all_rows(cells, rule)), 1))
        return f"{share:.0f} %" + (f", {unsolved} unsolved" if unsolved else "")

    exact = [entry.name for entry in ALL if rule_of(entry.settings["rule"]).is_feasible]
    title += f" (where there is none `meet` at trust {DEFAULT_TRUST:g} answers, but for least squares)"
    return _by_column(title, columns, {rule: [ending(cells, rule) for _, cells in columns] for rule in exact})


def never_worse(cells: list[Json], ours: str, theirs: str, within: float) -> str:
    """State in a sentence whether ``ours`` has in no row a larger KL(truth‖answer) than ``theirs``.

    Args:
        cells: results of the cells whose rows are compared, as the functions of ``cells`` in a study return them.
        ours, theirs: names of rules in the study, such as ``max-entropy`` or ``meet 1``.
        within: the difference in nats up to which a larger KL does not count; an infinite one of ``ours`` always does.
    """
    a, b = _all_rows(cells, ours), _all_rows(cells, theirs)
    worse = [x - y for x, y in zip(a, b, strict=True) if x is not None and y is not None and x > y + within]
    lost = sum(x is None for x in a)
    verdict = "holds in" if not worse and not lost else f"**fails** in {len(worse) + lost} of"
    extra = f" (by up to {number(max(worse))} nats)" if worse else ""
    return f"`{ours}` is never worse than `{theirs}`: {verdict} {len(a)} rows{extra}"


def _lines_by(cells: list[Json], x: Callable[[Json], float]) -> dict[str, list[tuple[float, ...]]]:
    """Return, for each rule that plots show, points (x, mean KL), without those at which a KL is infinite."""
    lines: dict[str, list[tuple[float, ...]]] = {rule: [] for rule in _SHOWN}
    for place in sorted({x(c) for c in cells}):
        here = [c for c in cells if x(c) == place]
        for rule, points in lines.items():
            values = _all_rows(here, rule)
            if None not in values:
                points.append((place, fmean(v for v in values if v is not None)))
    return lines
