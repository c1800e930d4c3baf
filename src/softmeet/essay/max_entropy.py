"""The rule ``max-entropy``: of the distributions with every member's moments, the one of maximum entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.essay.feasible_set import FeasibleSet, may_be_unique
from softmeet.essay.points import (
    entropic_projection,
    exact_gap,
    moments_hold,
    moments_repaired,
    separating_multipliers,
    unique_feasible_point,
)
from softmeet.essay.preference import preference
from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.meet import Meet
from softmeet.rules.problem import Problem
from softmeet.rules.recomputed import Recomputed, reach
from softmeet.rules.verify import residuals
from softmeet.simplex import kl, log_normalize
from softmeet.solvers.base import Status, unfinished
from softmeet.solvers.clock import time_is_over
from softmeet.solvers.minimise import full_hessian_pays

# In nats: how exactly a member of the feasible set is found before another rule chooses from the set.
EXACT = 1e-12


class MaxEntropy(Meet):
    """The rule that minimises KL(p‖q) over p with every member's moments: the I-projection of the pool q.

    If the heads have neither bias nor soft-cap and the pool is a logit mean, whatever its weights, this is the
    distribution of maximum entropy in the feasible set C = { p : W_iᵀ p = W_iᵀ p̂_i for all i }. C is often empty for
    real models; then the status is INFEASIBLE, with a Farkas proof. If the rank of [1, W_1 | … | W_n] is the number of
    tokens, at most one distribution has the moments, and it is found by linear algebra.

    OPTIMAL means that KL(p°‖p) ≤ ``tol``, p° the exact answer, and that p has the members' whitened moments to 1e-6. A
    row that reaches neither that nor a proof is answered by the best of the points that were tried and the pool, by
    :func:`~softmeet.essay.preference.preference`: the nearest moments first, then the least KL(p‖q).
    """

    name = "max-entropy"
    summary = "the maximum-entropy distribution with every member's moments, where there is one"
    uses_trust = False
    is_feasible = True

    def effective_trust(self, trust: Sequence[float]) -> tuple[float, ...]:
        """Return infinite trusts, one for each in ``trust``, whose values are ignored: moments are to hold exactly."""
        return (math.inf,) * len(trust)

    def solve(self, problem: Problem, *, any_member: bool = False) -> Answer:
        """Find the I-projection of the pool onto every row's feasible set, or a proof that the set is empty.

        Rows in which at most one distribution can have the moments (:attr:`FeasibleSet.unique`) are solved by linear
        algebra, the others by the dual as ``meet`` does, but in fp64. In rows that the dual leaves NOT_CONVERGED the p
        with the nearest moments is computed, which can prove the set empty; if it does not, and heads are small enough
        for the full Hessian (:func:`~softmeet.solvers.minimise.full_hessian_pays`), interior points are tried. None of
        this is begun once the time is over.

        Args:
            problem: the batch.
            any_member: whether another distribution of the set, if interior points find one, is an answer (OPTIMAL) in
                rows in which the I-projection is not reached, as when every p of the set gives some token probability
                0, so that the dual has no optimum. Interior points are then tried however large heads are. If False,
                such rows are NOT_CONVERGED.

        Raises:
            DisjointSupportError: if a row has no token in ``problem.support`` (None: all tokens) to which every member
                gives more than 0.
            InvalidInputError: if a head's weight, or its squares, are not finite.
        """
        problem = replace(problem, dtype=torch.float64)
        if not problem.log_p.shape[1] or not may_be_unique(problem):
            answer = super().solve(problem)
        else:
            assert problem.log_pool is not None  # raises for all rows at once, before they are taken one by one
            answer = Answer.joined([self._solve_row(FeasibleSet(one)) for one in problem.rows()])
        late = unfinished(answer.status).nonzero().squeeze(-1)
        if len(late):
            answer.by_pool[late] |= _prefer(answer, problem.take(late), late, problem.log_pool[late])
        for k in late[answer.status[late] == Status.NOT_CONVERGED].tolist():
            if time_is_over():
                break
            _settle(answer, k, FeasibleSet(problem.take(late.new_tensor([k]))), any_member)
        return answer

    def verify(self, problem: Problem, answer: Answer) -> Recomputed:
        """Compute gap and status anew from the stored dual point, as ``meet`` does, without a solver.

        ``problem``, with products in fp64, is the problem that was solved, and ``answer`` the answer to it. A row is
        OPTIMAL only if its answer has the members' moments (:func:`~softmeet.essay.points.moments_hold`) and is as near
        to the distribution at the dual point as ``tol`` allows (:func:`~softmeet.rules.verify.reach`). If at most
        one distribution can have them (:attr:`FeasibleSet.unique`), that suffices: gap 0.
        """
        found = super().verify(problem, answer)
        for k, row in enumerate(FeasibleSet.of(problem)):
            holds = moments_hold(row, answer.log_probs[k].exp())
            if holds and may_be_unique(row.problem) and row.unique:
                found.log_probs[k], found.gap[k], found.status[k] = answer.log_probs[k], 0.0, int(Status.OPTIMAL)
                continue
            found.gap[k] = min(float(found.gap[k]), exact_gap(row, found.log_probs[k], row.whitened(answer.dual, k)))
            if found.status[k] != Status.INFEASIBLE:
                near = reach(found.gap[k : k + 1], found.log_probs[k : k + 1], answer.log_probs[k : k + 1])
                solved = holds and float(near) <= problem.tol
                found.status[k] = int(Status.OPTIMAL if solved else Status.NOT_CONVERGED)
        return found

    def _solve_row(self, row: FeasibleSet) -> Answer:
        """Solve one row by linear algebra if at most one p can have the moments (``row.unique``), else by the dual.

        The dual is also used if linear algebra finds neither that p nor a proof that there is none, and, to answer with
        the pool, if the time is over.
        """
        if time_is_over() or not row.unique:
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
    neither was achieved (BUDGET if the time was over); these are answered as by :class:`MaxEntropy`, and
    ``log_probs`` of INFEASIBLE rows have no meaning. The errors are those of :meth:`MaxEntropy.solve`.

    Args:
        problem: the batch; its own ``tol`` is replaced by ``exactness``, and all is computed in fp64.
        exactness: the gap in nats to solve to; at 1e-12 (``EXACT``) or below, the moments of the result are then moved
            to the members' up to round-off (:func:`~softmeet.essay.points.moments_repaired`).
    """
    problem = problem.changed(tol=exactness, dtype=torch.float64)
    answer = MaxEntropy().solve(problem, any_member=True)
    for k in (answer.status == Status.OPTIMAL).nonzero().flatten().tolist() if exactness <= EXACT else ():
        if time_is_over():
            break
        row = FeasibleSet(problem.take(torch.tensor([k], device=problem.log_p.device)))
        answer.log_probs[k] = moments_repaired(row, answer.log_probs[k].exp()).log()
    return answer


def _prefer(
    answer: Answer, problem: Problem, rows: Int[Tensor, " k"], other: Float[Tensor, "k v"]
) -> Bool[Tensor, " k"]:
    """Replace distributions in some rows of ``answer``, in place, where others are better; return the mask of these.

    They are compared by :func:`~softmeet.essay.preference.preference`, with KL(p‖q) as the objective. Where one is
    replaced nothing is known about the gap, which becomes inf; dual variables stay what they are.

    Args:
        answer: the answer of the whole batch.
        problem: the problem of those rows alone, with products in fp64.
        rows: their indices.
        other: other log-probabilities for them, in nats.
    """
    mine = answer.log_probs[rows]
    keys = []
    for points in (mine, other):
        measures = zip(residuals(problem, points).norm(dim=0), kl(points, problem.log_pool), strict=True)
        keys.append([preference(float(off), float(objective)) for off, objective in measures])
    better = torch.tensor([there < here for here, there in zip(*keys, strict=True)], device=mine.device)
    answer.log_probs[rows] = torch.where(better[:, None], other, mine)
    members = problem.log_p.transpose(0, 1)
    moved = kl(answer.log_probs[rows][:, None].expand_as(members), members)
    answer.disagreement[rows] = torch.where(better[:, None], moved, answer.disagreement[rows])
    answer.gap[rows] = answer.gap[rows].masked_fill(better, torch.inf)
    answer.certified[rows] &= ~better
    return better


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
        row.write(y, answer.ray, k)
    elif not time_is_over() and (any_member or full_hessian_pays(row.problem.projection(range(n), (math.inf,) * n))):
        _by_interior_points(answer, k, row, any_member)
    answer.passes[k] += row.passes()


def _by_interior_points(answer: Answer, k: int, row: FeasibleSet, any_member: bool) -> None:
    """Look for an answer to row ``k`` by interior points, and write it into ``answer``, in place: see `_settle`."""
    p, y, steps = entropic_projection(row, row.alive, row.log_q.exp(), row.target)
    log_p = log_normalize(row.log_q + row.tokens.times(y))
    gap = exact_gap(row, log_p, row.whitened(row.raw(y), 0))
    answer.steps[k] += steps
    if gap <= row.problem.tol and moments_hold(row, log_p.exp()):
        answer.status[k], answer.gap[k], answer.certified[k] = Status.OPTIMAL, gap, True
        answer.log_probs[k], answer.objective[k] = log_p, kl(log_p, row.log_q) - gap
        answer.disagreement[k] = kl(log_p.expand_as(row.log_p), row.log_p)
        row.write(y, answer.dual, k)
        return
    # On the boundary multipliers grow without bound, and p, which need not be the pool tilted by them, may do better.
    better = _prefer(answer, row.problem, answer.status.new_tensor([k]), p.log()[None])
    answer.by_pool[k] &= ~better[0]
    if any_member and moments_hold(row, answer.log_probs[k].exp()):
        answer.status[k] = Status.OPTIMAL
