"""Gates in the running batch: which members run for which sequences, and about how much time closed gates save.

Under the gate ``unsure`` only the first member has a sequence in its running batch. Each other member keeps the
sequence's keys and values apart and may be behind by any number of tokens. If the first member is unsure at a token,
the others run all tokens that they have not run, each member in one pass over all sequences that need it in this step.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from softmeet.engine.ask import Hidden, Members
from softmeet.engine.deferral import Deferral
from softmeet.engine.gate import OTHERS, ask, unread
from softmeet.engine.recorder import Savings
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

    def over_prompt(self, sequence: Sequence, hidden: Hidden, task: Task) -> tuple[Hidden, Deferral | None]:
        """Return every member's last hidden states over a prompt to be scored, given those in ``sequence.batched``.

        Under the gate ``unsure`` these are the first member's alone. If the gate is open at any of the prompt's t
        tokens, the other members run the whole prompt; if it is closed at all of them, zeros take the place of their
        hidden states.

        Args:
            sequence: the prompt's sequence.
            hidden: the last hidden states of the members in ``sequence.batched`` at all t tokens, (t, d_i) each.
            task: the task that runs the prompt; it may pause.

        Returns:
            (the last hidden states of every member, (t, d_i) each; a :class:`~softmeet.engine.combine.Deferral` whose
            mask, (t,), says at which tokens the gate ``unsure`` is open, or None if the sequence has no such gate).
        """
        gate = sequence.combination.unsure
        if gate is None:
            return hidden, None
        asked = sequence.combination.model.combiner.deferral(gate, hidden[0])
        if not bool(asked.rows.any()):
            return [*hidden, *unread(sequence, hidden[0])], asked
        others = self._members.read_on([sequence], OTHERS, every=True, pause=task.pause)[sequence]
        return [*hidden, *others], asked

    def ask(self, group: list[Sequence], hidden: list[Hidden], task: Task) -> list[Hidden]:
        """Return every member's last hidden states at the newest token, for sequences under one gate ``unsure``."""
        gate = group[0].combination.unsure
        assert gate is not None
        return ask(group, hidden, gate, self._members, pause=task.pause, clock=task.clock)

    def saved(self, sequences: list[Sequence], solution: Solution | None, suspended: float = 0.0) -> float:
        """Count a batch's reads of heads, rows and closed rows; return about how many seconds each closed row saved.

        That is the mean time that open rows of the same members, rule and gate have taken so far, this batch's
        included; 0 if no row was open yet, or without a gate, when nothing is counted.

        Args:
            sequences: the batch's sequences, all of one combination; of one that drafts, one for each token it gets.
            solution: of the batch, row k for sequence k, and perhaps more rows, in vain; None of averages that were not
                solved for.
            suspended: the seconds in the solution's that its task was suspended.
        """
        combination = sequences[0].combination
        gate = combination.gate
        if solution is not None:
            self._metrics.passes.inc(solution.num_passes.sum().item())
        if solution is None or gate is None:
            return 0.0
        savings = self._savings[gate.name, combination.settings.rule.name, *combination.model.members]
        count = len(sequences)
        closed = int(solution.gated[:count].sum())
        # A solve may also have been suspended where the solution does not count the time.
        own = max(solution.seconds - suspended, 0.0) * count / len(solution.gated)
        savings.add(len(sequences), closed, own + sum(s.spent for s in sequences))
        each = (savings.saved or 0.0) / max(savings.gated, 1)
        self._metrics.gated.labels(gate.name).inc(closed)
        self._metrics.saved.labels(gate.name).inc(closed * each)
        return each
