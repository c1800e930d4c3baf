"""Trained members on text: every rule against averaging and the best single member, with intervals by document.

Cheap rules go over all positions, slow ones over a part; a difference is paired, on the positions of the slower one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.choices import Choice
from softmeet.evaluation.intervals import Clusters, clusters, paired
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.premise import Premise
from softmeet.evaluation.study.entries import BASELINES, EXACT, MEETS, OTHERS, TRUSTS, Entry, finite
from softmeet.evaluation.study.plots import Plot
from softmeet.evaluation.study.report import Report, Table, mean_text
from softmeet.evaluation.study.runs import Cell, Json
from softmeet.hf import EnsembleConfig
from softmeet.rules.settings import DEFAULT_TRUST

MAX_ENTROPY = EXACT[0]
BASE = BASELINES[0]
# What answers where nothing is feasible: solved once for all rules.
RELAXED = MEETS[TRUSTS.index(DEFAULT_TRUST)]
KINDS = ("averages", "meet", "max-entropy", "the other rules")


@dataclass(frozen=True)
class Settings:
    """Of the tier, beside its members and text.

    Attributes:
        positions: for the averages, spread evenly over the text.
        meet: of them, for ``meet``.
        exact: of them, for ``max-entropy``.
        slow: of them, for the other rules.
        rows: a cell.
        sizes: numbers of members to try, the first so many.
        tokens: of the sample that each rule writes; 0 for none.
        premise: of the positions, for premise scores; 0 for none.
        only: a pattern that file names of documents must fit.
    """

    positions: int = 4000
    meet: int = 4000
    exact: int = 4000
    slow: int = 500
    rows: int = 50
    sizes: tuple[int, ...] = ()
    prompt: str = "And the king said"
    tokens: int = 40
    premise: int = 512
    only: str | None = None


SMOKE = Settings(positions=40, meet=20, exact=10, slow=4, rows=10, tokens=5, premise=20)


def chosen(positions: Positions, only: str | None) -> Positions:
    """Those of documents whose file name fits a pattern.

    Raises:
        InvalidInputError: none does.
    """
    if only is None:
        return positions
    fits = torch.tensor([fnmatch(Path(name).name, only) for name in positions.names])
    rows = fits[positions.document].nonzero().squeeze(-1)
    if len(rows) < 2:
        names = ", ".join(Path(name).name for name in positions.names[:4])
        raise InvalidInputError(f"expected documents whose file name fits {only!r}, found none among {names}, …")
    return positions.take(rows)


def spread(positions: Positions, count: int) -> Positions:
    """At most ``count`` of them, evenly."""
    if count >= len(positions):
        return positions
    return positions.take(torch.linspace(0, len(positions) - 1, count).round().long())


def cells(settings: Settings, ensemble: Ensemble, positions: Positions) -> Iterator[Cell]:
    """Groups of positions for each kind of rule, and for the first k members; then a sample of text by each rule."""
    for kind, entries, rows in _kinds(settings, positions):
        for k, chunk in enumerate(rows.chunks(settings.rows)):
            yield Cell(f"{kind} {k}", partial(_nats, ensemble, entries, chunk))
    for size in settings.sizes:
        part = _variant(ensemble, size)
        entries = (*BASELINES[:2], *MEETS[:4], MAX_ENTROPY)
        for k, chunk in enumerate(spread(positions, settings.meet).chunks(settings.rows)):
            yield Cell(f"first {size}: {k}", partial(_nats, part, entries, replace(chunk, hidden=chunk.hidden[:size])))
    for entry in (*BASELINES, *MEETS, *EXACT, *OTHERS) if settings.tokens else ():
        yield Cell(f"sample {entry.label}", partial(_sample, ensemble, entry, settings))


def _kinds(settings: Settings, positions: Positions) -> list[tuple[str, Sequence[Entry], Positions]]:
    every = spread(positions, settings.positions)
    kinds = [
        ("averages", BASELINES, every),
        ("meet", (BASE, *MEETS), spread(every, settings.meet)),
        ("max-entropy", (BASE, RELAXED, MAX_ENTROPY), spread(every, settings.exact)),
        ("the other rules", (BASE, RELAXED, *EXACT, *OTHERS), spread(every, settings.slow)),
    ]
    return [kind for kind in kinds if len(kind[2])]


def _nats(ensemble: Ensemble, entries: Sequence[Entry], rows: Positions) -> Json:
    choices = [Choice(entry.label, {"rule": entry.rule, **entry.options}) for entry in entries]
    found = evaluate(ensemble, rows, choices)
    rules = {
        name: {"nats": finite(s.nats), "fallbacks": s.fallbacks, "unsolved": s.unconverged, "passes": s.passes}
        for name, s in found.choices.items()
    }
    members = {name: finite(s.nats) for name, s in found.members.items()}
    return {"document": rows.document.tolist(), "members": members, "rules": rules}


def _sample(ensemble: Ensemble, entry: Entry, settings: Settings) -> Json:
    """The same prompt and seed for every rule."""
    writer = _variant(ensemble, len(ensemble.names), rule=entry.rule, **entry.options)
    return {"text": writer.generate(settings.prompt, seed=1, do_sample=True, max_new_tokens=settings.tokens)}


def _variant(ensemble: Ensemble, size: int, **settings: Any) -> Ensemble:
    """The first ``size`` members, already loaded, under other settings."""
    config = EnsembleConfig(members=ensemble.names[:size], **settings)
    return Ensemble(ensemble.model.part(range(size), config), ensemble.tokenizer)


@dataclass(frozen=True, eq=False)
class _Line:
    """One rule or member over the positions it was tried on: nats, (N,), with infinities, and their documents."""

    nats: Tensor
    document: Tensor
    fallbacks: int
    unsolved: int


def _lines(cells: Sequence[Json], what: str) -> dict[str, _Line]:
    document = torch.tensor([k for cell in cells for k in cell["document"]])
    return {name: _line([cell[what][name] for cell in cells], document) for name in cells[0][what]}


def _line(parts: Sequence[Any], document: Tensor) -> _Line:
    """From what the cells hold of a rule, or of a member, which is nats alone."""
    found = [part if isinstance(part, dict) else {"nats": part, "fallbacks": 0, "unsolved": 0} for part in parts]
    nats = [math.inf if x is None else x for part in found for x in part["nats"]]
    counts = (sum(part[name] for part in found) for name in ("fallbacks", "unsolved"))
    return _Line(torch.tensor(nats, dtype=torch.float64), document, *counts)


def report(
    settings: Settings, text: str, results: dict[str, Json], command: str, premises: Sequence[Premise]
) -> Report:
    """A table for each part of the positions and number of members, premise scores, and samples."""
    groups = {name: found for name in KINDS if (found := _picked(results, f"{name} "))}
    groups |= {f"the first {size} members": _picked(results, f"first {size}: ") for size in settings.sizes}
    members = _lines(groups["averages"], "members")
    samples = [
        f"- `{key.removeprefix('sample ')}`: {' '.join(c['text'].split())}" for key, c in results.items() if "text" in c
    ]
    return Report(
        f"{', '.join(members)} on {text}",
        command,
        [claim for name in KINDS[:2] if name in groups for claim in _claims(groups[name])],
        [*(_table(name, cells) for name, cells in groups.items()), *_premise_tables(list(members), premises)],
        [_plot(groups["meet"])] if "meet" in groups else [],
        {f"After “{settings.prompt}”, the same seed for every rule": "\n".join(samples)} if samples else {},
    )


def _picked(results: dict[str, Json], prefix: str) -> list[Json]:
    return [cell for key, cell in results.items() if key.startswith(prefix)]


def _best(lines: dict[str, _Line]) -> str:
    return min(lines, key=lambda name: lines[name].nats.mean().item())


def _table(name: str, cells: Sequence[Json]) -> Table:
    members, rules = _lines(cells, "members"), _lines(cells, "rules")
    base, best = rules[BASE.label], members[_best(members)]
    within = clusters(base.document)
    rows = []
    for label, line in [*members.items(), *rules.items()]:
        ends = [f"{line.fallbacks / len(line.nats):.1%}" if line.fallbacks else "", str(line.unsolved or "")]
        against = [_against(line, other, within) for other in (base, best)]
        rows.append([label, mean_text(finite(line.nats)), *against, *ends])
    title = f"{name}: {len(base.nats):,} positions, intervals by {within.count} {within.kind}"
    header = ("", "nats/token", f"against {BASE.label}", f"against {_best(members)}", "infeasible", "unsolved")
    return Table(title, header, rows)


def _against(ours: _Line, theirs: _Line, within: Clusters) -> str:
    if ours is theirs:
        return ""
    return "∞" if not ours.nats.isfinite().all() else str(paired(ours.nats, theirs.nats, within))


def _claims(cells: Sequence[Json]) -> list[str]:
    """The best of the rules that were tried together, against averaging and the best member."""
    members, rules = _lines(cells, "members"), _lines(cells, "rules")
    within = clusters(rules[BASE.label].document)
    # One with an infinite loss is no winner.
    winner, best, size = _best(rules), _best(members), len(within.of)
    against = paired(rules[winner].nats, members[best].nats, within)
    found = [f"{size:,} positions: of {', '.join(rules)} the least loss has `{winner}`; {against} against {best}"]
    if winner != BASE.label:
        against = paired(rules[winner].nats, rules[BASE.label].nats, within)
        sure = "excludes zero" if against.excludes_zero else "does **not** exclude zero"
        found.append(f"`{winner}` against `{BASE.label}`: {against}, which {sure}; it was chosen on the same positions")
    return found


def _premise_tables(names: Sequence[str], premises: Sequence[Premise]) -> list[Table]:
    if not premises:
        return []
    rows = [
        [name, f"{x.score:+.2f} ± {x.score_error:.2f}", f"{x.gain:+.4f} ± {x.error:.4f}", x.verdict]
        for name, x in zip(names, premises, strict=True)
    ]
    header = ("member", "score", "gain, nats", "to first order")
    return [Table("Premise scores against the uniform pool", header, rows)]


def _plot(cells: Sequence[Json]) -> Plot:
    rules = _lines(cells, "rules")
    base = rules[BASE.label]
    within = clusters(base.document)
    found = [paired(rules[entry.label].nats, base.nats, within) for entry in MEETS]
    points = [(rho, d.mean, (d.high - d.low) / 2) for rho, d in zip(TRUSTS, found, strict=True)]
    lines = {"meet": points}
    return Plot("trust", f"meet against {BASE.label}", "trust", "nats a token", lines, log_x=True, zero=True)
