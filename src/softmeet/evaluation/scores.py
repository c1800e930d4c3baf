"""What members and rules predicted of a text: the loss, whether the top token was right, and its probability."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.evaluation.positions import Positions
from softmeet.rules.movement import Movement
from softmeet.simplex import kl, prob_mean
from softmeet.solvers.base import Status


@dataclass
class Scores:
    """One member's or one rule's predictions of the targets (the tokens that came) at N positions, in the text's order.

    Attributes:
        nats: the loss -log p(target) in nats, (N,), fp64.
        hit: whether the target was the most probable token, (N,) bool, like the other attributes "whether".
        confidence: the probability of the most probable token, (N,), fp64.
        num_passes: how often all heads were read, (N,), fp64; for a member this and the next three are empty.
        fallback: whether the fallback answered because no distribution was feasible, (N,).
        status: how the solver ended, a :class:`softmeet.Status`, (N,), int64.
        gated: whether a gate was closed, so that the gate's answer stands in place of the rule's, (N,).
        work: of a member over bytes: the share of mass estimated or dropped, calls, tokens run, (N, 3); else (0, 3).
        movement: how far a rule such as ``meet``, with finite trusts and no gate, moves the pool, (N, 5), in the
            columns of :meth:`Movement.table`; else (0, 5).
    """

    nats: Float[Tensor, " N"]
    hit: Bool[Tensor, " N"]
    confidence: Float[Tensor, " N"]
    num_passes: Float[Tensor, " M"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    fallback: Bool[Tensor, " M"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    status: Int[Tensor, " M"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    gated: Bool[Tensor, " M"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    work: Float[Tensor, "K 3"] = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.float64))
    movement: Float[Tensor, "L 5"] = field(default_factory=lambda: torch.zeros(0, 5, dtype=torch.float64))

    @property
    def mean(self) -> float:
        """The mean loss over all positions, in nats per token (over bytes: per byte)."""
        return self.nats.mean().item()

    @property
    def passes(self) -> float:
        """The number of reads of all heads, summed over positions; 0 for a member."""
        return self.num_passes.sum().item()

    @property
    def fallbacks(self) -> int:
        """The number of positions that the fallback answered because no distribution was feasible."""
        return int(self.fallback.sum())

    @property
    def statuses(self) -> dict[str, int]:
        """The number of positions of each :class:`softmeet.Status`, by its name; without those of no position."""
        return dict(Counter(Status(code).name for code in self.status.tolist()))

    def moved(self) -> Movement:
        """Return how far the rule moves the pool at the positions at which that was measured, the rows of movement."""
        return Movement.stacked(self.movement)


@dataclass
class Evaluation:
    """Scores of every member and every choice (a rule with its settings) at the same N positions.

    Attributes:
        positions: the targets and their documents; after :func:`evaluate_text` without hidden states.
        members: each member's scores by name; a repeated name gets a number (:func:`distinct_names`).
        choices: each choice's scores by :attr:`RuleChoice.name`.
        disagreement: the mean over members i of KL(p̂_i‖m), m the mean of all members' p̂_i, (N,), fp64, in nats.
        vocabulary: ``"tokens"`` or ``"bytes"``, the entries that are predicted.
        fitted: of choices that were fitted on this text by folds, the settings that were fitted on all of it, by name.
        claims: the share of every choice's answers that each of the user's files took, (N,), fp64, by name.
    """

    positions: Positions
    members: dict[str, Scores]
    choices: dict[str, Scores]
    disagreement: Float[Tensor, " N"]
    vocabulary: str
    fitted: dict[str, dict[str, Any]] = field(default_factory=dict)
    claims: dict[str, Float[Tensor, " N"]] = field(default_factory=dict)

    def take(self, rows: Int[Tensor, " k"]) -> Evaluation:
        """Return the evaluation at the positions with the indices ``rows``, in that order."""
        count = len(self.positions)

        def some(scores: Scores) -> Scores:
            return Scores(*(value[rows] if len(value) == count else value for value in vars(scores).values()))

        return Evaluation(
            self.positions.take(rows),
            {name: some(scores) for name, scores in self.members.items()},
            {name: some(scores) for name, scores in self.choices.items()},
            self.disagreement[rows],
            self.vocabulary,
            self.fitted,
            {name: own[rows] for name, own in self.claims.items()},
        )


def prediction_scores(log_p: Float[Tensor, "B v"], targets: Tensor, *ends: Tensor) -> Scores:
    """Score log-probabilities in nats; ``ends`` are a rule's values of ``num_passes`` to ``gated``, in that order."""
    best = log_p.max(-1)
    nats = -log_p.gather(-1, targets[:, None]).squeeze(-1).double()
    found = (nats, best.indices == targets, best.values.exp().double(), *ends)
    return Scores(*(values.cpu() for values in found))


def disagreement(log_p: Float[Tensor, "n B v"]) -> Float[Tensor, " B"]:
    """Return the mean over members i of KL(p̂_i‖m), m the mean of all members' p̂_i, (B,), fp64, in nats."""
    mean = prob_mean(log_p, log_p.new_full((len(log_p),), 1 / len(log_p)))
    return torch.stack([kl(own, mean) for own in log_p]).mean(0).double().cpu()
