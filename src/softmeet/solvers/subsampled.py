"""Newton's method on the dual of a relaxed I-projection, with a Hessian from some tokens of each row.

A step reads the heads once, for the exact dual value and gradient. Curvature comes from M gathered tokens: the heaviest,
and a systematic sample of the rest, reweighted, with a ridge for what the sample misses (shrinkage of a sample
covariance to a multiple of the identity, in whitened coordinates). The sample is fresh at each step and grows, and
directions remember the exact changes of the gradient (limited-memory BFGS around the gathered Hessian), so that a few
steps suffice. The first step needs no read: the sample stands for the tail's moments too. Sub-sampled Newton: Roosta
and Mahoney, Math. Program. 174, 2019; L-BFGS: Nocedal and Wright, Numerical Optimization, 2006, algorithm 7.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.solvers.base import Status
from softmeet.solvers.dual import DualMethod, DualState, add_reads, start
from softmeet.solvers.gathered import Gathered, gather
from softmeet.solvers.projection import Projection
from softmeet.solvers.surrogate import HeavyTokens, Minimum, Surrogate, minimise
from softmeet.solvers.sweep import Swept, sweep

# Pairs of step and change of the gradient that are kept.
_MEMORY = 4
# Tokens that the preconditioner treats exactly.
_HEAVY = 192
# One in so many of the gathered tokens is drawn from the tail.
_SAMPLED = 4
# The ridge's share of the tail; the sample has the rest.
_SHRINKAGE = 0.3
# M grows by this share of its first size at every step.
_GROWTH = 1 / 3
# Elements of gathered rows to work on at once: 64 MiB in fp32; more on an accelerator.
_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 29}
# The share of a certificate that may come from what is left of an infeasibility.
_SLACK = 0.1
_PATIENCE = 2


def gathered_size(problem: Projection, step: int) -> int:
    """M: enough tokens that a change of their masses can repair the moments of any member.

    More than the widest head, or than all members of infinite trust together, which only p can repair.
    """
    widths = [h.rank for h in problem.heads]
    exact = sum(d for d, rho in zip(widths, problem.trust, strict=True) if math.isinf(rho))
    first = max(1024, 2 * max(widths), 2 * exact)
    return min(int(first * (1 + _GROWTH * step)), problem.log_q.shape[-1] // 2)


@dataclass
class SubsampledState(DualState):
    """``past_steps`` and ``past_changes`` (of the gradient): the memory, newest last, 0 where empty; ``stalls``: steps
    in a row without progress.
    """

    past_steps: Float[Tensor, "B m D"]
    past_changes: Float[Tensor, "B m D"]
    stalls: Int[Tensor, " B"]


class SubsampledNewton(DualMethod[SubsampledState]):
    """See the module's docstring."""

    def init(self, problem: Projection) -> SubsampledState:
        """The pool."""
        fields = start(problem)
        empty = fields["nu"][:, None].repeat(1, _MEMORY, 1)
        stalls = torch.zeros_like(fields["steps"])
        return SubsampledState(**fields, past_steps=empty, past_changes=empty.clone(), stalls=stalls)

    def rows_at_once(self, problem: Projection) -> int:
        """All of them: a step keeps vectors only."""
        return max(1, len(problem.log_q))

    def begin(self, problem: Projection, state: SubsampledState) -> None:
        """A first direction from gathered tokens alone."""
        state.direction, _, _ = _look(problem, state, known=False)

    def measure(self, problem: Projection, state: SubsampledState, direction: Float[Tensor, "B D"] | None) -> Swept:
        """Without second moments."""
        return sweep(problem, state.z, direction)

    def judge(
        self,
        problem: Projection,
        before: SubsampledState,
        after: SubsampledState,
        swept: Swept,
        full: Float[Tensor, "B n v"],
    ) -> None:
        """Look around the new point: a certificate there if it seems near enough, and the next direction."""
        fall = before.value - after.value
        stalled = fall <= 0
        _remember(before, after, stalled)
        after.direction, bound, estimate = _look(problem, after, known=True)
        known = torch.where(before.certified, (before.gap - fall).clamp_min(0), torch.inf)
        rounding = problem.rounding(after.log_p.exp(), after.log_r.exp(), after.z, after.nu)
        certified = torch.minimum(bound + rounding, known)
        after.certified = certified.isfinite()
        after.gap = torch.where(after.certified, certified, estimate + rounding)
        after.stalls = torch.where(stalled, before.stalls + 1, 0)
        reached = after.certified & (after.gap <= problem.tol)
        given_up = (after.stalls >= _PATIENCE) & ~reached
        after.done = reached | given_up
        after.status[given_up] = Status.NOT_CONVERGED


def _remember(before: SubsampledState, after: SubsampledState, stalled: Bool[Tensor, " B"]) -> None:
    """Add the last step to the memory; a row that stalled forgets all."""
    s, y = after.nu - before.nu, after.gradient - before.gradient
    useful = (before.steps > 0) & ((s * y).sum(-1) > 0) & ~stalled
    for name, new in (("past_steps", s), ("past_changes", y)):
        old: Tensor = getattr(before, name)
        added = torch.cat([old[:, 1:], new[:, None]], dim=1)
        kept = torch.where(useful[:, None, None], added, old)
        setattr(after, name, torch.where(stalled[:, None, None], 0.0, kept))


def _look(
    problem: Projection, state: SubsampledState, *, known: bool
) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"], Float[Tensor, " B"]]:
    """(direction, bound on the gap or inf, estimate of the gap) of every row, a few rows at a time."""
    step = int(state.steps.max())
    size = gathered_size(problem, step)
    elements = size * sum(h.head.d for h in problem.heads)
    chunk = max(1, _ELEMENTS.get(problem.log_q.device.type, _ELEMENTS["cpu"]) // elements)
    found = []
    for rows in torch.arange(len(state.nu), device=state.nu.device).split(chunk):
        some = problem.take(rows)
        found.append(_Look(some, state.take(rows), size, step, known).answer)
        add_reads(problem, some, rows)
    direction, bound, estimate = (torch.cat(parts) for parts in zip(*found, strict=True))
    return direction, bound, estimate


class _Look:
    """What gathered tokens say of some rows; ``known`` says that the gradient is.

    ``answer`` is (direction, bound on the gap or inf, estimate of the gap).
    """

    def __init__(self, problem: Projection, state: SubsampledState, size: int, step: int, known: bool) -> None:
        self.problem, self.state = problem, state
        sampled = size // _SAMPLED
        offset = (0.5 + 0.618 * step) % 1
        self.gathered = gather(problem, state.log_p, state.log_r, size - sampled, sampled, offset)
        tokens = self.gathered.tokens
        self.log_u = state.log_p.gather(-1, tokens)
        self.log_w = state.log_r.gather(-1, tokens[:, None].expand(-1, len(problem.trust), -1))
        self.model = self._reweighted()
        zero = torch.zeros_like(state.nu)
        self.heavy = HeavyTokens(self.model, *self.model.masses(torch.zeros_like(self.log_w)), _HEAVY)
        bound = torch.full_like(state.value, torch.inf)
        if not known:
            found = minimise(self.model, self.heavy, zero, steps=4, reduction=0.1, limit=20, enough=_never)
            self.answer = found.s, bound, -found.value
            return
        recalled, weights = _first_loop(state)
        model = self.model.matched(recalled)
        found = minimise(model, self.heavy, zero, steps=1, reduction=0.1, limit=30, enough=_never)
        direction = -_second_loop(state, -found.s, weights)
        estimate = -0.5 * (state.gradient * direction).sum(-1)
        if bool((estimate <= problem.tol).any()):
            bound = self._certify(direction)
        self.answer = direction, bound, estimate

    def _reweighted(self) -> Surrogate:
        """The sample weighted to stand for the tail, but for the share that the ridge has."""
        gathered, problem = self.gathered, self.problem
        sampled = torch.arange(gathered.tokens.shape[1], device=self.log_u.device) >= gathered.heavy
        log_weight = gathered.log_weight + torch.where(sampled, math.log(1 - _SHRINKAGE), 0.0)
        log_u, log_w = self.log_u + log_weight, self.log_w + log_weight[:, None]
        none = self.log_w.new_zeros(len(log_u), len(problem.trust))
        model = self._surrogate(log_u, log_w, none)
        tail = model.curvature(log_u.exp() * sampled, log_w.exp() * sampled)
        return self._surrogate(log_u, log_w, tail * (_SHRINKAGE / (1 - _SHRINKAGE)))

    def _surrogate(
        self, log_u: Float[Tensor, "b M"], log_w: Float[Tensor, "b n M"], ridge: Float[Tensor, "b n"]
    ) -> Surrogate:
        problem, nothing = self.problem, torch.zeros_like(self.state.nu)
        return Surrogate(self.gathered, log_u, log_w, nothing, ridge, problem.alpha, problem.gamma, problem.trust)

    def _certify(self, start: Float[Tensor, "b D"]) -> Float[Tensor, " b"]:
        """The gap by a feasible point that differs from (p, r) on the gathered tokens only, each counted once."""
        ordered, where = self.gathered.tokens.sort(-1)
        repeated = torch.zeros_like(ordered, dtype=torch.bool)
        repeated.scatter_(-1, where[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        log_u = self.log_u.masked_fill(repeated, -torch.inf)
        log_w = self.log_w.masked_fill(repeated[:, None], -torch.inf)
        model = self._surrogate(log_u, log_w, torch.zeros_like(self.model.ridge)).matched(self.state.gradient)

        def slack(m: Minimum) -> Float[Tensor, " b"]:
            return 4 * m.gradient.norm(dim=-1) * m.s.norm(dim=-1)

        def close(m: Minimum) -> Bool[Tensor, " b"]:
            return slack(m) <= _SLACK * (-m.value).clamp_min(0.1 * self.problem.tol)

        best = minimise(model, self.heavy, start, steps=6, reduction=0.03, limit=60, enough=close)
        return torch.where(close(best), -best.value + slack(best), torch.inf)


def _never(m: Minimum) -> Bool[Tensor, " b"]:
    return torch.zeros_like(m.value, dtype=torch.bool)


def _first_loop(state: SubsampledState) -> tuple[Float[Tensor, "b D"], list[Float[Tensor, " b"]]]:
    """The gradient with the remembered changes taken out, and their weights, newest first."""
    g, weights = state.gradient, []
    for j in reversed(range(_MEMORY)):
        s, y = state.past_steps[:, j], state.past_changes[:, j]
        weights.append((s * g).sum(-1) * _inverse((s * y).sum(-1)))
        g = g - weights[-1][:, None] * y
    return g, weights


def _second_loop(
    state: SubsampledState, x: Float[Tensor, "b D"], weights: list[Float[Tensor, " b"]]
) -> Float[Tensor, "b D"]:
    """The remembered steps put back into the model's answer ``x``."""
    for j, weight in zip(range(_MEMORY), reversed(weights), strict=True):
        s, y = state.past_steps[:, j], state.past_changes[:, j]
        x = x + (weight - (y * x).sum(-1) * _inverse((s * y).sum(-1)))[:, None] * s
    return x


def _inverse(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    return torch.where(x > 0, 1 / x, 0.0)
