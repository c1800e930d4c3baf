"""Rows under a gate in the running batch: who is asked, catching up, and what that saves.

By ``unsure`` the first member of a row is in its batch as ever. The others keep the row beside theirs, behind by any
number of tokens, and catch up where the first is unsure: all rows that need a member at a step together.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.hf.combining import Deferral
from softmeet.hf.recorder import Savings
from softmeet.rules.solution import Solution
from softmeet.server.batch import MemberBatch
from softmeet.server.metrics import Metrics
from softmeet.server.row import Row
from softmeet.server.work import Combination

# Each member's hidden states at some positions of a row.
Hidden = list[Float[Tensor, "t _"]]


class Gates:
    """What the engine asks about rows under gates.

    Args:
        batches: of every member.
        each: ``map``, or one that uses threads.
        metrics: where to count.
    """

    def __init__(
        self, batches: Mapping[PreTrainedModel, MemberBatch], each: Callable[..., list[Any]], metrics: Metrics
    ) -> None:
        self._batches, self._each, self._metrics = batches, each, metrics
        self._savings: dict[tuple[Any, ...], Savings] = defaultdict(Savings)

    def over_prompt(self, row: Row, first: Float[Tensor, "t d"]) -> tuple[Hidden, Deferral | None]:
        """(every member's hidden states over a prompt, who was asked), for a prompt whose tokens are scored."""
        gate, model = row.sequence.work.combination.unsure, row.sequence.work.combination.model
        if gate is None:
            return [first], None
        asked = Deferral.of(model.heads[0], gate, first)
        if not bool(asked.rows.any()):
            return [first, *_nothing(model, first)], asked
        hidden = self._caught_up([row], every=True)[row]
        row.ahead = [states[-1:] for states in hidden]
        return [first, *hidden], asked

    def ask(self, first: Mapping[Row, Float[Tensor, "1 d"]]) -> dict[Row, Hidden]:
        """Every member's hidden states at the newest token of rows under ``unsure``, from the first member's.

        Rows note who was asked; those that were not get zeros.
        """
        groups: dict[Combination, list[Row]] = defaultdict(list)
        for row in first:
            groups[row.sequence.work.combination].append(row)
        for combination, rows in groups.items():
            assert combination.unsure is not None
            stacked = torch.cat([first[row] for row in rows])
            asked = Deferral.of(combination.model.heads[0], combination.unsure, stacked)
            for k, row in enumerate(rows):
                row.asked, row.spent = asked.take(slice(k, k + 1)), 0.0
        is_open = [row for row in first if row.asked is not None and bool(row.asked.rows)]
        started = time.perf_counter()
        found = {row: row.ahead for row in is_open if row.ahead}
        found |= self._caught_up([row for row in is_open if not row.ahead])
        for row in is_open:
            row.spent = (time.perf_counter() - started) / len(is_open)
        hidden = {}
        for row, own in first.items():
            others = [states[-1:] for states in found[row]] if row in found else _nothing(_model(row), own)
            hidden[row], row.ahead = [own, *others], []
        return hidden

    def _caught_up(self, rows: Sequence[Row], *, every: bool = False) -> dict[Row, Hidden]:
        """The hidden states of all but the first member at what they had not run of some rows."""
        work: dict[PreTrainedModel, list[tuple[Row, int]]] = defaultdict(list)
        for row in rows:
            for i, model in enumerate(row.members[1:]):
                work[model].append((row, i))

        def run(model: PreTrainedModel) -> Any:
            own = [(r.trails[i], r.tokens, len(r.sequence.prompt), every) for r, i in work[model]]
            return self._batches[model].catch_up(own)

        hidden: dict[tuple[Row, int], Float[Tensor, "t _"]] = {}
        for entries, (trails, states) in zip(work.values(), self._each(run, list(work)), strict=True):
            for (row, i), trail, own in zip(entries, trails, states, strict=True):
                row.trails[i], hidden[row, i] = trail, own
        return {row: [hidden[row, i] for i in range(len(row.trails))] for row in rows}

    def saved(self, rows: Sequence[Row], solution: Solution) -> float:
        """Count some rows of one combination that were solved; about how many seconds each closed one saved."""
        combination = rows[0].sequence.work.combination
        gate = combination.gate
        if gate is None:
            return 0.0
        names = tuple(self._batches[model].name for model in rows[0].members)
        so_far, closed = self._savings[gate.name, combination.settings.rule, names], int(solution.gated.sum())
        so_far.add(len(rows), closed, solution.seconds + sum(row.spent for row in rows))
        each = (so_far.saved or 0.0) / so_far.gated if so_far.gated else 0.0
        self._metrics.gated.labels(gate.name).inc(closed)
        self._metrics.saved.labels(gate.name).inc(closed * each)
        return each


def asked_of(rows: Sequence[Row]) -> Deferral | None:
    """Who was asked in some rows of one combination; None if there is no gate that decides."""
    found = [row.asked for row in rows if row.asked is not None]
    if not found:
        return None
    logits = [one.logits for one in found if one.logits is not None]
    return Deferral(torch.cat([one.rows for one in found]), torch.cat(logits) if len(logits) == len(found) else None)


def _model(row: Row) -> Any:
    return row.sequence.work.combination.model


def _nothing(model: Any, like: Float[Tensor, "t d"]) -> Hidden:
    """In place of the other members' hidden states, where nobody reads them."""
    return [like.new_zeros(len(like), head.d) for head in model.heads[1:]]
