"""Gates in the running batch: which members are asked about which sequences, and what that saves.

Under the gate ``unsure`` the first member of a sequence has it in its batch as ever. The others keep its keys and
values beside their batches, are behind by any number of tokens, and catch up where the first is unsure: all sequences
that need a member at a step together.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.hf.combining import Deferral
from softmeet.hf.recorder import Savings
from softmeet.rules.solution import Solution
from softmeet.server.metrics import Metrics
from softmeet.server.sequences import Combination, Sequence

# Hidden states of one sequence at some tokens, of each member.
Hidden = list[Float[Tensor, "t _"]]


class Gates:
    """Ask members about sequences under gates, and count what the gates save.

    Args:
        catch_up: runs all members but the first on the tokens of some sequences that they have not run; ``every=True``
            where the hidden states of all tokens are wanted.
        metrics: where to count.
    """

    def __init__(self, catch_up: Callable[..., dict[Sequence, Hidden]], metrics: Metrics) -> None:
        self._catch_up, self._metrics = catch_up, metrics
        self._savings: dict[tuple[Any, ...], Savings] = defaultdict(Savings)

    def over_prompt(self, sequence: Sequence, hidden: Hidden) -> tuple[Hidden, Deferral | None]:
        """Complete the hidden states over a prompt whose tokens are scored.

        Args:
            sequence: whose prompt it is.
            hidden: of the members that run it in their batches.

        Returns:
            (hidden states of every member; who was asked at which token, None for everybody everywhere).
        """
        gate, heads = sequence.combination.unsure, sequence.combination.model.heads
        if gate is None:
            return hidden, None
        asked = Deferral.of(heads[0], gate, hidden[0])
        if not bool(asked.rows.any()):
            return [*hidden, *_unread(sequence, hidden[0])], asked
        others = self._catch_up([sequence], every=True)[sequence]
        sequence.ahead = [states[-1:] for states in others]
        return [*hidden, *others], asked

    def ask(self, first: Mapping[Sequence, Float[Tensor, "1 d"]]) -> dict[Sequence, Hidden]:
        """Return the hidden states of every member at the newest token of sequences under the gate ``unsure``.

        Each sequence notes whether its members were asked; where they were not, zeros stand in for their hidden states.

        Args:
            first: the first member's hidden states there.
        """
        groups: dict[Combination, list[Sequence]] = defaultdict(list)
        for s in first:
            groups[s.combination].append(s)
        for combination, group in groups.items():
            assert combination.unsure is not None
            stacked = torch.cat([first[s] for s in group])
            asked = Deferral.of(combination.model.heads[0], combination.unsure, stacked)
            for k, s in enumerate(group):
                s.asked, s.spent = asked.take(slice(k, k + 1)), 0.0
        is_open = [s for s in first if s.asked is not None and bool(s.asked.rows)]
        started = time.perf_counter()
        caught_up = self._catch_up([s for s in is_open if not s.ahead])
        seconds = time.perf_counter() - started
        for s in is_open:
            s.spent = seconds / len(is_open)
        hidden = {}
        for s, own in first.items():
            others = [states[-1:] for states in caught_up.get(s, s.ahead)] or _unread(s, own)
            hidden[s], s.ahead = [own, *others], []
        return hidden

    def saved(self, sequences: list[Sequence], solution: Solution) -> float:
        """Count sequences of one combination that were solved; return about how many seconds each closed gate saved."""
        combination = sequences[0].combination
        gate = combination.gate
        if gate is None:
            return 0.0
        savings = self._savings[gate.name, combination.settings.rule, *sequences[0].members]
        closed = int(solution.gated.sum())
        savings.add(len(sequences), closed, solution.seconds + sum(s.spent for s in sequences))
        each = (savings.saved or 0.0) / max(savings.gated, 1)
        self._metrics.gated.labels(gate.name).inc(closed)
        self._metrics.saved.labels(gate.name).inc(closed * each)
        return each


def joined(sequences: list[Sequence]) -> Deferral | None:
    """Return who was asked about sequences of one combination; None if no gate decides that."""
    found = [s.asked for s in sequences if s.asked is not None]
    if not found:
        return None
    logits = [one.logits for one in found if one.logits is not None]
    return Deferral(torch.cat([one.rows for one in found]), torch.cat(logits) if len(logits) == len(found) else None)


def _unread(sequence: Sequence, like: Float[Tensor, "t d"]) -> Hidden:
    """Return zeros in place of the hidden states of all members but the first, where nobody reads them."""
    return [like.new_zeros(len(like), head.d) for head in sequence.combination.model.heads[1:]]
