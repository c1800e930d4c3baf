"""The rule ``meet``: it moves the pool towards moments on which corrected members agree, corrections having a price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.base import Rule
from softmeet.rules.problem import Problem
from softmeet.rules.recomputed import Recomputed, reach
from softmeet.rules.values import SettingValues
from softmeet.simplex import kl, log_normalize, logit_mean
from softmeet.solvers import tuning
from softmeet.solvers.base import Status, ended, unfinished
from softmeet.solvers.certificate import repaired_gap_bound, restricted_gap_bound
from softmeet.solvers.direction import direction
from softmeet.solvers.dual import DualState
from softmeet.solvers.linalg import backtrack
from softmeet.solvers.minimise import full_hessian_pays, minimise_dual
from softmeet.solvers.projection import Point, Projection

# A gap, in nats, that bounds no total variation: √(gap / 2) is one.
_VACUOUS = 2.0
# How well weights sum to 1.
_ONE = 1e-6
# The most points at which a second look bounds the gap, and the most halvings of a step to the next.
_LOOKS, _HALVINGS = 5, 20


class Meet(Rule):
    """minimise KL(p‖q) + Σ ρ_i KL(r_i‖p̂_i) over p, r_i with W_iᵀ p = W_iᵀ r_i: the relaxed I-projection of a pool q.

    p is the answer. Member i, with distribution p̂_i, head W_i and hidden state h_i, may be corrected to
    r_i = softmax(W_i(h_i - λ_i/ρ_i)); each nat of KL(r_i‖p̂_i) costs ρ_i nats, the member's trust. If all trusts are 0,
    p = q; infinite trust means r_i = p̂_i, so that p has member i's exact moments. Solved by Newton's method on the
    dual, whose variables are the λ_i.

    With ``budget``, meant for decoding, the solver takes at most that many steps for a token and proves no bound on the
    gap; a row whose estimated gap is still above ``tol`` ends with ``Status.BUDGET`` and the best point found.

    No answer is worse than the pool by what the rule can prove: the dual function f at its dual variables, by which
    the guarantee of docs/theory/agreement.md falls or rises, is at most f(0), that of the pool.
    """

    budget: int | None = Field(default=None, ge=1)
    """The most steps a token, without a bound on the remaining gap; by default, as many as tol takes."""

    name = "meet"
    summary = "the pool, moved to where the members agree up to a price in nats (the default)"
    reads_heads = True
    uses_trust = True
    tilts_pool = True

    def solve(self, problem: Problem) -> Answer:
        """Minimise the dual by Newton's method; return the pool in rows where it is proved to be within ``tol``.

        Members of trust 0 take no part. Unless ``budget`` is set or the time is over, rows that did not converge are
        solved once more, from the pool, in fp64 if the full Hessian pays (small heads), unless that is how they were
        solved; steps and passes of both attempts are summed, and the better answer is kept. A row still not converged
        is answered by the solver's point, or by the pool (but never for ``max-entropy``) if the pool's bound is below
        the solver's gap, or that gap is above 2 nats or, unless ``budget`` or the time ended the row, not certified.

        Where one head makes all members' distributions, rows have a closed form instead (:func:`averaged`), unless a
        support takes more than ``tol`` from it.

        Raises:
            DisjointSupportError: if a row has no token for the pool, as by :attr:`Problem.log_pool`.
        """
        trust = self.effective_trust(problem.trust)
        trusted = [i for i, rho in enumerate(trust) if rho > 0]
        if not trusted:
            return closed_form(problem, problem.log_pool, torch.zeros_like(problem.log_pool[:, 0]))
        weights = self.one_head_weights(problem.settings) if problem.states else None
        if weights is not None:
            answer = averaged(problem, trust, weights)
            late = unfinished(answer.status).nonzero().squeeze(-1)
            return answer.put(late, self.solve(replace(problem.take(late), states=()))) if len(late) else answer
        exact = self.is_feasible
        projection = replace(problem.projection(trusted, trust), pool_may_answer=not exact, moments_hold=exact)
        if self.budget is not None:
            state = minimise_dual(projection, self.budget, certify=False, rescue=False)
            state.status = state.status.masked_fill(state.status == Status.NOT_CONVERGED, Status.BUDGET)
            return _answer(problem, projection, trusted, state)
        state = minimise_dual(projection, problem.settings.max_steps, certify=problem.proved)
        state.status = ended(state.status)
        answer = _answer(problem, projection, trusted, state)
        late = (answer.status == Status.NOT_CONVERGED).nonzero().squeeze(-1)
        # Scores of single precision may be too coarse for a row near the edge of what is feasible, and a start too far.
        dtype = torch.float64 if full_hessian_pays(projection) else problem.dtype
        if not len(late) or (problem.start is None and dtype == problem.dtype):
            return answer
        again = Meet.solve(self, replace(problem.take(late), dtype=dtype, start=None))
        # The better of both: an infinite gap, which says nothing, leaves it to the dual value.
        first = answer.take(late)
        higher = (again.gap == first.gap) & (again.objective >= first.objective)
        better = ~unfinished(again.status) | (again.gap < first.gap) | higher
        answer.steps[late] += again.steps
        answer.passes[late] += again.passes
        again.steps, again.passes = answer.steps[late], answer.passes[late]
        return answer.put(late[better], again.take(better.nonzero().squeeze(-1)))

    def one_head_weights(self, settings: SettingValues) -> tuple[float, ...] | None:
        """Return (w_i + ρ_i) / (1 + Σ ρ), with w_i the weights and ρ_i the trusts; None unless the closed form holds.

        It holds for the logit mean with weights that sum to 1 as the pool, and finite trusts.
        """
        trust, weights = self.effective_trust(settings.member_trust), settings.member_weights
        total = 1 + sum(trust)
        if settings.pool != "logit-mean" or math.isinf(total) or abs(sum(weights) - 1) > _ONE:
            return None
        return tuple([(w + rho) / total for w, rho in zip(weights, trust, strict=True)])

    def verify(self, problem: Problem, answer: Answer) -> Recomputed:
        """Recompute each row in fp64 from the answer's stored dual variables and Farkas proof, without the solver.

        Where no bound on the gap is tight at the stored point, one at a lower point is used, and the fall to it added.

        Returns:
            The distribution at the dual point (the pool, if it was the answer), the gap proved there, and the
            status OPTIMAL, INFEASIBLE (the proof holds) or NOT_CONVERGED (the gap is above ``tol``) of each row.
        """
        trust = self.effective_trust(problem.trust)
        looks = [_look(row, trust, answer, k) for k, row in enumerate(problem.changed(dtype=torch.float64).rows())]
        return Recomputed.of_rows(looks, answer.log_probs)

    def pool_bound(self, problem: Problem) -> Float[Tensor, " B"] | None:
        """Return Σ_i ρ_i KL(q‖p̂_i) in nats, (B,); None if a trust ρ_i is infinite.

        It is the objective at p = r_i = q, the pool. As the objective is never negative, the pool is no further than
        that above its optimum.
        """
        return None if any(map(math.isinf, self.effective_trust(problem.trust))) else problem.pool_bound()


def _answer(problem: Problem, projection: Projection, trusted: list[int], state: DualState) -> Answer:
    # A row that did not converge is answered by the pool if the pool's bound is below the solver's gap, or if that gap
    # is too large to say anything or, unless a budget or the time ended it, not certified; else by the solver's point.
    # Rounding may have raised f above its value at the pool, which proves that the point is worse.
    unproved = (state.status == Status.NOT_CONVERGED) & ~state.certified
    vacuous = (state.gap > _VACUOUS) & state.pool_bound.isfinite()
    late = unproved | (state.pool_bound < state.gap) | vacuous | (state.value > 0)
    late &= unfinished(state.status) & projection.pool_may_answer
    gap = torch.where(late, state.pool_bound, state.gap)
    # The pool itself, to the last bit; f is 0 there, which rounding may have raised.
    by_pool = state.by_pool | late
    risen = by_pool & (state.value > 0)
    state.nu, state.value = state.nu.masked_fill(risen[:, None], 0.0), state.value.masked_fill(risen, 0.0)
    found = closed_form(problem, torch.where(by_pool[:, None], problem.log_pool, state.log_p), -state.value)
    own = kl(state.log_r, projection.log_p)
    for k, i in enumerate(trusted):
        if not math.isinf(projection.trust[k]):
            found.disagreement[:, i] = torch.where(by_pool, found.disagreement[:, i], own[:, k])
            found.disagreement_is_bound[:, i] = by_pool
    share = projection.read / sum([head.d for head in problem.heads])
    return replace(
        found,
        status=state.status,
        gap=gap,
        certified=state.certified | (late & gap.isfinite()),
        steps=state.steps,
        passes=state.passes * share,
        dual=_raw_dual(problem, projection, trusted, state.nu),
        ray=_raw_dual(problem, projection, trusted, projection.exact_part(state.ray)),
        by_pool=by_pool,
    )


def _raw_dual(
    problem: Problem, projection: Projection, trusted: list[int], nu: Float[Tensor, "B D"]
) -> tuple[Float[Tensor, "B _"], ...]:
    """Return every member's λ_i = α_i R_i ν_i, α_i = min(1, ρ_i), in the coordinates of W_i; zeros at trust 0."""
    out = [nu.new_zeros(len(nu), head.d) for head in problem.heads]
    parts = nu.split(projection.widths, dim=-1)
    for i, alpha, head, part in zip(trusted, projection.alpha, projection.heads, parts, strict=True):
        out[i] = alpha * part @ head.whitening.factor.T
    return tuple(out)


def _look(
    problem: Problem, trust: Sequence[float], answer: Answer, k: int
) -> tuple[Float[Tensor, " v"], float, Status]:
    """Evaluate the dual point and the Farkas proof that are stored for row k, in fp64 and without the solver.

    Args:
        problem: the problem that has row k alone.
        trust: every member's trust, as the rule solved with them.
        answer: the answer to the whole batch.
        k: the row's index in the batch.

    Returns:
        (log p at the dual point, or log q if the pool is the answer; the certified gap in nats; the status, which is
        OPTIMAL only if the answer itself is within the tolerance).
    """
    used = [i for i, rho in enumerate(trust) if rho > 0]
    given = log_normalize(answer.log_probs[k : k + 1])
    if used:
        dual = [answer.dual[i][k] for i in used]
        log_p, gap, far = _distances(problem.projection(used, trust), dual, given, by_pool=bool(answer.by_pool[k]))
    else:
        log_p, gap, far = problem.log_pool, 0.0, float(reach(given.new_zeros(1), problem.log_pool, given))
    if _proves_empty(problem, [ray[k] for ray in answer.ray]):
        return log_p[0], gap, Status.INFEASIBLE
    solved = gap <= problem.tol and far <= problem.tol
    return log_p[0], gap, Status.OPTIMAL if solved else Status.NOT_CONVERGED


def _distances(
    projection: Projection, dual: Sequence[Float[Tensor, " _"]], given: Float[Tensor, "1 v"], *, by_pool: bool
) -> tuple[Float[Tensor, "1 v"], float, float]:
    """Measure a row's answer ``given``, log a in nats, by what follows from its dual variables ``dual``.

    Returns:
        (log p at the dual point, or log q if ``by_pool``, (1, v); the certified gap; a bound on the divergence of a
        from the optimum p°, one way or the other).
    """
    nu, z = _scores(projection, dual)
    at = Point.at(projection, z)
    # By weak duality, with a in place of every r_i: it bounds the gap, and KL(a‖p°).
    own = max(0.0, float(projection.objective(given) + at.value))
    if by_pool:
        return projection.log_q, own, own
    rounding = float(projection.rounding(at.p, at.r, z, nu))
    log_p, gap, own = projection.pooled(z), _gap(projection, at, rounding), own + rounding
    far = float(reach(given.new_tensor([gap]), log_p, given))
    return log_p, min(gap, own), min(far, own)


def _gap(projection: Projection, at: Point, rounding: float) -> float:
    """Bound the gap of a projection's one row at a point, in nats, to its tolerance if a few tries can; else inf.

    Where members are nearly one-hot no bound at the point may be tight: then one is computed at a lower point, and the
    fall of f to there is added. Steps to lower points are halved until f falls enough. ``rounding`` is that of f.
    """
    start = at.value
    # The pool, in place of p and of every r_i, has equal moments: at small trusts that costs little.
    best = max(0.0, float(projection.pool_gap() + start)) + rounding
    for _ in range(_LOOKS if best > projection.tol else 0):
        log_p, log_r = at.logs(projection)
        gradient, fall = projection.moments(at.p[:, None] - at.r), float(start - at.value)
        best = min(best, fall + restricted_gap_bound(projection, 0, log_p[0], log_r[0], gradient[0]))
        if best <= projection.tol or projection.exact.any():
            break
        y = projection.scores(direction(projection, gradient, at.p, at.r, min(log_p.shape[-1], tuning.HEAVY_AT_MOST)))
        best = min(best, fall + float(repaired_gap_bound(projection, (log_p, log_r), y)[0]))
        slope = at.slope(projection, y)
        t, _ = backtrack(partial(_rises, projection, at, y, slope), torch.ones_like(slope), 0.5, _HALVINGS)
        there = Point.at(projection, at.z + t[:, None, None] * y)
        if best <= projection.tol or not there.value < at.value:
            break
        at = there
    return best


def _rises(
    projection: Projection, at: Point, y: Float[Tensor, "B n v"], slope: Float[Tensor, " B"], t: Float[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """Return whether f falls by less than a tenth of what its ``slope`` along the scores ``y`` promises after ``t``."""
    return projection.dual(at.z + t[:, None, None] * y) > at.value + 0.1 * t * slope


def _proves_empty(problem: Problem, ray: Sequence[Float[Tensor, " _"]]) -> bool:
    """Return whether ``ray``, a λ_i for each member, is a Farkas proof that no p has the moments of all members."""
    if not any(lam.any() for lam in ray):
        return False
    exact = problem.projection(range(len(ray)), (math.inf,) * len(ray))
    nu, z = _scores(exact, ray)
    return bool(exact.excludes(z, nu, z.abs().amax((-1, -2))))


def _scores(
    projection: Projection, dual: Sequence[Float[Tensor, " _"]]
) -> tuple[Float[Tensor, "1 D"], Float[Tensor, "1 n v"]]:
    """Convert a row's λ_i, in the coordinates of W_i, to whitened dual variables ν and their scores Q_i ν_i."""
    parts = zip(dual, projection.alpha, projection.heads, strict=True)
    nu = torch.cat([h.whitening.inverse @ lam / alpha for lam, alpha, h in parts])[None]
    return nu, projection.scores(nu)


def averaged(problem: Problem, trust: tuple[float, ...], weights: tuple[float, ...]) -> Answer:
    """Return the answer of ``meet`` to members p̂_i = softmax(W h_i + β) of one head, in closed form.

    With η = Σ v_i h_i, v_i = (w_i + ρ_i) / (1 + Σ ρ) and λ_i = ρ_i (h_i - η), all corrected members r_i and, but for
    the support, the answer are softmax(W η + β) = softmax(Σ v_i log p̂_i) (docs/theory/agreement.md#one-head).

    Args:
        problem: the problem, with ``states``, a logit mean of weights w_i that sum to 1 as the pool, and the
            constraints of whole heads.
        trust: ρ_i of each member, finite, not all 0.
        weights: v_i of each member.

    Returns:
        The answer, with the certified gap -Σ ρ log r(S), r(S) being the mass of r_i on the support; a row whose gap is
        above ``tol`` is NOT_CONVERGED.

    Raises:
        DisjointSupportError: if a row has no mass on the support.
    """
    log_p, rho = problem.log_p, problem.log_p.new_tensor(trust)
    log_r = logit_mean(log_p, log_p.new_tensor(weights))
    log_probs = problem.restricted(log_r)
    found = closed_form(problem, log_probs)
    if problem.support is not None:
        found.gap = -rho.sum() * log_r[:, problem.support].logsumexp(-1).clamp_max(0.0)
        found.status = found.status.masked_fill(found.gap > problem.tol, int(Status.NOT_CONVERGED))
    # p = r_i = the answer is feasible: its objective exceeds the optimum by no more than the gap.
    primal = kl(log_probs, problem.log_pool) + found.disagreement @ rho
    found.objective = (primal - found.gap).clamp_min(0.0)
    trusted = (rho > 0).expand_as(found.disagreement)
    found.disagreement = torch.where(trusted, kl(log_r.expand_as(log_p), log_p).T, found.disagreement)
    found.disagreement_is_bound = ~trusted
    states = [own.to(log_p) for own in problem.states]
    center = sum(share * own for share, own in zip(weights, states, strict=True))
    found.dual = tuple([r * (own - center) for r, own in zip(trust, states, strict=True)])
    return found
