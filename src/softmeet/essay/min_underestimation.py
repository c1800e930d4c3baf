"""The rule ``min-underestimation``: the least factor by which some member underestimates a token."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.essay.base import Bounds, Choice, ExactRule
from softmeet.essay.feasible_set import FeasibleSet
from softmeet.essay.interior import Program, interior_point
from softmeet.essay.matrices import stacked
from softmeet.essay.points import can_move, columns_of, interior_masses, with_what_is_left
from softmeet.solvers.clock import time_is_over

# A mass this close to one of its bounds, relative to their distance, is at it.
_AT_BOUND = 1e-5
_FACE_MOMENTS = 1e-9
# Tokens whose min_i p̂_ij is lower than the largest by this many nats get no mass: their bounds would underflow.
_LIGHTEST = 600.0
# Sums of masses that differ by less than this share are the same.
_SAME = 1e-9
# The most guesses of the set of masses that are at no bound.
_GUESSES = 8


class MinUnderestimation(ExactRule):
    """The rule that minimises log t over p in the feasible set C with p_j ≤ t·min_i p̂_ij for every token j.

    So no member underestimates a token's probability by more than log t nats, which is the objective. With m_j = min_i
    p̂_ij and x = p / t it is a linear program: maximise Σx over 0 ≤ x ≤ m with Σ x_j (g_j - g) = 0, g_j being token j's
    moments and g the members'. Its dual is 1/t = min_λ Σ_j m_j [1 + λᵀ(g_j - g)]₊, so every λ bounds t from below. All
    p_j except at most D are 0 or t·m_j, so the optimum is unique except in special cases; in those the I-projection of
    the pool onto the optima is taken.
    """

    name = "min-underestimation"
    summary = "the least t with p ≤ t·min_i p̂_i: members underestimate no token by more than log t; can give zeros"
    can_assign_zeros = True
    exactness = 1e-2  # only whether there is one

    def choose(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Choice:
        """Choose p by an interior-point method for the linear program 0 ≤ x ≤ m in the class's docstring.

        Tokens whose min_i p̂_ij is below the largest of these by more than 600 nats get no mass. If several p are
        optimal, the I-projection of the pool onto them is the choice. If at most one distribution has the moments
        (``row.unique``) and ``member``, a distribution in C, (v,), is not None, ``member`` is that one, and the choice.
        ``steps`` of the choice are interior-point steps, at most the setting ``max_steps`` for each program. Once the
        time is over, the point that the interior-point method reached is the choice.
        """
        floor = row.log_p.amin(0)
        likely = row.alive & (floor > floor[row.alive].max() - _LIGHTEST)
        upper = (floor - floor[likely].logsumexp(-1))[likely].exp().clamp_min(torch.finfo(floor.dtype).tiny)
        # The last variable is Σx, bounded by Σ upper = 1.
        limits, target = torch.cat([upper, upper.new_full((1,), 1.5)]), row.system[1]
        cost, nothing = torch.zeros_like(limits), torch.zeros_like(target)
        cost[-1] = -1.0
        columns = stacked(columns_of(row, likely), -target[None])
        program = Program(columns, nothing, cost, nothing, limits / 2, len(nothing) - 1, upper=limits)
        found = interior_point(program, row.problem.settings.max_steps)
        x, upper = (torch.zeros_like(floor).masked_scatter(likely, own) for own in (found.x[:-1], upper))
        size = float(target @ found.y)
        y = row.joint @ found.y / size if size else torch.zeros_like(row.target)
        if time_is_over():
            return Choice(x / x.sum(), y, found.steps)
        vertex = _basic(row, x, upper)
        # By how much Σx may exceed the optimum because its moments are not exact.
        excess = float(found.y.norm()) * found.residual + _SAME * float(x.sum())
        x = vertex if float(vertex.sum()) >= float(x.sum()) - excess else x
        steps, p = found.steps, x / x.sum() if member is None or not row.unique else member
        limit = upper / x.sum()
        between = row.alive & (x / x.sum() > _AT_BOUND * limit) & (p < (1 - _AT_BOUND) * limit)
        if can_move(row.system[0], between):
            p, more = _nearest_to_pool(row, p, limit, between)
            steps += more
        return Choice(p, y, steps)

    def reached(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> float:
        """Return the objective where the moments of ``p``, (v,), are repaired; what is left may be missing anywhere."""
        repaired, left = with_what_is_left(row, p)
        return float(((repaired + left).log() - row.log_p.amin(0))[row.alive].max())

    def bounds(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Bound log t over C from below, by multipliers ``y``: -log Σ_j m_j [1 + yᵀ(g_j - g)]₊ in nats, or 0 if larger.

        m_j = min_i p̂_ij, and g_j and g are the moments of token j and of the members. The objective log t at ``p`` is
        max_j log(p_j / m_j), over the tokens that may have mass, as all sums are. No bound from above is given:
        ``most`` is inf.
        """
        floor = row.log_p.amin(0)[row.alive]
        value = float((p[row.alive].log() - floor).max())
        scores = row.scores(y)[row.alive]
        least = -float((floor + (1 + scores).clamp_min(0).log()).logsumexp(-1))
        return Bounds(value, max(least, 0.0))


def _basic(row: FeasibleSet, x: Float[Tensor, " v"], upper: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
    """Return a vertex near ``x``: all masses but as many as there are moments are exactly 0 or ``upper``.

    It has the moments of ``x``, and may have a smaller sum. ``x`` is returned if none is found.
    """
    columns, target = row.system
    inside = torch.where(upper > 0, torch.minimum(x, upper - x) / upper, 0.0)
    order = inside.argsort(descending=True)
    free, rest = order.tensor_split([min(len(target) - 1, int((upper > 0).sum()))])
    at = torch.where(x > upper / 2, upper, 0.0)
    for _ in range(_GUESSES):
        found = at.index_fill(0, free, 0.0)
        if not found.any():
            break  # without a mass that is fixed the moments say nothing about the sum
        G = (columns.rows(free) - target)[:, :-1]
        missing = (found.sum() * target - columns.sums(found))[:-1]
        masses = torch.linalg.lstsq(G.T, missing[:, None], driver="gelsd").solution.squeeze(-1)
        if (masses @ G - missing).norm() > _FACE_MOMENTS:
            break
        rounding = _FACE_MOMENTS * upper[free]
        outside = (masses < -rounding) | (masses > upper[free] + rounding)
        if not outside.any():
            return found.index_copy(0, free, masses.clamp(torch.zeros_like(masses), upper[free]))
        # Those masses are at a bound after all; the next candidates take their places.
        at = at.index_copy(0, free[outside], torch.where(masses > 0, upper[free], 0.0)[outside])
        new, rest = rest.tensor_split([int(outside.sum())])
        free = torch.cat([free[~outside], new])
    return x


def _nearest_to_pool(
    row: FeasibleSet, p: Float[Tensor, " v"], limit: Float[Tensor, " v"], between: Bool[Tensor, " v"]
) -> tuple[Float[Tensor, " v"], int]:
    """Replace the masses at neither bound by the I-projection of the pool, with the same moments and within the bounds.

    Args:
        row: the row's feasible set.
        p: an optimum.
        limit: the upper bound of each mass.
        between: the tokens whose masses are at no bound.

    Returns:
        (the distribution, the number of steps).
    """
    target = row.system[0].sums(torch.where(between, p, 0.0))
    pool = row.log_q.exp()[between].clamp_min(torch.finfo(p.dtype).tiny)
    x, found = interior_masses(row, between, target, p[between], upper=limit[between], reference=pool)
    if found.residual > _FACE_MOMENTS:
        return p, found.steps
    moved = torch.where(between, x, p)
    return moved / moved.sum(), found.steps
