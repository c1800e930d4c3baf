"""What gathered tokens say around a dual point: the next direction, and a bound on the gap.

Curvature comes from M tokens: the heaviest, and a systematic sample of the rest, reweighted, with a ridge for what the
sample misses (shrinkage of a sample covariance to a multiple of the identity, in whitened coordinates). The sample is
fresh at each step and grows. At the pool, before any read of the heads, it stands for the tail's moments too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.solvers.certificate import restricted_gap_bound
from softmeet.solvers.conjugate import Linear
from softmeet.solvers.dual import DualState
from softmeet.solvers.gathered import gather, gathered_size
from softmeet.solvers.inner import Hessian, minimise
from softmeet.solvers.memory import Memory
from softmeet.solvers.preconditioner import AllTokens, HeavyTokens
from softmeet.solvers.projection import Projection
from softmeet.solvers.surrogate import Point, Surrogate

# Tokens that the preconditioner treats exactly.
_HEAVY = 96
# Tokens that outweigh the others too far for their curvature to be added up in one matrix of single precision.
_EXACT = 32
# Tokens that a certificate may change, in widths of the widest head: fewer make it loose.
_REPAIR, _LEAST_REPAIR = 2, 1024
# One in so many of the gathered tokens is drawn from the tail.
_SAMPLED = 4
# Steps on a model of f before a head is read and after: at most, and the share to which a step's fall must be
# foretold to be the last. Peaked rows need many, flat ones one.
_FIRST_STEPS, _STEPS, _FORETOLD = 3, 12, 0.1
# To what share of the gradient a direction is solved for, before and after; conjugate gradients at most.
_FIRST_REDUCTION, _REDUCTION, _LIMIT = 0.3, 0.2, 30
# The ridge's share of the tail; the sample has the rest.
_SHRINKAGE = 0.3
# A bound is rarely less than so many times the gap: no use to look for one sooner.
_LOOSE = 3.0
# Preconditioners that a certificate may need.
_PRECONDITIONERS = 3
# The share of a certificate, or of what it is wanted for, that may come from what is left of an infeasibility.
_SLACK = 0.05


@dataclass(frozen=True, eq=False)
class Found:
    """``direction`` of the next step; ``bound`` on the gap, inf where none was found; ``estimate`` of it."""

    direction: Float[Tensor, "b D"]
    bound: Float[Tensor, " b"]
    estimate: Float[Tensor, " b"]

    @classmethod
    def empty(cls, like: Float[Tensor, "b D"]) -> Found:
        """To be filled by :meth:`put`."""
        return cls(torch.zeros_like(like), torch.full_like(like[:, 0], torch.inf), torch.zeros_like(like[:, 0]))

    def put(self, rows: Int[Tensor, " k"], other: Found) -> None:
        """Write some rows."""
        self.direction[rows], self.bound[rows], self.estimate[rows] = other.direction, other.bound, other.estimate


def look(
    problem: Projection,
    state: DualState,
    memory: Memory,
    step: int,
    goal: Float[Tensor, " b"] | None,
    certify: bool = True,
) -> Found:
    """Look around some rows, by gathered tokens alone.

    Args:
        problem, state, memory: of these rows.
        step: how many steps they have taken; later ones gather more tokens, and others.
        goal: the bound at which a row is done; None where no gradient is known yet.
        certify: look for bounds; else only for directions.
    """
    around = _Around(problem, state, step, certify)
    return around.first() if goal is None else around.next(memory, goal)


def heavy_tokens(problem: Projection, state: DualState) -> HeavyTokens:
    """An approximate inverse of the Hessian at the state's point, in the heads' own coordinates."""
    return _Around(problem, state, 1, certify=False).heavy


def _near(estimate: Float[Tensor, " b"], goal: Float[Tensor, " b"]) -> Bool[Tensor, " b"]:
    return (_LOOSE * estimate <= goal) & (estimate >= 0)


def _bound(start: Point, goal: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """-min F for a surrogate whose minimiser is a feasible point, or inf if the inner solve does not come near it.

    What is left of the gradient, e, hides ½ eᵀH⁻¹e to second order. The preconditioner never exceeds H where it was
    made, and H has shrunk since by no more than the masses have; twice as much again is added. Where light tokens have
    lost most of theirs, it is made again.
    """
    here, bound = start, torch.full_like(goal, torch.inf)
    for _ in range(_PRECONDITIONERS):
        here, found, going = _bound_from(here, goal)
        bound = torch.minimum(bound, found)
        if not (going & bound.isinf()).any():
            break
    return bound


def _bound_from(start: Point, goal: Float[Tensor, " b"]) -> tuple[Point, Float[Tensor, " b"], Bool[Tensor, " b"]]:
    """(the point reached, the bound there or inf, whether more may come of it)."""
    model = start.surrogate
    precondition = AllTokens(start, _EXACT)

    def slack(m: Point) -> Float[Tensor, " b"]:
        left = (m.gradient * precondition(m.gradient)).sum(-1)
        return torch.where((left > 0) | (m.gradient == 0).all(-1), left / model.shrinkage(start, m), torch.inf)

    def enough(m: Point) -> Float[Tensor, " b"]:
        return _SLACK * torch.maximum(-m.value, goal)

    def close(m: Point) -> Bool[Tensor, " b"]:
        return (slack(m) <= enough(m)) | (-m.value > goal)

    def newton(m: Point) -> Float[Tensor, "b D"]:
        return Hessian(m).solve(m.gradient, precondition, 0.05, 31)

    best = minimise(start, newton, steps=6, enough=close)
    left = slack(best)
    found = left <= enough(best)
    # Where masses span many orders rounding may spoil the preconditioner, and what is left be more than it says: it is
    # decided against the tolerance, and no bound claims to know more.
    bound = torch.maximum(left, _SLACK * goal) - best.value
    return best, torch.where(found, bound, torch.inf), ~found & (-best.value <= goal)


class _Around:
    """Some rows and their gathered tokens."""

    def __init__(self, problem: Projection, state: DualState, step: int, certify: bool) -> None:
        self.problem, self.state, self.known, self.certify = problem, state, step > 0, certify
        self.prices = tuple(problem.alpha.tolist()), tuple(problem.gamma.tolist()), problem.trust
        size = gathered_size(problem, step)
        sampled = size // _SAMPLED
        self.gathered = gather(problem, state.log_p, state.log_r, size - sampled, sampled, (0.5 + 0.618 * step) % 1)
        tokens = self.gathered.tokens
        self.log_u = state.log_p.gather(-1, tokens)
        self.log_w = state.log_r.gather(-1, tokens[:, None].expand(-1, len(problem.trust), -1))
        self.origin = self._reweighted().origin()
        self.heavy = HeavyTokens(self.origin, _HEAVY)

    def first(self) -> Found:
        """From the pool: the sample stands for the tail's moments."""

        def newton(m: Point) -> Float[Tensor, "b _"]:
            return Hessian(m).solve(m.gradient, self.heavy, _FIRST_REDUCTION, _LIMIT)

        found = minimise(self.origin, newton, steps=_FIRST_STEPS)
        return Found(self.problem.whitened(found.s), torch.full_like(found.value, torch.inf), -found.value)

    def next(self, memory: Memory, goal: Float[Tensor, " b"]) -> Found:
        """A bound for rows that seem near enough, and a direction for those that it does not end."""
        problem, gradient = self.problem, self.state.gradient
        own = problem.unwhitened(gradient)
        rough = 0.5 * (own * self.heavy(own)).sum(-1)
        bound = self._bound_where(_near(rough, goal), goal)
        if bool((bound <= goal).all()):
            return Found(torch.zeros_like(gradient), bound, rough)
        start = self.origin.matched(own)

        def newton(m: Point) -> Float[Tensor, "b _"]:
            hessian = Hessian(m)

            def solved(g: Float[Tensor, "b _"]) -> Float[Tensor, "b _"]:
                return hessian.solve(g, self.heavy, _REDUCTION, _LIMIT)

            return solved(m.gradient) if m is not start or memory.empty else self._corrected(memory, solved)

        found = minimise(start, newton, steps=_STEPS, foretold=_FORETOLD)
        direction, estimate = problem.whitened(found.s), -found.value
        # Heavy tokens alone miss most of the curvature of some rows.
        late = _near(estimate, goal) & ~_near(rough, goal)
        return Found(direction, torch.minimum(bound, self._bound_where(late, goal)), estimate)

    def _corrected(self, memory: Memory, solved: Linear) -> Float[Tensor, "b _"]:
        """The Newton direction at the state's point with what exact changes of the gradient say of the Hessian."""
        recalled, weights = memory.before(self.state.gradient)
        s = solved(self.problem.unwhitened(recalled))
        return self.problem.raw(memory.after(self.problem.whitened(s), weights))

    def _bound_where(self, rows: Bool[Tensor, " b"], goal: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        none = torch.full_like(goal, torch.inf)
        return torch.where(rows, self._certified(goal), none) if self.certify and bool(rows.any()) else none

    def _reweighted(self) -> Surrogate:
        """The sample stands for the tail; its masses count in full where its moments are needed, before any read."""
        sampled = torch.arange(self.gathered.tokens.shape[1], device=self.log_u.device) >= self.gathered.heavy
        share = 1 - _SHRINKAGE if self.known else 1.0
        log_weight = self.gathered.log_weight + torch.where(sampled, math.log(share), 0.0)
        log_u, log_w = self.log_u + log_weight, self.log_w + log_weight[:, None]
        model = self._surrogate(log_u, log_w, None)
        tail = model.curvature(log_u.exp() * sampled, log_w.exp() * sampled)
        return self._surrogate(log_u, log_w, tail * (_SHRINKAGE / share))

    def _surrogate(
        self, log_u: Float[Tensor, "b M"], log_w: Float[Tensor, "b n M"], ridge: Float[Tensor, "b n"] | None
    ) -> Surrogate:
        nothing = log_u.new_zeros(len(log_u), sum(self.gathered.widths))
        return Surrogate(self.gathered, log_u, log_w, nothing, ridge, *self.prices)

    def _certified(self, goal: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The gap by a feasible point that differs from (p, r) on the heaviest tokens only."""
        problem, gradient = self.problem, self.state.gradient
        if any(math.isinf(rho) for rho in problem.trust):
            p, r = self.state.log_p.exp(), self.state.log_r.exp()
            found = [restricted_gap_bound(problem, k, p[k], r[k], gradient[k]) for k in range(len(p))]
            return gradient.new_tensor(found)
        k = min(self.gathered.heavy, max(_LEAST_REPAIR, _REPAIR * max(h.rank for h in problem.heads)))
        own = self.problem.unwhitened(gradient)
        log_u, log_w = self.log_u[:, :k], self.log_w[..., :k]
        model = Surrogate(self.gathered.heaviest(k), log_u, log_w, torch.zeros_like(own), None, *self.prices)
        return _bound(model.origin().matched(own), goal)
