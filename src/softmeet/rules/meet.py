"""The rules that make the members agree: ``max-entropy``, exactly, and ``meet``, up to a price in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.base import Rule
from softmeet.rules.dual_point import looked_at
from softmeet.rules.points import entropic, exact_gap, moments_hold, only, separating
from softmeet.rules.problem import Problem
from softmeet.rules.row import Row, may_be_unique
from softmeet.rules.verify import Recomputed
from softmeet.simplex import kl, log_normalize
from softmeet.solvers.base import Status, iterate
from softmeet.solvers.dense import DenseState, dense
from softmeet.solvers.dual import DualState
from softmeet.solvers.newton import DualNewton
from softmeet.solvers.projection import Projection

# Multiplications for one Hessian, v D², that cost less than dense steps; that do where a gap is to be smaller than
# this; and the most that a row in trouble may cost, a few seconds a step.
_CHEAP, _FINE, _PATIENT = (2**27, 2**32), 1e-5, 2**38
# A gap, in nats, that bounds no total variation: √(gap / 2) is one.
_VACUOUS = 2.0


class Meet(Rule):
    """minimise KL(p‖q) + Σ ρ_i KL(r_i‖p̂_i) over p, r_i with W_iᵀ p = W_iᵀ r_i: the relaxed I-projection of a pool q.

    Each member may be corrected inside its own family, r_i = softmax(W_i(h_i - λ_i/ρ_i)), at ρ_i nats per nat. Trust 0
    is the pool; infinite trust is the exact constraint. Solved by Newton's method on the dual.

    With ``budget`` the solver takes so many steps a token, for decoding: no bound on the gap is looked for, and a row
    whose estimated gap did not come below ``tol`` ends with ``Status.BUDGET`` and the best point found.
    """

    budget: int | None = Field(
        default=None,
        ge=1,
        description="Steps a token, without a bound on what is left; as many as tol takes by default.",
    )

    name = "meet"
    summary = "the pool, moved to where the members agree up to a price in nats (the default)"
    reads_heads = True
    uses_trust = True
    tilts_pool = True

    def solve(self, problem: Problem) -> Answer:
        """Minimise the dual by Newton's method, and answer with the pool where that is proved to be near enough."""
        return self._descended(problem)

    def _descended(self, problem: Problem) -> Answer:
        """Members of trust 0 drop out; the rest go to the solver."""
        trust = self.effective_trust(problem.trust)
        trusted = [i for i, rho in enumerate(trust) if rho > 0]
        if not trusted:
            return closed_form(problem, problem.log_pool, torch.zeros_like(problem.log_pool[:, 0]))
        projection = replace(problem.projection(trusted, trust), pool_may_answer=not self.is_feasible)
        if self.budget is not None:
            return _answer(problem, projection, trusted, _within(projection, self.budget))
        answer = _answer(problem, projection, trusted, _solved(projection, problem))
        late = (answer.status == Status.NOT_CONVERGED).nonzero().squeeze(-1)
        # Scores of single precision may be too coarse for a row near the edge of what is feasible, and a start too far.
        dtype = torch.float64 if full_hessian_pays(projection) else problem.dtype
        if not len(late) or (problem.start is None and dtype == problem.dtype):
            return answer
        again = self._descended(replace(problem.take(late), dtype=dtype, start=None))
        again.steps += answer.steps[late]
        again.passes += answer.passes[late]
        return answer.put(late, again)

    def verify(self, problem: Problem, answer: Answer) -> Recomputed:
        """Evaluate the dual at the stored point, row by row."""
        trust = self.effective_trust(problem.trust)
        looks = [looked_at(row, trust, answer, k) for k, row in enumerate(Row.of(problem))]
        return Recomputed.of_rows(looks, answer.log_probs)

    def pool_bound(self, problem: Problem) -> Float[Tensor, " B"] | None:
        """Σ ρ_i KL(q‖p̂_i), where trusts are finite."""
        return None if any(map(math.isinf, self.effective_trust(problem.trust))) else problem.pool_bound()


class MaxEntropy(Meet):
    """minimise KL(p‖q) over p with W_iᵀ p = W_iᵀ p̂_i for every member: the I-projection of the pool q.

    Without bias and soft-cap, and from the logit mean, this is the member of maximum entropy, at every weighting. The
    feasible set is often empty for real models; then the status is INFEASIBLE, proved by a Farkas vector. Where
    rank [1, A] is the number of tokens, at most one distribution has the moments, and it is found by linear algebra.
    """

    name = "max-entropy"
    summary = "the maximum-entropy distribution with every member's moments, where there is one"
    uses_trust = False
    is_feasible = True

    def effective_trust(self, trust: Sequence[float]) -> tuple[float, ...]:
        """Make every trust infinite: moments hold exactly, whatever was asked for."""
        return (math.inf,) * len(trust)

    def solve(self, problem: Problem) -> Answer:
        """By linear algebra where moments leave no choice, else as ``meet``; what that leaves is settled row by row."""
        if not problem.log_p.shape[1] or not may_be_unique(problem):
            answer = self._descended(problem)
        else:
            problem.require_common_tokens()
            rows = replace(problem, dtype=torch.float64).rows()
            answer = Answer.joined([self._solve_row(Row(one)) for one in rows])
        for k in (answer.status == Status.NOT_CONVERGED).nonzero().flatten().tolist():
            _settle(answer, k, Row.of(problem.take(torch.tensor([k], device=problem.log_p.device)))[0])
        return answer

    def verify(self, problem: Problem, answer: Answer) -> Recomputed:
        """As ``meet``; where moments leave no choice, see whether they hold."""
        found = super().verify(problem, answer)
        for k, row in enumerate(Row.of(problem)):
            if may_be_unique(row.problem) and row.unique and moments_hold(row, answer.log_probs[k].exp()):
                found.log_probs[k], found.gap[k], found.status[k] = answer.log_probs[k], 0.0, int(Status.OPTIMAL)
        return found

    def _solve_row(self, row: Row) -> Answer:
        if not row.unique:
            return self._descended(row.problem)
        p, proof = only(row)
        if p is None and not proof.any():
            return self._descended(row.problem)
        if p is None:
            answer = closed_form(row.problem, row.log_q[None], torch.full_like(row.log_q[:1], torch.inf))
            unsolved = torch.full_like(answer.gap, torch.inf)
            status = torch.full_like(answer.status, int(Status.INFEASIBLE))
            answer = replace(answer, ray=row.raw(proof), status=status, gap=unsolved, certified=unsolved < 0)
        else:
            answer = closed_form(row.problem, p.log()[None], kl(p.log(), row.log_q)[None])
        return replace(answer, passes=answer.passes + row.passes())


def _settle(answer: Answer, k: int, row: Row) -> None:
    """A row that Newton's method left open: empty by the nearest moments, or solved by interior points.

    Those count directions once that members share, and so come to an end where multipliers grow without bound.
    """
    y = separating(row)
    if y is not None:
        answer.status[k] = Status.INFEASIBLE
        for mine, lam in zip(answer.ray, row.raw(y), strict=True):
            mine[k] = lam[0]
    elif full_hessian_pays(row.problem.projection(range(len(row.heads)), (math.inf,) * len(row.heads))):
        p, y, steps = entropic(row, row.alive, row.log_q.exp(), row.target)
        log_p, dual = log_normalize(row.log_q + row.tokens.times(y)), row.raw(y)
        gap = exact_gap(row, log_p, tuple(lam[0] for lam in dual))
        answer.steps[k] += steps
        if gap > row.problem.tol:
            # On the boundary multipliers have no end, and where Newton's ray was left is no place to answer from.
            answer.log_probs[k] = p.log() if moments_hold(row, p) else row.log_q
        else:
            answer.status[k], answer.gap[k], answer.certified[k] = Status.OPTIMAL, gap, True
            answer.log_probs[k], answer.objective[k] = log_p, kl(log_p, row.log_q) - gap
            answer.disagreement[k] = kl(log_p.expand_as(row.log_p), row.log_p)
            for mine, lam in zip(answer.dual, dual, strict=True):
                mine[k] = lam[0]
    answer.passes[k] += row.passes()


def full_hessian_pays(projection: Projection) -> bool:
    """Whether Newton's method with the full Hessian costs less than dense steps."""
    v, D = projection.log_q.shape[-1], len(projection.scale)
    return v * D**2 <= _CHEAP[projection.tol < _FINE]


def _solved(projection: Projection, problem: Problem) -> DualState:
    max_steps = problem.settings.max_steps
    if full_hessian_pays(projection):
        return iterate(DualNewton(), projection, max_steps)
    return _rescued(projection, dense(projection, max_steps, certify=problem.proved), max_steps)


def _within(projection: Projection, budget: int) -> DualState:
    """So many steps and no bound, but where the full Hessian gives it away; what is not done then has spent them."""
    if full_hessian_pays(projection):
        state: DualState = iterate(DualNewton(), projection, budget)
    else:
        state = dense(projection, budget, certify=False)
    state.status = state.status.masked_fill(state.status == Status.NOT_CONVERGED, Status.BUDGET)
    return state


def _rescued(projection: Projection, state: DenseState, max_steps: int) -> DenseState:
    """Rows that few steps did not bring home, such as near-one-hot ones, tried again with the full Hessian."""
    late = (state.status == Status.NOT_CONVERGED).nonzero().squeeze(-1)
    v, D = projection.log_q.shape[-1], len(projection.scale)
    if not len(late) or v * D**2 > _PATIENT:
        return state
    again = iterate(DualNewton(), projection.take(late), max_steps)
    again.steps += state.steps[late]
    again.passes += state.passes[late]
    better = (again.status == Status.OPTIMAL) | (again.value <= state.value[late])
    for name in (f.name for f in fields(DualState)):
        getattr(state, name)[late[better]] = getattr(again, name)[better]
    return state


def _answer(problem: Problem, projection: Projection, trusted: list[int], state: DualState) -> Answer:
    # A row that came to no end is answered by whichever is proved to be nearer, or seems to be: where f rose, the pool,
    # and where nothing is proved of either, too, if trusts are finite.
    unproved = (state.status == Status.NOT_CONVERGED) & ~state.certified
    vacuous = (state.gap > _VACUOUS) & state.pool_bound.isfinite()
    late = (state.status >= Status.NOT_CONVERGED) & (unproved | (state.pool_bound < state.gap) | vacuous)
    late &= projection.pool_may_answer
    state.gap = torch.where(late, state.pool_bound, state.gap)
    state.certified = state.certified | (late & state.gap.isfinite())
    # The pool itself, to the last bit.
    by_pool = state.by_pool | late
    log_probs = torch.where(by_pool[:, None], problem.log_pool, state.log_p)
    disagreement = kl(log_probs.expand_as(problem.log_p), problem.log_p).T.contiguous()
    is_bound = torch.ones_like(disagreement, dtype=torch.bool)
    own = kl(state.log_r, projection.log_p)
    for k, i in enumerate(trusted):
        if not math.isinf(projection.trust[k]):
            disagreement[:, i] = torch.where(by_pool, disagreement[:, i], own[:, k])
            is_bound[:, i] = by_pool
    share = projection.read / sum([head.d for head in problem.heads])
    return Answer(
        log_probs=log_probs,
        status=state.status,
        gap=state.gap,
        certified=state.certified,
        objective=-state.value,
        objective_range=torch.full_like(state.value, torch.nan)[:, None].repeat(1, 2),
        steps=state.steps,
        passes=state.passes * share,
        disagreement=disagreement,
        disagreement_is_bound=is_bound,
        dual=_raw_dual(problem, projection, trusted, state.nu),
        ray=_raw_dual(problem, projection, trusted, projection.exact_part(state.ray)),
        by_pool=by_pool,
    )


def _raw_dual(
    problem: Problem, projection: Projection, trusted: list[int], nu: Float[Tensor, "B D"]
) -> tuple[Float[Tensor, "B _"], ...]:
    """λ_i = α_i R_i ν_i; zeros for members that dropped out."""
    out = [nu.new_zeros(len(nu), head.d) for head in problem.heads]
    parts = nu.split(projection.widths, dim=-1)
    for i, alpha, head, part in zip(trusted, projection.alpha, projection.heads, parts, strict=True):
        out[i] = alpha * part @ head.whitening.factor.T
    return tuple(out)
