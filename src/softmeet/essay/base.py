"""The base of the rules that choose from the feasible set C = { p in the simplex : W_iᵀ p = W_iᵀ p̂_i for all i }.

W_i is member i's head and p̂_i its distribution. For each row the I-projection of the pool q onto C, the p in C with
the least KL(p‖q), is looked for first; either it is found, or a proof that C is empty. Then the rule chooses from C by
its own objective. Its answer is certified by evaluation alone: the rule states a lower bound on its objective over C
that holds for any multipliers, and the gap is the difference from the objective's value. Multipliers y belong to the
constraints Gᵀp = g of :class:`~softmeet.essay.feasible_set.FeasibleSet`: m numbers, the last for Σp = 1.
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
    """The value of a rule's objective at some p, and bounds on the objective over the feasible set, in its own units.

    Attributes:
        value: the objective at p.
        least, most: proved bounds: over the feasible set the objective is at least ``least`` and at most ``most``.
    """

    value: float
    least: float
    most: float = torch.inf

    @property
    def gap(self) -> float:
        """The distance of the value from the lower bound, |value - least|: at most so far is p from optimal.

        A value below ``least`` is possible only if p does not have the members' moments exactly.
        """
        return abs(self.value - self.least)


@dataclass(frozen=True, eq=False)
class Choice:
    """A rule's answer for one row.

    Attributes:
        p: the distribution, (v,), fp64.
        y: the multipliers of the constraints that prove the quality of p, (m,): one for each whitened moment of each
            member, and a last one for Σp = 1.
        steps: how many steps the rule took.
        most: the largest value of the objective over the feasible set; NaN if the rule did not look for it.
        constant: whether ``most`` showed that the objective is constant on the feasible set.
    """

    p: Float[Tensor, " v"]
    y: Float[Tensor, " m"]
    steps: int
    most: float = torch.nan
    constant: bool = False


class ExactRule(Rule):
    """The base of rules that choose one distribution from the feasible set C, in which all have every member's moments.

    Subclasses say how (:meth:`choose`) and prove how good the choice is (:meth:`bounds`).

    Attributes:
        always_answers: whether the rule chooses in rows with an empty C, too.
        exactness: the gap, in nats, to which a distribution in C is found before the rule chooses.
    """

    reads_heads = True
    is_feasible = True
    always_answers: ClassVar[bool] = False
    # In nats: how well a member of C must be known before the rule chooses.
    exactness: ClassVar[float] = EXACT

    @abstractmethod
    def choose(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Choice:
        """Choose the distribution of one row, by the subclass's criterion.

        Args:
            row: the row's feasible set C.
            member: the I-projection of the pool onto C, probabilities, (v,), or another distribution of C if that has
                none; None if it was not looked for or not found.
        """

    @abstractmethod
    def bounds(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Evaluate the objective at ``p`` and bound it over the feasible set by multipliers ``y``, without a solver.

        Args:
            row: the row's feasible set.
            p: a distribution, probabilities.
            y: multipliers of the whitened moments, and a last one for Σp = 1; the bounds hold for any, and are tight
                for the right ones.
        """

    def proved(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Return :meth:`bounds`, corrected in two cases.

        If ``p`` is not a distribution over the tokens that may have mass, the lower bound is -inf. If at most one
        distribution has the members' moments and ``p`` has them, both bounds are the value at ``p``.
        """
        found = self.bounds(row, p, y)
        if bool(p[~row.alive].any()) or not abs(float(p.sum()) - 1) <= MOMENT_TOLERANCE:
            return Bounds(found.value, -torch.inf)
        if self.constrained(row.problem) and row.unique and moments_hold(row, p):
            return Bounds(found.value, found.value, found.value)
        return found

    def constrained(self, problem: Problem) -> bool:
        """Return whether the answer must have the members' moments, up to ``MOMENT_TOLERANCE``."""
        return True

    def status(self, row: FeasibleSet, p: Float[Tensor, " v"], found: Bounds) -> Status:
        """Return the status of the answer ``p`` with the bounds ``found``.

        NOT_CONVERGED if the gap exceeds ``tol``, or the moments should hold and do not. DEGENERATE if the bounds prove
        that the objective varies by at most ``tol`` over the feasible set, unless moments allow only one distribution.
        Else OPTIMAL.
        """
        exact = not self.constrained(row.problem) or moments_hold(row, p)
        if not exact or not found.gap <= row.problem.tol:
            return Status.NOT_CONVERGED
        nothing_chosen = found.most - found.least <= row.problem.tol and not row.unique
        return Status.DEGENERATE if nothing_chosen else Status.OPTIMAL

    def solve(self, problem: Problem) -> Answer:
        """Solve a batch row by row.

        Every row first looks for the pool's I-projection onto C, unless the moments need not hold. If it finds a proof
        that C is empty, or neither, the row keeps that answer and status, unless the rule ``always_answers``; else the
        rule chooses.
        """
        seeks = self.constrained(problem) or self.always_answers
        answer = members_of(problem, self.exactness) if seeks else closed_form(problem, problem.log_pool.clone())
        empty = (answer.status == Status.INFEASIBLE).tolist()
        lost = (answer.status == Status.NOT_CONVERGED).tolist()
        for k, row in enumerate(FeasibleSet.of(problem)):
            if self.always_answers or not (empty[k] or lost[k]):
                self._write(answer, k, row, answer.log_probs[k].exp() if seeks and not (empty[k] or lost[k]) else None)
        return answer

    def _write(self, answer: Answer, k: int, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> None:
        """Choose in row ``k`` and write the choice, its bounds and its status into ``answer``, in place."""
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
        """Evaluate the stored answer and its multipliers again, row by row, in fp64 and without a solver."""
        looks = []
        for k, row in enumerate(FeasibleSet.of(problem)):
            p = answer.log_probs[k].exp()
            found = self.proved(row, p, row.whitened(tuple(lam[k] for lam in answer.dual)))
            looks.append(((p / p.sum()).log(), found.gap, self.status(row, p, found)))
        return Recomputed.of_rows(looks, answer.log_probs)

    def proof(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> Float[Tensor, " m"]:
        """Return multipliers of the whitened moments, (m,), that prove the feasible set empty; 0 if ``p`` gives none.

        The last of them, for Σp = 1, is 0.
        """
        return torch.zeros_like(row.target)
