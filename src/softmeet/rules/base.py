"""What a rule is: a name, a problem stated in its docstring, and ``solve``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.rules.problem import Problem
from softmeet.simplex import kl
from softmeet.solvers.base import Status


@dataclass
class Answer:
    """What a rule gives back for a batch; every field has one row per row of the problem.

    ``dual`` holds, per member, λ_i in the head's own coordinates, (B, d_i); zeros for a rule without a dual. ``ray``
    holds such a λ with max_j Σ_i λ_iᵀ(a_ij - b_i) < 0 where the status is INFEASIBLE: the proof; zeros elsewhere.
    ``disagreement`` is KL(r_i‖p̂_i), or, where ``disagreement_is_bound``, its upper bound KL(p‖p̂_i).
    ``objective_range`` holds the least and the largest value of the objective over the feasible set, or bounds on
    them; NaN for a rule without such a set.
    """

    log_probs: Float[Tensor, "B v"]
    status: Int[Tensor, " B"]
    gap: Float[Tensor, " B"]
    certified: Bool[Tensor, " B"]
    objective: Float[Tensor, " B"]
    objective_range: Float[Tensor, "B 2"]
    steps: Int[Tensor, " B"]
    passes: Float[Tensor, " B"]
    disagreement: Float[Tensor, "B n"]
    disagreement_is_bound: Bool[Tensor, "B n"]
    dual: tuple[Float[Tensor, "B _"], ...]
    ray: tuple[Float[Tensor, "B _"], ...]

    def take(self, rows: Int[Tensor, " k"]) -> Answer:
        """A copy of some rows."""
        taken: dict[str, object] = {}
        for f in fields(self):
            mine = getattr(self, f.name)
            taken[f.name] = tuple(part[rows] for part in mine) if isinstance(mine, tuple) else mine[rows]
        return Answer(**taken)  # type: ignore[arg-type]

    def put(self, rows: Int[Tensor, " k"], other: Answer) -> Answer:
        """A copy with some rows replaced."""
        merged: dict[str, object] = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, tuple):
                merged[f.name] = tuple(a.index_copy(0, rows, b) for a, b in zip(mine, theirs, strict=True))
            else:
                merged[f.name] = mine.index_copy(0, rows, theirs)
        return replace(self, **merged)  # type: ignore[arg-type]

    @staticmethod
    def joined(parts: list[Answer]) -> Answer:
        """The answers of parts of a batch, in order."""
        merged: dict[str, object] = {}
        for f in fields(Answer):
            values = [getattr(part, f.name) for part in parts]
            is_tuple = isinstance(values[0], tuple)
            merged[f.name] = tuple(torch.cat(x) for x in zip(*values, strict=True)) if is_tuple else torch.cat(values)
        return Answer(**merged)  # type: ignore[arg-type]


class Rule(ABC):
    """One way to choose a distribution; ``solve`` states it as a problem and hands it to a solver."""

    name: ClassVar[str]
    summary: ClassVar[str]
    uses_heads: ClassVar[bool]
    can_assign_zeros: ClassVar[bool] = False

    @abstractmethod
    def solve(self, problem: Problem) -> Answer:
        """The rule's distribution for every row."""

    def why_degenerate(self, problem: Problem) -> str:
        """A sentence for rows whose objective is constant on the feasible set."""
        return str(Status.DEGENERATE)

    def relaxes(self, problem: Problem) -> bool:
        """Whether the problem's options ask this rule for less than every member's moments."""
        return self.uses_heads and problem.options.relaxes(problem.heads)

    def answer(self, problem: Problem) -> Answer:
        """:meth:`solve`, on parts of the batch whose rows share one view of each head."""
        parts = [self.solve(piece) for piece in problem.pieces()]
        return parts[0] if len(parts) == 1 else Answer.joined(parts)


def closed_form(problem: Problem, log_probs: Float[Tensor, "B v"], objective: Float[Tensor, " B"]) -> Answer:
    """The answer of a rule that needs no solver: exact, and no head was read."""
    B, like = len(log_probs), objective
    nothing = tuple(like.new_zeros(B, head.d) for head in problem.heads)
    disagreement = torch.stack([kl(log_probs, member) for member in problem.log_p], dim=-1)
    return Answer(
        log_probs=log_probs,
        status=torch.full((B,), int(Status.OPTIMAL), device=like.device),
        gap=torch.zeros_like(like),
        certified=torch.ones_like(like, dtype=torch.bool),
        objective=objective,
        objective_range=torch.full_like(objective, torch.nan)[:, None].repeat(1, 2),
        steps=torch.zeros(B, dtype=torch.int64, device=like.device),
        passes=torch.zeros_like(like),
        disagreement=disagreement,
        disagreement_is_bound=torch.ones_like(disagreement, dtype=torch.bool),
        dual=nothing,
        ray=nothing,
    )
