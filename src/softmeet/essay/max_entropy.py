"""The rule ``max-entropy``: of the distributions with every member's moments, the one of maximum entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from softmeet.essay.feasible_set import FeasibleSet, may_be_unique
from softmeet.essay.points import (
    entropic_projection,
    exact_gap,
    moments_hold,
    moments_repaired,
    separating_multipliers,
    unique_feasible_point,
)
from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.meet import Meet
from softmeet.rules.problem import Problem
from softmeet.rules.verify import Recomputed
from softmeet.simplex import kl, log_normalize
from softmeet.solvers.base import Status
from softmeet.solvers.minimise import full_hessian_pays

# In nats: how exactly a member of the feasible set is found before another rule chooses from the set.
EXACT = 1e-12


class MaxEntropy(Meet):
    """The rule that minimises KL(p‖q) over p with every member's moments: the I-projection of the pool q.

    If the heads have neither bias nor soft-cap and the pool is a logit mean, whatever its weights, this is the
    distribution of maximum entropy in the feasible set C = { p : W_iᵀ p = W_iᵀ p̂_i for all i }. C is often empty for
    real models; then the status is INFEASIBLE, with a Farkas proof. If the rank of [1, W_1 | … | W_n] is the number of
    tokens, at most one distribution has the moments, and it is found by linear algebra.
    """

    name = "max-entropy"
    summary = "the maximum-entropy distribution with every member's moments, where there is one"
    uses_trust = False
    is_feasible = True

    def effective_trust(self, trust: Sequence[float]) -> tuple[float, ...]:
        """Return infinite trusts, one for each in ``trust``, whose values are ignored: moments are to hold exactly."""
        return (math.inf,) * len(trust)

    def solve(self, problem: Problem) -> Answer:
        """Find the I-projection of the pool onto every row's feasible set, or a proof that the set is empty.

        Rows in which at most one distribution can have the moments (:attr:`FeasibleSet.unique`) are solved by linear
        algebra, the others by the dual as ``meet`` does. In rows that the dual leaves NOT_CONVERGED the p with the
        nearest moments is computed, which can prove the set empty; if it does not, and heads are small enough for the
        full Hessian (:func:`~softmeet.solvers.minimise.full_hessian_pays`), interior points are tried.

        Raises:
            DisjointSupportError: if a row has no token in ``problem.support`` (None: all tokens) to which every member
                gives more than 0.
            InvalidInputError: if a head's weight, or its squares, are not finite.
        """
        return self.projected(problem)

    def projected(self, problem: Problem, *, any_member: bool = False) -> Answer:
        """Find the I-projection of the pool onto every row's feasible set, or a proof that the set is empty.

        The methods are those of :meth:`solve`; with ``any_member`` interior points are tried however large heads are.

        Args:
            problem: the batch.
            any_member: whether another distribution of the set, if interior points find one, is an answer (OPTIMAL) in
                rows in which the I-projection is not reached, as when every p of the set gives some token probability
                0, so that the dual has no optimum. If False, such rows are NOT_CONVERGED.
        """
        if not problem.log_p.shape[1] or not may_be_unique(problem):
            answer = super().solve(problem)
        else:
            assert problem.log_pool is not None  # raises for all rows at once, before they are taken one by one
            rows = replace(problem, dtype=torch.float64).rows()
            answer = Answer.joined([self._solve_row(FeasibleSet(one)) for one in rows])
        for k in (answer.status == Status.NOT_CONVERGED).nonzero().flatten().tolist():
            _settle(
                answer, k, FeasibleSet.of(problem.take(torch.tensor([k], device=problem.log_p.device)))[0], any_member
            )
        return answer

    def verify(self, problem: Problem, answer: Answer) -> Recomputed:
        """Compute gap and status anew from the stored dual point, as ``meet`` does, without a solver.

        ``problem``, with products in fp64, is the problem that was solved, and ``answer`` the answer to it. In a row in
        which at most one distribution can have the moments (:attr:`FeasibleSet.unique`) and the answer has them, that
        suffices: gap 0, OPTIMAL.
        """
        found = super().verify(problem, answer)
        for k, row in enumerate(FeasibleSet.of(problem)):
            if may_be_unique(row.problem) and row.unique and moments_hold(row, answer.log_probs[k].exp()):
                found.log_probs[k], found.gap[k], found.status[k] = answer.log_probs[k], 0.0, int(Status.OPTIMAL)
                continue
            gap = exact_gap(row, found.log_probs[k], tuple(d[k] for d in answer.dual))
            if gap < found.gap[k]:
                found.gap[k] = gap
                if found.status[k] == Status.NOT_CONVERGED and gap <= problem.tol:
                    found.status[k] = int(Status.OPTIMAL)
        return found

    def _solve_row(self, row: FeasibleSet) -> Answer:
        """Solve one row by linear algebra if at most one p can have the moments (``row.unique``), else by the dual.

        The dual is also used if linear algebra finds neither that p nor a proof that there is none.
        """
        if not row.unique:
            return super().solve(row.problem)
        p, proof = unique_feasible_point(row)
        if p is None and not proof.any():
            return super().solve(row.problem)
        if p is None:
            answer = closed_form(row.problem, row.log_q[None], torch.full_like(row.log_q[:1], torch.inf))
            unsolved = torch.full_like(answer.gap, torch.inf)
            status = torch.full_like(answer.status, int(Status.INFEASIBLE))
            answer = replace(answer, ray=row.raw(proof), status=status, gap=unsolved, certified=unsolved < 0)
        else:
            answer = closed_form(row.problem, p.log()[None], kl(p.log(), row.log_q)[None])
        return replace(answer, passes=answer.passes + row.passes())


def members_of(problem: Problem, exactness: float = EXACT) -> Answer:
    """Find a distribution in every row's feasible set: the pool's I-projection or, if that is not reached, another.

    A row is OPTIMAL if a distribution was found, INFEASIBLE if the set is proved to be empty, and NOT_CONVERGED if
    neither was achieved; ``log_probs`` of INFEASIBLE and NOT_CONVERGED rows have no meaning. The errors are those of
    :meth:`MaxEntropy.solve`.

    Args:
        problem: the batch; its own ``tol`` is replaced by ``exactness``, and all is computed in fp64.
        exactness: the gap in nats to solve to; at 1e-12 (``EXACT``) or below, the moments of the result are then moved
            to the members' up to round-off (:func:`~softmeet.essay.points.moments_repaired`).
    """
    problem = problem.changed(tol=exactness, dtype=torch.float64)
    answer = MaxEntropy().projected(problem, any_member=True)
    for k in (answer.status == Status.OPTIMAL).nonzero().flatten().tolist() if exactness <= EXACT else ():
        row = FeasibleSet(problem.take(torch.tensor([k], device=problem.log_p.device)))
        answer.log_probs[k] = moments_repaired(row, answer.log_probs[k].exp()).log()
    return answer


def _settle(answer: Answer, k: int, row: FeasibleSet, any_member: bool) -> None:
    """Settle row ``k`` of ``answer``, in place, which the dual left open.

    It is proved empty by the nearest moments or, if that fails, solved by interior points. Both count directions that
    heads share once, and so end even if multipliers grow without bound.

    Args:
        answer: the answer of the whole batch.
        k: the index of the row.
        row: its feasible set.
        any_member: whether any distribution of the set is good enough if the dual has no optimum.
    """
    y = separating_multipliers(row)
    n = len(row.heads)
    if y is not None:
        answer.status[k] = Status.INFEASIBLE
        for mine, lam in zip(answer.ray, row.raw(y), strict=True):
            mine[k] = lam[0]
    elif any_member or full_hessian_pays(row.problem.projection(range(n), (math.inf,) * n)):
        p, y, steps = entropic_projection(row, row.alive, row.log_q.exp(), row.target)
        log_p, dual = log_normalize(row.log_q + row.tokens.times(y)), row.raw(y)
        gap = exact_gap(row, log_p, tuple(lam[0] for lam in dual))
        answer.steps[k] += steps
        if gap > row.problem.tol:
            # On the boundary multipliers grow without bound, and the point where Newton's method stopped means nothing.
            holds = moments_hold(row, p)
            answer.log_probs[k] = p.log() if holds else row.log_q
            answer.status[k] = Status.OPTIMAL if holds and any_member else Status.NOT_CONVERGED
        else:
            answer.status[k], answer.gap[k], answer.certified[k] = Status.OPTIMAL, gap, True
            answer.log_probs[k], answer.objective[k] = log_p, kl(log_p, row.log_q) - gap
            answer.disagreement[k] = kl(log_p.expand_as(row.log_p), row.log_p)
            for mine, lam in zip(answer.dual, dual, strict=True):
                mine[k] = lam[0]
    answer.passes[k] += row.passes()
