"""What the essay's linear and quadratic programs share: when they choose nothing, and how they are solved if not."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from softmeet.essay.base import Bounds, Choice, ExactRule
from softmeet.essay.column_generation import Optimum, SimplexProgram, solve_program
from softmeet.essay.feasible_set import FeasibleSet
from softmeet.essay.matrices import mapped, token_matrix
from softmeet.essay.points import moments_hold
from softmeet.essay.vertex import vertex
from softmeet.rules.problem import Problem
from softmeet.solvers.base import Status


class CrossEntropyRule(ExactRule):
    """A rule that minimises a function of the cross-entropies -pᵀ log p̂_i over C.

    With ``slack`` τ the moments may differ from the members', at ‖Qᵀ(p - p̂)‖² / 2τ.
    """

    can_assign_zeros = True
    slack: float = Field(
        default=0.0, ge=0, allow_inf_nan=False,
        description="τ, by which moments may differ from the members' at ‖Qᵀ(p - p̂)‖² / 2τ nats.",
    )  # fmt: skip
    vertex: bool = Field(
        default=False, description="Where the program chooses nothing, answer by some vertex of the feasible set."
    )

    def constrained(self, problem: Problem) -> bool:
        """Say whether there is no slack."""
        return self.slack == 0

    def relaxes(self, problem: Problem) -> bool:
        """Say whether the options, or slack, ask for less than every member's moments."""
        return super().relaxes(problem) or self.slack > 0

    def why_degenerate(self, problem: Problem) -> str:
        """Explain by the heads why the objective is constant."""
        plain = all(head.bias is None and head.soft_cap is None for head in problem.heads)
        why = (
            "without bias and soft-cap, -pᵀ log p̂_i = H(p̂_i) for every feasible p"
            if plain
            else "on the feasible set the members' log-probabilities are combinations of the constrained moments"
        )
        kept = "some vertex" if self.vertex else "the feasible distribution nearest to the pool"
        return (
            f"{self.name} chooses nothing here: {why}, so every feasible distribution is optimal; the answer is {kept}"
        )

    @abstractmethod
    def is_constant(self, row: FeasibleSet) -> bool:
        """Say whether the objective varies by at most ``tol`` over C."""

    @abstractmethod
    def gradient(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """Return the gradient of the objective without slack, with 0 where a token may not be answered."""

    @abstractmethod
    def optimum(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Optimum:
        """Solve the rule's program."""

    @abstractmethod
    def most(self, row: FeasibleSet, member: Float[Tensor, " v"]) -> float:
        """Return the largest value of the objective over C, or what it cannot exceed."""

    def choose(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Choice:
        """Choose the optimum or, where the objective is constant on C, the I-projection of the pool."""
        if member is None:
            found = self.optimum(row, None)
            return Choice(found.p, self.multipliers(row, found.y), found.steps)
        if not self.is_constant(row):
            found, most = self.optimum(row, member), self.most(row, member)
            y = self.multipliers(row, found.y)
            # On the boundary of the simplex the objective may be constant though no multipliers prove it.
            constant = most - self.bounds(row, found.p, y).least <= row.problem.tol and not row.unique
            return Choice(self._kept(row, member) if constant else found.p, y, found.steps, most, constant)
        p = self._kept(row, member)
        return Choice(p, row.fit(self.gradient(row, p)), 0)

    def status(self, row: FeasibleSet, p: Float[Tensor, " v"], found: Bounds) -> Status:
        """Return DEGENERATE also where the gap is what log-probabilities of few digits leave."""
        status = super().status(row, p, found)
        if status == Status.DEGENERATE or not self.constrained(row.problem) or row.unique:
            return status
        return Status.DEGENERATE if moments_hold(row, p) and self.is_constant(row) else status

    def off(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> tuple[float, float]:
        """Return (what p pays for its slack, what the multipliers y gain from slack at most)."""
        tau = self.slack
        if tau == 0:
            return 0.0, 0.0
        r, moments = row.excess(p)[:-1], y[: len(row.target) - 1]
        return float(r.square().sum()) / (2 * tau), float(tau / 2 * moments.square().sum())

    def _kept(self, row: FeasibleSet, member: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """Give what a program that chooses nothing is answered by."""
        return vertex(row.system[0], member) if self.vertex else member

    def program(
        self,
        row: FeasibleSet,
        cost: Float[Tensor, " v"],
        member: Float[Tensor, " v"] | None,
        extra: Float[Tensor, "v k"] | None = None,
    ) -> SimplexProgram:
        """Make the program with a linear cost, and with the squares of the sums of further columns ``extra``."""
        soft = self.slack > 0
        columns, target = (row.tokens, row.target) if soft else row.system
        softness = torch.full_like(target, self.slack)
        softness[-1], unit = 0.0, len(target) - 1
        if extra is not None:
            columns = token_matrix(row.heads, torch.cat([row.ones, extra], dim=-1))
            same = torch.eye(extra.shape[1], dtype=target.dtype, device=target.device)
            columns = columns if soft else mapped(columns, torch.block_diag(row.joint, same))
            target, softness = torch.cat([target, 0 * same[0]]), torch.cat([softness, 0 * same[0] + 0.5])
        weight = row.log_mean if member is None else member
        return SimplexProgram(columns, target, softness, cost, row.alive, unit, member, weight, 0.01 * row.problem.tol)

    def multipliers(self, row: FeasibleSet, y: Float[Tensor, " r"]) -> Float[Tensor, " m"]:
        """Take those of the moments from the multipliers of :meth:`program`."""
        return y[: len(row.target)] if self.slack > 0 else row.joint @ y[: row.joint.shape[1]]

    def extremes(self, row: FeasibleSet, cost: Float[Tensor, " v"], member: Float[Tensor, " v"] | None) -> Optimum:
        """Find the p that minimises a linear cost."""
        return solve_program(self.program(row, cost, member), row.problem.settings.max_steps)
