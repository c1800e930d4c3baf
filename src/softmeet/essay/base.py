"""What the rules over C = { p in the simplex : W_iᵀ p = W_iᵀ p̂_i } share.

Each row first looks for the I-projection of the pool onto C, which either exists, or ends with a proof that C is empty.
Where it exists, the rule chooses from C by its own criterion, and its answer is certified by evaluation alone: the rule
states a lower bound on its objective over C, at any multipliers, and the gap is the difference.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.essay.feasible_set import FeasibleSet
from softmeet.essay.max_entropy import EXACT, members_of
from softmeet.essay.points import moments_hold
from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.base import Rule
from softmeet.rules.problem import Problem
from softmeet.rules.verify import Recomputed
from softmeet.simplex import kl
from softmeet.solvers.base import Status
from softmeet.solvers.projection import MOMENT_TOLERANCE


@dataclass(frozen=True)
class Bounds:
    """What evaluation at (p, multipliers) proves, in the units of the rule's objective.

    ``value`` is the objective at p; over the feasible set it is at least ``least`` and at most ``most``.
    """

    value: float
    least: float
    most: float = torch.inf

    @property
    def gap(self) -> float:
        """How far p can be from optimal; a value below the bound belongs to a p whose moments are off."""
        return abs(self.value - self.least)


@dataclass(frozen=True, eq=False)
class Choice:
    """A rule's p for one row, whitened multipliers, and the steps.

    ``most`` is the largest value of the objective over C, if the rule looked for it; ``constant`` where that showed
    that the objective is constant.
    """

    p: Float[Tensor, " v"]
    y: Float[Tensor, " m"]
    steps: int
    most: float = torch.nan
    constant: bool = False


class ExactRule(Rule):
    """A rule that chooses one member of C; subclasses say which, and what bounds it."""

    reads_heads = True
    is_feasible = True
    always_answers: ClassVar[bool] = False
    # In nats: how well a member of C must be known before the rule chooses.
    exactness: ClassVar[float] = EXACT

    @abstractmethod
    def choose(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Choice:
        """Choose the row's distribution; ``member`` is the I-projection of the pool onto C, if looked for and found."""

    @abstractmethod
    def bounds(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Bound the objective over C by what p and the multipliers prove, without a solver."""

    def proved(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Return :meth:`bounds`, closed where no other p has the moments, and void if p is not in the simplex."""
        found = self.bounds(row, p, y)
        if bool(p[~row.alive].any()) or not abs(float(p.sum()) - 1) <= MOMENT_TOLERANCE:
            return Bounds(found.value, -torch.inf)
        if self.constrained(row.problem) and row.unique and moments_hold(row, p):
            return Bounds(found.value, found.value, found.value)
        return found

    def constrained(self, problem: Problem) -> bool:
        """Say whether the moments must hold exactly."""
        return True

    def status(self, row: FeasibleSet, p: Float[Tensor, " v"], found: Bounds) -> Status:
        """Return OPTIMAL where the gap is within ``tol`` and the moments hold, DEGENERATE where nothing was chosen."""
        exact = not self.constrained(row.problem) or moments_hold(row, p)
        if not exact or not found.gap <= row.problem.tol:
            return Status.NOT_CONVERGED
        nothing_chosen = found.most - found.least <= row.problem.tol and not row.unique
        return Status.DEGENERATE if nothing_chosen else Status.OPTIMAL

    def solve(self, problem: Problem) -> Answer:
        """Solve row by row: each has a working set of its own."""
        seeks = self.constrained(problem) or self.always_answers
        answer = members_of(problem, self.exactness) if seeks else closed_form(problem, problem.log_pool.clone())
        empty = (answer.status == Status.INFEASIBLE).tolist()
        lost = (answer.status == Status.NOT_CONVERGED).tolist()
        for k, row in enumerate(FeasibleSet.of(problem)):
            if self.always_answers or not (empty[k] or lost[k]):
                self._write(answer, k, row, answer.log_probs[k].exp() if seeks and not (empty[k] or lost[k]) else None)
        return answer

    def _write(self, answer: Answer, k: int, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> None:
        choice = self.choose(row, member)
        p, y = choice.p, choice.y
        found = self.proved(row, p, y)
        answer.log_probs[k] = p.log()
        status = self.status(row, p, found)
        answer.status[k] = Status.DEGENERATE if status == Status.OPTIMAL and choice.constant else status
        answer.gap[k], answer.objective[k] = found.gap, found.value
        answer.certified[k] = found.gap < torch.inf
        most = found.most if choice.most != choice.most else choice.most
        answer.objective_range[k] = answer.gap.new_tensor([found.least, most])
        answer.steps[k] += choice.steps
        answer.passes[k] += row.passes()
        for mine, lam in zip(answer.dual, row.raw(y), strict=True):
            mine[k] = lam[0]
        proof = self.proof(row, p)
        for mine, lam in zip(answer.ray, row.raw(proof), strict=True):
            mine[k] = lam[0] if proof.any() else mine[k]
        answer.disagreement[k] = kl(p.log().expand_as(row.log_p), row.log_p)
        answer.disagreement_is_bound[k] = True

    def verify(self, problem: Problem, answer: Answer) -> Recomputed:
        """Evaluate what the answer and its multipliers prove, row by row."""
        looks = []
        for k, row in enumerate(FeasibleSet.of(problem)):
            p = answer.log_probs[k].exp()
            found = self.proved(row, p, row.whitened(tuple(lam[k] for lam in answer.dual)))
            looks.append(((p / p.sum()).log(), found.gap, self.status(row, p, found)))
        return Recomputed.of_rows(looks, answer.log_probs)

    def proof(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> Float[Tensor, " m"]:
        """Return multipliers that prove C empty, if the rule's answer has any; 0 otherwise."""
        return torch.zeros_like(row.target)
