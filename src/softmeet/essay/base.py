"""The base of the rules that choose from the feasible set C = { p in the simplex : W_iᵀ p = W_iᵀ p̂_i for all i }.

W_i is member i's head and p̂_i its distribution. For each row the I-projection of the pool q onto C, the p in C with
the least KL(p‖q), is looked for first; either it is found, or a proof that C is empty. Then the rule chooses from C by
its own objective. Its answer is certified by evaluation alone: the rule states a lower bound on its objective over C
that holds for any multipliers, and the gap is the difference from the objective's value. Multipliers y belong to the
constraints Gᵀp = g of :class:`~softmeet.essay.feasible_set.FeasibleSet`: m numbers, the last for Σp = 1. A row that is
not solved is answered by the best point that was seen, the pool among them (:meth:`ExactRule.preference`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.essay.feasible_set import FeasibleSet
from softmeet.essay.max_entropy import EXACT, members_of
from softmeet.essay.points import distance_to_unique, moments_hold
from softmeet.essay.preference import preference
from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.base import Rule
from softmeet.rules.problem import Problem
from softmeet.rules.recomputed import Recomputed
from softmeet.simplex import kl
from softmeet.solvers.base import Status, unfinished
from softmeet.solvers.clock import time_is_over
from softmeet.solvers.projection import MOMENT_TOLERANCE


@dataclass(frozen=True)
class Bounds:
    """The value of a rule's objective at some p, and proved bounds on the objective over the feasible set.

    All are in the objective's unit: nats, except for ``min-squared-cross-entropy`` (nats²) and ``least-squares``
    (squared distance of moments).

    Attributes:
        value: the objective at p, which may be inf.
        least: the objective is at least this at every point of the feasible set; -inf if nothing is proved.
        most: the objective is at most this at every point of the feasible set; inf if nothing is proved.
        reached: the objective near p where the members' moments are met up to rounding, as far as that is known; -inf
            if it was not looked for, as it hardly differs from the value.
    """

    value: float
    least: float
    most: float = torch.inf
    reached: float = -torch.inf

    @property
    def gap(self) -> float:
        """The distance |value - least|, in the objective's unit: the most by which p can miss the least objective.

        It is ``reached`` - least if that is more. A value below ``least`` is possible only if p does not have the
        members' moments exactly.
        """
        return max(abs(self.value - self.least), self.reached - self.least)


@dataclass(frozen=True, eq=False)
class Choice:
    """A rule's answer for one row, as :meth:`ExactRule.choose` returns it.

    Attributes:
        p: the distribution, probabilities, (v,), fp64.
        y: the multipliers of Gᵀp = g, (m,), with which :meth:`ExactRule.bounds` proves how near p is to optimal: those
            of each member's whitened moments, member after member, and a last one for Σp = 1.
        steps: how many steps of its solver the choice took; those that found ``member`` are not included, and
            :meth:`ExactRule.solve` adds both.
        most: the largest value of the objective over the feasible set, or an upper bound on it; NaN if the rule did not
            compute it, in which case :attr:`Bounds.most` is reported.
        constant: whether ``most`` showed that the objective is constant on the feasible set up to ``tol``; the status
            OPTIMAL then becomes DEGENERATE.
    """

    p: Float[Tensor, " v"]
    y: Float[Tensor, " m"]
    steps: int
    most: float = torch.nan
    constant: bool = False


class ExactRule(Rule):
    """The base of rules that choose one distribution from the feasible set C: all p with every member's moments.

    Subclasses implement the choice (:meth:`choose`) and bounds on their objective that prove how near to optimal it is
    (:meth:`bounds`).

    Attributes:
        always_answers: whether the rule also answers rows in which C is empty or no distribution in C was found.
        exactness: the gap, in nats, to which the pool's I-projection onto C is found before the rule chooses.
    """

    reads_heads = True
    is_feasible = True
    always_answers: ClassVar[bool] = False
    # In nats: how well a member of C must be known before the rule chooses.
    exactness: ClassVar[float] = EXACT

    @abstractmethod
    def choose(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Choice:
        """Choose the distribution of one row, by the subclass's criterion.

        :meth:`solve` calls it once for each row that is to be answered.

        Args:
            row: the row's feasible set C.
            member: the I-projection of the pool onto C, probabilities, (v,), or another distribution in C if the
                I-projection could not be computed. None if :meth:`solve` did not look for one (the moments need not
                hold, by :meth:`constrained`) or found none, which only a rule that ``always_answers`` meets.

        Returns:
            The distribution, with multipliers by which :meth:`bounds` proves how near to optimal it is.
        """

    @abstractmethod
    def bounds(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Evaluate the objective at ``p`` and bound it over the feasible set by multipliers ``y``, without a solver.

        Args:
            row: the row's feasible set.
            p: probabilities, (v,), fp64; not necessarily with the members' moments.
            y: multipliers of Gᵀp = g, (m,), the last for Σp = 1. The bounds hold for any y; the lower one equals the
                minimum at the optimal y.

        Returns:
            The objective at ``p``, a lower bound on it over the feasible set, and an upper bound (inf if none is
            known).
        """

    def proved(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Return :meth:`bounds` at ``p`` and ``y``, corrected in three cases.

        If ``p`` has mass outside ``row.alive`` or its sum differs from 1 by more than ``MOMENT_TOLERANCE`` (1e-6), the
        lower bound is -inf and the upper one inf. If the moments must hold (:meth:`constrained`), at most one
        distribution has the members' moments (``row.unique``), and ``p`` has them, the bounds are the values for all
        probabilities lower and higher by the distance to that one
        (:func:`~softmeet.essay.points.distance_to_unique`): every objective rises with each of them, or falls.
        Of other rows with the moments :meth:`reached` counts, too.
        """
        found = self.bounds(row, p, y)
        if bool(p[~row.alive].any()) or not abs(float(p.sum()) - 1) <= MOMENT_TOLERANCE:
            return Bounds(found.value, -torch.inf)
        if self.constrained(row.problem) and row.unique and moments_hold(row, p):
            off = distance_to_unique(row, p) * row.alive
            least, most = sorted(self.bounds(row, q.clamp_min(0), y).value for q in (p - off, p + off))
            return Bounds(found.value, max(found.least, least), min(found.most, most))
        if moments_hold(row, p):
            return replace(found, reached=self.reached(row, p))
        return found

    def reached(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> float:
        """Return the objective near ``p``, (v,), where the moments are met up to rounding: :attr:`Bounds.reached`.

        A rule whose objective has logarithms of small probabilities overrides this: ``p`` has the moments to 1e-6, by
        which such a logarithm may be far off. The base class returns -inf.
        """
        return -torch.inf

    def constrained(self, problem: Problem) -> bool:
        """Return whether the answer must have the members' moments.

        True in the base class, for every ``problem``. The moments hold if the whitened ones differ from the members' by
        at most ``MOMENT_TOLERANCE`` (1e-6) in Euclidean length. A rule that returns False, such as ``least-squares``,
        may give an answer with other moments.
        """
        return True

    def status(self, row: FeasibleSet, p: Float[Tensor, " v"], found: Bounds) -> Status:
        """Return the status of the answer ``p``, probabilities, (v,), with its bounds ``found`` from :meth:`proved`.

        NOT_CONVERGED if the gap (:attr:`Bounds.gap`) exceeds the setting ``tol`` or is NaN, or if the moments must hold
        (:meth:`constrained`) and do not. DEGENERATE if the bounds prove that the objective varies by at most ``tol``
        over the feasible set, unless at most one distribution has the members' moments (``row.unique``). Else OPTIMAL.
        """
        exact = not self.constrained(row.problem) or moments_hold(row, p)
        if not exact or not found.gap <= row.problem.tol:
            return Status.NOT_CONVERGED
        nothing_chosen = found.most - found.least <= row.problem.tol and not row.unique
        return Status.DEGENERATE if nothing_chosen else Status.OPTIMAL

    def solve(self, problem: Problem) -> Answer:
        """Solve a batch row by row: find a distribution in the feasible set C, then choose by the rule's objective.

        First the pool's I-projection onto C is looked for in every row, except by a rule whose moments need not hold
        (:meth:`constrained` returns False) and whose ``always_answers`` is False. A row in which a proof is found that
        C is empty gets the status INFEASIBLE, a row with neither a distribution nor a proof NOT_CONVERGED, and for
        neither :meth:`choose` is called; a rule that ``always_answers`` chooses there, too, with None as ``member``.

        A row that ends NOT_CONVERGED is answered by the best of the points known by then, by :meth:`preference`: the
        choice, the distribution from C, the point at which the search for one ended, and the pool. Once the time is
        over (:func:`softmeet.time_is_over`) no further row is chosen in: it is NOT_CONVERGED, which
        :func:`~softmeet.rules.answered.answered` makes BUDGET, with gap inf and objective NaN, and its answer is the
        distribution from C or the pool, whichever :meth:`preference` says.

        Raises:
            DisjointSupportError: if a row has no token in ``problem.support`` (None: all tokens) to which every member
                gives more than 0.
            InvalidInputError: if a head's weight, or its squares, are not finite.
        """
        seeks = self.constrained(problem) or self.always_answers
        answer = members_of(problem, self.exactness) if seeks else closed_form(problem, problem.log_pool.clone())
        empty = (answer.status == Status.INFEASIBLE).tolist()
        lost = unfinished(answer.status).tolist()
        for k, row in enumerate(FeasibleSet.of(problem)):
            if empty[k] and not self.always_answers:
                continue
            known = answer.log_probs[k].clone() if seeks and not empty[k] else row.log_q
            if time_is_over():
                self._leave(answer, k, row, row.log_q if lost[k] and self.always_answers else known)
            else:
                member = known.exp() if seeks and not (empty[k] or lost[k]) else None
                chosen = self.always_answers or not lost[k]
                choice = self.choose(row, member) if chosen else Choice(known.exp(), torch.zeros_like(row.target), 0)
                self._write(answer, k, row, choice, known)
            answer.disagreement[k] = kl(answer.log_probs[k].expand_as(row.log_p), row.log_p)
            answer.disagreement_is_bound[k] = True
        return answer

    def preference(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> tuple[float, float]:
        """Return the key by which unfinished answers are compared; the least is the best.

        It is that of :func:`~softmeet.essay.preference.preference`, with the moments that must hold
        (:meth:`constrained`) and the objective of :meth:`bounds`; two times inf for a ``p`` with mass outside
        ``row.alive``, or that sums to another number than 1. ``p`` are probabilities, (v,).
        """
        if bool(p[~row.alive].any()) or not abs(float(p.sum()) - 1) <= MOMENT_TOLERANCE:
            return torch.inf, torch.inf
        off = float(row.excess(p).norm()) if self.constrained(row.problem) else 0.0
        return preference(off, self.bounds(row, p, torch.zeros_like(row.target)).value)

    def _leave(self, answer: Answer, k: int, row: FeasibleSet, known: Float[Tensor, " v"]) -> None:
        """Write the better of ``known`` log-probabilities and the pool into row ``k`` of ``answer``, not converged."""
        answer.log_probs[k] = min(known, row.log_q, key=lambda point: self.preference(row, point.exp()))
        answer.status[k], answer.gap[k], answer.certified[k] = Status.NOT_CONVERGED, torch.inf, False
        answer.objective[k], answer.objective_range[k] = torch.nan, answer.gap.new_tensor([-torch.inf, torch.inf])

    def _write(self, answer: Answer, k: int, row: FeasibleSet, choice: Choice, known: Float[Tensor, " v"]) -> None:
        """Write the choice in row ``k``, its bounds and its status into ``answer``, in place.

        If the choice is not converged, and ``known``, log-probabilities, or the pool is better, that takes its place.
        """
        y, log_p = choice.y, choice.p.log()
        found = self.proved(row, choice.p, y)
        status = self.status(row, choice.p, found)
        if status == Status.NOT_CONVERGED:
            log_p = min(log_p, known, row.log_q, key=lambda point: self.preference(row, point.exp()))
            found = self.proved(row, log_p.exp(), y)
            status = self.status(row, log_p.exp(), found)
        answer.log_probs[k] = log_p
        answer.status[k] = Status.DEGENERATE if status == Status.OPTIMAL and choice.constant else status
        answer.gap[k], answer.objective[k] = found.gap, found.value
        answer.certified[k] = found.gap < torch.inf
        most = found.most if choice.most != choice.most else choice.most
        answer.objective_range[k] = answer.gap.new_tensor([found.least, most])
        answer.steps[k] += choice.steps
        answer.passes[k] += row.passes()
        row.write(y, answer.dual, k)
        proof = self.proof(row, log_p.exp())
        if proof.any():
            row.write(proof, answer.ray, k)

    def verify(self, problem: Problem, answer: Answer) -> Recomputed:
        """Compute every row's gap and status anew from the stored answer and its multipliers, without a solver.

        All is in fp64. The distributions returned are those of ``answer``, renormalised. ``answer`` is the result of
        :meth:`solve` for ``problem``; only its ``log_probs`` and ``dual`` are read, and nothing is changed.
        """
        looks = []
        for k, row in enumerate(FeasibleSet.of(problem)):
            p = answer.log_probs[k].exp()
            found = self.proved(row, p, row.whitened(answer.dual, k))
            looks.append(((p / p.sum()).log(), found.gap, self.status(row, p, found)))
        return Recomputed.of_rows(looks, answer.log_probs)

    def proof(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> Float[Tensor, " m"]:
        """Return multipliers y of Gᵀp = g, (m,), that prove the feasible set empty; zeros if ``p`` gives none.

        :meth:`solve` calls it with the answer ``p``, probabilities, (v,), of each row in which :meth:`choose` was
        called. Multipliers y prove the set empty if yᵀ(g_j - g) < 0 for every token j that may have mass, g_j its row
        of G. The last entry of y, for Σp = 1, is 0. The base class returns zeros.
        """
        return torch.zeros_like(row.target)
