"""The base of the essay's linear and quadratic programs: a test whether they choose anything, and their solution."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

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
from softmeet.solvers.clock import time_is_over


class CrossEntropyRule(ExactRule):
    """The base of rules that minimise a function of the cross-entropies -pᵀ log p̂_i over the feasible set C.

    With ``slack`` τ > 0 p need not have the members' moments, and Σ_i ‖Q_iᵀ(p - p̂_i)‖² / (2τ), Q_i being the whitened
    heads, is added to the objective. If the objective is constant on C, the rule chooses nothing: the answer is the
    I-projection of the pool onto C or, with ``vertex``, a vertex of C: a p with few positive entries.
    """

    can_assign_zeros = True
    slack: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """τ, by which moments may differ from the members' at ‖Qᵀ(p - p̂)‖² / 2τ nats."""
    vertex: bool = False
    """Where the program chooses nothing, answer by some vertex of the feasible set."""

    def constrained(self, problem: Problem) -> bool:
        """Return whether the answer must have the members' moments, which it must unless ``slack`` is positive."""
        return self.slack == 0

    def why_degenerate(self, problem: Problem) -> str:
        """Explain in a sentence why the objective is constant on the feasible set, and which distribution was taken."""
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
        """Return whether the objective, without slack's term, is proved to be constant on the feasible set.

        It may vary by ``tol`` or by rounding of the log-probabilities (:attr:`FeasibleSet.indistinct`).
        """

    @abstractmethod
    def gradient(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """Return the objective's gradient at ``p``, (v,), without slack's term; 0 for tokens outside ``row.alive``."""

    @abstractmethod
    def optimum(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Optimum:
        """Minimise the rule's objective over the feasible set C of one row, by a linear or quadratic program.

        With ``slack`` it is minimised over the simplex, with the penalty of the moments added.

        Args:
            row: the row's feasible set C.
            member: some distribution in C, probabilities, (v,), from which the program starts; None if and only if
                ``slack`` is positive.

        Returns:
            The optimum, as :meth:`extremes` finds it; its ``y`` are multipliers of Gᵀp = g.
        """

    @abstractmethod
    def most(self, row: FeasibleSet, member: Float[Tensor, " v"]) -> float:
        """Return the largest value of the objective over C, or an upper bound on it; not called with ``slack``.

        Args:
            row: the row's feasible set C.
            member: some distribution in C, probabilities, (v,).
        """

    def choose(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Choice:
        """Choose the program's optimum or, if the objective is constant on C, the I-projection ``member`` or a vertex.

        ``member`` is None with ``slack``; then the program is solved in any case. The largest value of the objective is
        not looked for once the time is over.
        """
        if member is not None and self.is_constant(row):
            p = self._kept(row, member)
            return Choice(p, row.fit(self.gradient(row, p)), 0)
        found = self.optimum(row, member)
        if member is None or time_is_over():
            return Choice(found.p, found.y, found.steps)
        most = self.most(row, member)
        # On the boundary of the simplex the objective may be constant though no multipliers prove it.
        constant = most - self.bounds(row, found.p, found.y).least <= row.problem.tol and not row.unique
        return Choice(self._kept(row, member) if constant else found.p, found.y, found.steps, most, constant)

    def status(self, row: FeasibleSet, p: Float[Tensor, " v"], found: Bounds) -> Status:
        """Return :meth:`ExactRule.status`, except that rows whose objective is constant are DEGENERATE.

        Those are the rows in which the moments must hold and ``p`` has them, :meth:`is_constant` is True, and more than
        one distribution may have the moments (not ``row.unique``). In such a row the gap may exceed ``tol`` only
        because log-probabilities were given with few digits.
        """
        status = super().status(row, p, found)
        if status == Status.DEGENERATE or not self.constrained(row.problem) or row.unique:
            return status
        return Status.DEGENERATE if moments_hold(row, p) and self.is_constant(row) else status

    def off(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> tuple[float, float]:
        """Return the terms that ``slack`` τ brings to the objective and to its lower bound; both are 0 without slack.

        Returns:
            (the penalty Σ_i ‖Q_iᵀ(p - p̂_i)‖² / (2τ), to be added to the objective at ``p``; τ|y|² / 2, to be subtracted
            from the lower bound at the multipliers ``y``, whose last, of Σp = 1, does not count).
        """
        tau = self.slack
        if tau == 0:
            return 0.0, 0.0
        r, moments = row.excess(p)[:-1], y[: len(row.target) - 1]
        return float(r.square().sum()) / (2 * tau), float(tau / 2 * moments.square().sum())

    def _kept(self, row: FeasibleSet, member: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """Return the answer if the program chooses nothing: ``member``, or a vertex if the option ``vertex`` is set."""
        return vertex(row.system[0], member) if self.vertex else member

    def extremes(
        self,
        row: FeasibleSet,
        cost: Float[Tensor, " v"],
        member: Float[Tensor, " v"] | None,
        extra: Float[Tensor, "v k"] | None = None,
    ) -> Optimum:
        """Minimise costᵀp + Σ_k (extra_kᵀp)² over C or, with ``slack``, that plus its penalty over the simplex.

        Args:
            row: the row's feasible set C.
            cost: the linear cost of each token, (v,), fp64, finite.
            member: some distribution in C, probabilities, (v,); None if and only if ``slack`` is positive.
            extra: further columns, (v, k), the squares of whose sums are added; None for a linear program. They get k
                soft constraints, after all others.

        Returns:
            The optimum, to a gap of 0.01 ``tol``; its ``y`` are multipliers of Gᵀp = g, (m,).
        """
        soft = self.slack > 0
        columns, target = (row.tokens, row.target) if soft else row.system
        count, softness = len(target), torch.full_like(target, self.slack)
        softness[-1] = 0.0
        if extra is not None:
            columns = token_matrix(row.heads, torch.cat([row.ones, extra], dim=-1))
            same = torch.eye(extra.shape[1], dtype=target.dtype, device=target.device)
            columns = columns if soft else mapped(columns, torch.block_diag(row.joint, same))
            target, softness = torch.cat([target, 0 * same[0]]), torch.cat([softness, 0 * same[0] + 0.5])
        weight, tol = row.log_mean if member is None else member, 0.01 * row.problem.tol
        program = SimplexProgram(columns, target, softness, cost, row.alive, count - 1, member, weight, tol)
        found = solve_program(program, row.problem.settings.max_steps)
        y = found.y[:count]
        return replace(found, y=y if soft else row.joint @ y)
