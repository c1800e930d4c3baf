"""Gates in the running batch: which members run for which sequences, and about how much time closed gates save.

Under the gate ``unsure`` only the first member has a sequence in its running batch. Each other member keeps the
sequence's keys and values apart and may be behind by any number of tokens. If the first member is unsure at a token,
the others run all tokens that they have not run, each member in one pass over all sequences that need it in this step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.hf.deferral import Deferral
from softmeet.hf.recorder import Savings
from softmeet.rules.solution import Solution
from softmeet.server.metrics import Metrics
from softmeet.server.sequences import Sequence
from softmeet.server.tasks import Task

# For each member, its last hidden states of one sequence at the same t tokens, (t, d_i).
Hidden = list[Float[Tensor, "t _"]]


class Gates:
    """The decision which members run for sequences under the gate ``unsure``, and the count of what all gates save.

    Args:
        read_on: a function of a list of sequences and a task's ``pause`` that runs all members but the first on the
            tokens that they have not run, and returns, for each sequence, those members' last hidden states there,
            (t, d_i); with ``every=True`` it runs all of a new prompt's tokens even if some are cached.
        metrics: its counters ``passes``, ``gated`` and ``saved`` are added to.
    """

    def __init__(self, read_on: Callable[..., dict[Sequence, Hidden]], metrics: Metrics) -> None:
        self._read_on, self._metrics = read_on, metrics
        self._savings: dict[tuple[Any, ...], Savings] = defaultdict(Savings)

    def over_prompt(self, sequence: Sequence, hidden: Hidden, task: Task) -> tuple[Hidden, Deferral | None]:
        """Return every member's last hidden states over a prompt to be scored, given those in ``sequence.batched``.

        Under the gate ``unsure`` these are the first member's alone. If the gate is open at any of the prompt's t
        tokens, the other members run the whole prompt, and ``sequence.ahead`` keeps their states at its last token; if
        it is closed at all of them, zeros take the place of their hidden states.

        Args:
            sequence: the prompt's sequence.
            hidden: the last hidden states of the members in ``sequence.batched`` at all t tokens, (t, d_i) each.
            task: the task that runs the prompt; it may pause.

        Returns:
            (the last hidden states of every member, (t, d_i) each; a :class:`~softmeet.hf.combining.Deferral` whose
            mask, (t,), says at which tokens the gate ``unsure`` is open, or None if the sequence has no such gate).
        """
        gate = sequence.combination.unsure
        if gate is None:
            return hidden, None
        asked = sequence.combination.model.combiner.deferral(gate, hidden[0])
        if not bool(asked.rows.any()):
            return [*hidden, *_unread(sequence, hidden[0])], asked
        others = self._read_on([sequence], every=True, pause=task.pause)[sequence]
        sequence.ahead = [states[-1:] for states in others]
        return [*hidden, *others], asked

    def ask(self, group: list[Sequence], hidden: list[Hidden], task: Task) -> list[Hidden]:
        """Return every member's last hidden states at the newest token, for sequences under one gate ``unsure``.

        Where the gate is open, the other members run the tokens that they have not run; where it is closed they do not
        run, and zeros stand for their hidden states. States in ``Sequence.ahead`` are used, and removed. Each
        sequence's ``asked`` (whether they run) and ``spent`` (its share of the seconds that this takes) are set.

        Args:
            group: the sequences, all of one combination.
            hidden: for each of them, a list of the first member's last hidden state at its newest token, (1, d_1).
            task: the task that solves the sequences; it may pause.

        Returns:
            for each sequence a list of one tensor (1, d_i) per member.
        """
        combination = group[0].combination
        assert combination.unsure is not None
        stacked = torch.cat([own[0] for own in hidden])
        asked = combination.model.combiner.deferral(combination.unsure, stacked)
        for k, s in enumerate(group):
            s.asked, s.spent = asked.take(slice(k, k + 1)), 0.0
        is_open = [s for s in group if s.asked is not None and bool(s.asked.rows)]
        started = task.clock()
        behind = [s for s in is_open if not s.ahead]
        caught_up = self._read_on(behind, pause=task.pause) if behind else {}
        for s in is_open:
            s.spent = (task.clock() - started) / len(is_open)
        found = []
        for s, own in zip(group, hidden, strict=True):
            others = [states[-1:] for states in caught_up.get(s, s.ahead)] or _unread(s, own[0])
            s.ahead = []
            found.append([*own, *others])
        return found

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


def joined(sequences: list[Sequence]) -> Deferral | None:
    """Join the ``asked`` of sequences of one combination: for which of them all members run, not the first alone.

    Args:
        sequences: B sequences, each with ``asked`` as :meth:`Gates.ask` sets it.

    Returns:
        a :class:`~softmeet.hf.combining.Deferral` whose mask, (B,), is True for sequences for which all members run,
        with the first member's logits, (B, v), if every sequence has them; None without a gate ``unsure``.
    """
    found = [s.asked for s in sequences if s.asked is not None]
    if not found:
        return None
    logits = [one.logits for one in found if one.logits is not None]
    return Deferral(torch.cat([one.rows for one in found]), torch.cat(logits) if len(logits) == len(found) else None)


def _unread(sequence: Sequence, like: Float[Tensor, "t d"]) -> Hidden:
    """Return zeros, (t, d_i), in place of the hidden states of each member but the first, where they are not used.

    Args:
        sequence: whose members they are.
        like: the first member's hidden states, (t, d); they give t, dtype and device.
    """
    heads = sequence.combination.model.combiner.heads[1:]
    return [like.new_zeros(len(like), head.d) for head in heads]
