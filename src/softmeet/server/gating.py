"""Gates in the running batch: which members run for which sequences, and about how much time closed gates save.

Under the gate ``unsure`` only the first member has a sequence in its running batch. Each other member keeps the
sequence's keys and values apart and may be behind by any number of tokens. If the first member is unsure at a token,
the others run all tokens that they have not run, each member in one pass over all sequences that need it in this step.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from softmeet.engine.ask import Hidden, Members
from softmeet.engine.recorder import Savings
from softmeet.engine.step import ask
from softmeet.rules.solution import Solution
from softmeet.server.metrics import Metrics
from softmeet.server.sequences import Sequence
from softmeet.server.tasks import Task


class Gates:
    """The decision which members run for sequences under the gate ``unsure``, and the count of what all gates save.

    Args:
        members: those who read.
        metrics: its counters ``passes``, ``gated`` and ``saved`` are added to.
    """

    def __init__(self, members: Members, metrics: Metrics) -> None:
        self._members, self._metrics = members, metrics
        self._savings: dict[tuple[Any, ...], Savings] = defaultdict(Savings)

    def ask(self, found: dict[Sequence, Hidden], task: Task, *, every: bool = False) -> dict[Sequence, Hidden]:
        """Return what every member predicts for sequences of one combination; under ``unsure`` as :func:`ask` has it.

        Args:
            found: what the members predict that read every token.
            task: the task that combines them; it may pause.
            every: whether that is for all places of a prompt, to score it.
        """
        gate = next(iter(found)).combination.unsure
        if gate is None:
            return found
        return ask(found, gate, self._members, every=every, pause=task.pause, clock=task.clock)

    def saved(
        self, sequences: list[Sequence], solution: Solution | None, suspended: float = 0.0, rows: slice = slice(None)
    ) -> float:
        """Count a batch's reads of heads, rows and closed rows; return about how many seconds each closed row saved.

        That is the mean time that open rows of the same members, rule and gate have taken so far, this batch's
        included; 0 if no row was open yet, or without a gate, when nothing is counted.

        Args:
            sequences: the batch's sequences, all of one combination.
            solution: of the batch, perhaps with more rows; None of averages that were not solved for.
            suspended: the seconds in the solution's that its task was suspended.
            rows: those of the solution that are the sequences'.
        """
        combination, count = sequences[0].combination, len(sequences)
        gate = combination.gate
        if solution is not None and not rows.start:  # those of drafts that were wrong among them
            self._metrics.passes.inc(solution.num_passes.sum().item())
        if solution is None or gate is None:
            return 0.0
        savings = self._savings[gate.name, combination.settings.rule.name, *combination.model.members]
        closed = int(solution.gated[rows].sum())
        # A solve may also have been suspended where the solution does not count the time.
        own = max(solution.seconds - suspended, 0.0) * count / len(solution.gated)
        savings.add(count, closed, own + sum(s.spent for s in sequences))
        each = (savings.saved or 0.0) / max(savings.gated, 1)
        self._metrics.gated.labels(gate.name).inc(closed)
        self._metrics.saved.labels(gate.name).inc(closed * each)
        return each
