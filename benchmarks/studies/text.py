"""A study of trained members on text: every rule against averaging and the best single member, with intervals.

Fast rules are scored at all positions, slow ones at a part of them. A difference is paired, over the positions at
which both rules were scored; intervals are by document, or by blocks of text if there are few documents.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cells import Json
from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.intervals import clusters, paired
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.premise import Premise
from softmeet.hf import EnsembleConfig
from softmeet.rules.endings import endings
from softmeet.rules.values import DEFAULT_TRUST
from studies.entries import BASELINES, EXACT, MEETS, OTHERS, TRUSTS
from studies.report import LinePlot, Report, StudyTable, finite_or_none, mean_text

MAX_ENTROPY = EXACT[0]
BASE = BASELINES[0]
# The fallback of rows without a feasible distribution; as a choice of its own it is solved once for all rules.
RELAXED = MEETS[TRUSTS.index(DEFAULT_TRUST)]
KINDS = ("averages", "meet", "max-entropy", "the other rules")


@dataclass(frozen=True)
class TextStudy:
    """A study of members on text: which rules are scored at how many positions.

    Attributes:
        positions: the most positions for the averages, spread evenly over the text; those for ``meet``, ``exact`` and
            ``slow`` are taken from these, evenly spread.
        meet: the most positions for ``meet``, at every trust.
        exact: the most positions for ``max-entropy``.
        slow: the most positions for the other rules.
        rows: positions in each cell (a piece of the study's work).
        sizes: numbers k of members; for each, averages, ``meet`` and ``max-entropy`` are also scored with only the
            first k members, at ``meet`` positions.
        prompt: the text that each rule continues as a sample.
        tokens: the length of these samples in tokens; 0 for no samples.
        premise: the most positions for premise scores, which the caller computes (:func:`premise_at`); 0 for none.
        only: a pattern such as ``*.py`` that documents' file names have to match, which the caller applies
            (:func:`chosen`); None for all documents.
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

    def cells(self, ensemble: Ensemble, positions: Positions) -> Iterator[tuple[str, Callable[[], Json]]]:
        """Yield (key, function) for each cell: scores of rules at some positions, or a sample.

        The function has no arguments, is picklable, and returns the cell's result; :meth:`Run.each` takes the pairs as
        a dict.

        Scores are ``document`` (its index, by position), ``members`` (by name, the losses in nats) and ``rules`` (by
        name, ``nats``, and the counts ``fallbacks``, ``statuses``, ``unsolved`` and ``passes``). A sample is ``text``.

        Args:
            ensemble: the members, over tokens.
            positions: of the text, with hidden states, as :func:`observe_text` or :meth:`Trace.read` returns them.
        """
        every = spread(positions, self.positions)
        kinds: list[tuple[str, Sequence[RuleChoice], int]] = [
            ("averages", BASELINES, self.positions),
            ("meet", (BASE, *MEETS), self.meet),
            ("max-entropy", (BASE, RELAXED, MAX_ENTROPY), self.exact),
            ("the other rules", (BASE, RELAXED, *EXACT, *OTHERS), self.slow),
        ]
        for kind, entries, count in kinds:
            for k, chunk in enumerate(spread(every, count).chunks(self.rows)):
                yield f"{kind} {k}", partial(_nats, ensemble, entries, chunk)
        for size in self.sizes:
            part = _variant(ensemble, size)
            entries = (*BASELINES[:2], *MEETS[:4], MAX_ENTROPY)
            for k, chunk in enumerate(spread(positions, self.meet).chunks(self.rows)):
                rows = replace(chunk, hidden=chunk.hidden[:size])
                yield f"first {size}: {k}", partial(_nats, part, entries, rows)
        for entry in (*BASELINES, *MEETS, *EXACT, *OTHERS) if self.tokens else ():
            yield f"sample {entry.name}", partial(self._sample, ensemble, entry)

    def _sample(self, ensemble: Ensemble, entry: RuleChoice) -> Json:
        """Return a continuation of the prompt by one rule; prompt and seed are the same for every rule."""
        writer = _variant(ensemble, len(ensemble.names), **entry.settings)
        return {"text": writer.generate(self.prompt, seed=1, do_sample=True, max_new_tokens=self.tokens)}

    def report(self, text: str, results: dict[str, Json], command: str, premises: Sequence[Premise]) -> Report:
        """Make the report: tables for each group of rules and number of members, premise scores, a plot, and samples.

        Args:
            text: the text's name, for the title.
            results: the cells' results, by key, as :meth:`Run.each` returns them; all cells of :meth:`cells`.
            command: the command that made them, as text.
            premises: the result of the premise test for each member, in order, as :func:`premise_at` returns them;
                empty for no table of these.
        """
        prefixes = {name: f"{name} " for name in KINDS} | {f"the first {k} members": f"first {k}: " for k in self.sizes}
        picked = {
            name: [cell for key, cell in results.items() if key.startswith(prefix)] for name, prefix in prefixes.items()
        }
        groups = {name: _Group(cells) for name, cells in picked.items() if cells}
        members = groups["averages"].members
        samples = [
            f"- `{key.removeprefix('sample ')}`: {' '.join(c['text'].split())}"
            for key, c in results.items()
            if "text" in c
        ]
        return Report(
            f"{', '.join(members)} on {text}",
            command,
            [
                *(claim for name in KINDS[:2] if name in groups for claim in _claims(groups[name])),
                *(ending for group in groups.values() for ending in group.endings()),
            ],
            [*(_table(name, group) for name, group in groups.items()), *_premise_tables(list(members), premises)],
            [_plot(groups["meet"])] if "meet" in groups else [],
            {f"After “{self.prompt}”, the same seed for every rule": "\n".join(samples)} if samples else {},
        )


SMOKE = TextStudy(positions=40, meet=20, exact=10, slow=4, rows=10, tokens=5, premise=20)


def chosen(positions: Positions, only: str | None) -> Positions:
    """Return the positions of documents whose file name matches ``only``, such as ``*.py``; all if it is None.

    The file name is the last part of the document's name, without folders.

    Raises:
        InvalidInputError: if fewer than two positions remain.
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
    """Return ``count`` of the positions, evenly spread from the first to the last, in order; all if there are fewer."""
    if count >= len(positions):
        return positions
    return positions.take(torch.linspace(0, len(positions) - 1, count).round().long())


def _nats(ensemble: Ensemble, entries: Sequence[RuleChoice], rows: Positions) -> Json:
    """Score some rules and the members at some positions; return losses in nats (None if infinite) and counts."""
    found = evaluate(ensemble, rows, entries)
    rules = {
        name: {
            "nats": finite_or_none(s.nats),
            "fallbacks": s.fallbacks,
            "unsolved": s.statuses.get("NOT_CONVERGED", 0) + s.statuses.get("BUDGET", 0),
            "statuses": s.statuses,
            "passes": s.passes,
        }
        for name, s in found.choices.items()
    }
    members = {name: finite_or_none(s.nats) for name, s in found.members.items()}
    return {"document": rows.document.tolist(), "members": members, "rules": rules}


def _variant(ensemble: Ensemble, size: int, **settings: Any) -> Ensemble:
    """Make an ensemble of the first ``size`` members, which are shared, not loaded again, under other settings."""
    config = EnsembleConfig(members=ensemble.names[:size], **settings)
    return Ensemble(ensemble.model.part(range(size), config), ensemble.tokenizer)


class _Group:
    """The joined results of one kind's cells: losses in nats, (N,), by member and rule, and the positions' clusters."""

    def __init__(self, cells: Sequence[Json]) -> None:
        def whole(kind: str, nats: Callable[[Any], list[float | None]]) -> dict[str, Tensor]:
            values = {name: [x for cell in cells for x in nats(cell[kind][name])] for name in cells[0][kind]}
            return {
                name: torch.tensor([math.inf if x is None else x for x in own], dtype=torch.float64)
                for name, own in values.items()
            }

        self.cells = cells
        self.within = clusters(torch.tensor([k for cell in cells for k in cell["document"]]))
        self.members = whole("members", lambda nats: nats)
        self.rules = whole("rules", lambda found: found["nats"])
        # A rule with an infinite loss cannot be the best.
        self.best_member, self.best_rule = (
            min(own, key=lambda name: own[name].mean().item()) for own in (self.members, self.rules)
        )

    def counted(self, rule: str, what: str) -> int:
        """Return the number of a rule's positions that ended in ``what``, such as ``fallbacks``; of a member, 0."""
        return sum(cell["rules"][rule][what] for cell in self.cells if rule in self.rules)

    def endings(self) -> list[str]:
        """Return a sentence for each rule and each way in which it did not simply solve some of the positions."""
        found = []
        for rule in self.rules:
            statuses: Counter[str] = Counter()
            for cell in self.cells:
                statuses.update(cell["rules"][rule]["statuses"])
            found += [f"`{rule}`: {ending}" for ending in endings(statuses, self.counted(rule, "fallbacks"))]
        return found

    def against(self, ours: Tensor, theirs: Tensor) -> str:
        """Return the paired difference of two losses with its interval, as text."""
        if ours is theirs:
            return ""
        return str(paired(ours, theirs, self.within)) if ours.isfinite().all() else "∞"


def _table(name: str, group: _Group) -> StudyTable:
    base, best = group.rules[BASE.name], group.members[group.best_member]
    rows = []
    for label, nats in [*group.members.items(), *group.rules.items()]:
        fallbacks, unsolved = (group.counted(label, what) for what in ("fallbacks", "unsolved"))
        ends = [f"{fallbacks / len(nats):.1%}" if fallbacks else "", str(unsolved or "")]
        against = [group.against(nats, other) for other in (base, best)]
        rows.append([label, mean_text(finite_or_none(nats)), *against, *ends])
    title = f"{name}: {len(base):,} positions, intervals by {group.within.count} {group.within.kind}"
    header = ("", "nats/token", f"against {BASE.name}", f"against {group.best_member}", "infeasible", "unsolved")
    return StudyTable(title, header, rows)


def _claims(group: _Group) -> list[str]:
    """State which rule of a group has the least loss, and its difference from the best member and from averaging."""
    winner, best, base = group.best_rule, group.best_member, group.rules[BASE.name]
    against = paired(group.rules[winner], group.members[best], group.within)
    found = [
        f"{len(base):,} positions: of {', '.join(group.rules)} the least loss has `{winner}`; {against} against {best}"
    ]
    if winner != BASE.name:
        against = paired(group.rules[winner], base, group.within)
        sure = "excludes zero" if against.excludes_zero else "does **not** exclude zero"
        found.append(f"`{winner}` against `{BASE.name}`: {against}, which {sure}; it was chosen on the same positions")
    return found


def _premise_tables(names: Sequence[str], premises: Sequence[Premise]) -> list[StudyTable]:
    if not premises:
        return []
    rows = [
        [name, f"{x.score:+.2f} ± {x.score_error:.2f}", f"{x.gain:+.4f} ± {x.error:.4f}", x.verdict]
        for name, x in zip(names, premises, strict=True)
    ]
    header = ("member", "score", "gain, nats", "to first order")
    return [StudyTable("Premise scores against the uniform pool", header, rows)]


def _plot(group: _Group) -> LinePlot:
    found = [paired(group.rules[entry.name], group.rules[BASE.name], group.within) for entry in MEETS]
    lines = {"meet": [(rho, d.mean, (d.high - d.low) / 2) for rho, d in zip(TRUSTS, found, strict=True)]}
    return LinePlot("trust", f"meet against {BASE.name}", "trust", "nats a token", lines, log_x=True, zero=True)
