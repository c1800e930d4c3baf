"""A primal-dual interior-point method with Mehrotra's predictor and corrector, for separable convex programs.

    minimise  Σ_j φ_j(x_j) + ½ |E^{-½} s|²   over x, s with  Gᵀx - s = g,  0 ≤ x ≤ u,  s = 0 where E = 0

φ is linear, or linear plus an entropy; E is diagonal. The optimality conditions, with multipliers y of the moments, z
of x ≥ 0 and w of x ≤ u, are

    φ'(x) - G y - z + w = 0,   Gᵀx + E y = g,   x z = c,   (u - x) w = 0

with c = 0. Other c ≥ 0 are allowed: they are weights of a logarithmic barrier, and let the same method solve empirical
likelihood, whose conditions are exactly x z = c with φ = 0. Each step factors Gᵀ Θ G + E, Θ diagonal, once, and solves
with it twice, then again for corrections that even out the products x z. One row is solved at a time, as each has a
working set, and so matrices, of its own.

Mehrotra, *On the implementation of a primal-dual interior point method*, SIAM J. Optim. 2, 1992. Gondzio, *Multiple
centrality corrections in a primal-dual method for linear programming*, Comput. Optim. Appl. 6, 1996. Wright,
*Primal-dual interior-point methods*, 1997, chapter 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.essay.matrices import MomentMatrix
from softmeet.solvers.clock import time_is_over
from softmeet.solvers.linalg import Factored

# The share of the way to the boundary that a step may go; with a barrier, which keeps x inside, much less is enough.
_DAMPING, _INSIDE = 0.9995, 0.9
# Round-off: tolerances relative to the size of the moments and of the costs.
_FEASIBLE = 1e-12
_COMPLEMENTARY = 1e-11
_STALLED, _PROGRESS = 12, 0.98
# The most corrections of a step's moments.
_REFINED = 2
# Steps shorter than this are tried again towards the centre.
_SHORT = 0.1
# The most centrality corrections of a step; by how much each aims to lengthen it; the share of that which it must reach
# to be kept; products within this factor of their aim are left alone.
_CORRECTIONS, _LONGER, _WORTH, _CLOSE = 3, 0.3, 0.1, 0.1
# The most steps without progress once complementarity is this small: rounding may keep moments from their goal.
_ENOUGH, _NEARLY = 3, 1e-8


@dataclass(frozen=True, eq=False)
class Program:
    """A separable convex program in N variables: minimise Σ_j φ_j(x_j) + ½ |E^{-½}(Gᵀx - g)|² over 0 ≤ x ≤ u.

    φ_j(x) = cost_j x, plus x log(x / q_j) - x if there is a ``reference`` q. E is diagonal. A constraint k with E_kk =
    0 is hard, (Gᵀx)_k = g_k, and has no term in the sum. All tensors are fp64.

    Args:
        columns: G, (N, m), from :func:`~softmeet.essay.matrices.dense_matrix` or ``token_matrix``, for example.
        target: g, (m,).
        cost: the linear part of φ, (N,).
        softness: the diagonal of E, (m,); 0 for a hard constraint.
        start: x to begin from, (N,), positive and below ``upper``; it need not satisfy Gᵀx = g.
        unit: the index k of a constraint whose column of G is 1 for every variable: its multiplier is set so that the
            multipliers z of x ≥ 0 are positive at the start. Not used if there are upper bounds and no barrier.
        upper: u, (N,), positive; None if x is bounded by 0 ≤ x alone.
        barrier: the weights c of a logarithmic barrier -Σ c_j log x_j, which is added to the objective, (N,), or None
            for 0.
        reference: q, (N,), positive; None for a linear φ.
    """

    columns: MomentMatrix
    target: Float[Tensor, " m"]
    cost: Float[Tensor, " N"]
    softness: Float[Tensor, " m"]
    start: Float[Tensor, " N"]
    unit: int
    upper: Float[Tensor, " N"] | None = None
    barrier: Float[Tensor, " N"] | None = None
    reference: Float[Tensor, " N"] | None = None

    def slope(self, x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return φ_j'(x_j), (N,), at ``x``, (N,), positive: ``cost``, plus log(x / q) if there is a ``reference`` q."""
        return self.cost if self.reference is None else self.cost + (x / self.reference).log()

    def curvature(self, x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return φ_j''(x_j) for every variable j, (N,): 1 / x_j if there is a ``reference``, else 0."""
        return torch.zeros_like(x) if self.reference is None else 1 / x


@dataclass(frozen=True, eq=False)
class Interior:
    """The best point that :func:`interior_point` found for a :class:`Program`.

    Attributes:
        x: the variables, positive, (N,).
        y: the multipliers of Gᵀx = g, (m,), with the sign of φ'(x) - G y - z + w = 0.
        steps: the number of steps after which the method was at this point; 0 for the start. Later steps, after which
            no better point was found, are not counted.
        residual: |Gᵀx + E y - g|, the Euclidean error of the constraints.
        complementarity: Σ |x z - c| + Σ (u - x) w, which is 0 at the optimum; z ≥ 0 and w ≥ 0 are the multipliers of
            x ≥ 0 and x ≤ u, c the barrier's weights.
    """

    x: Float[Tensor, " N"]
    y: Float[Tensor, " m"]
    steps: int
    residual: float
    complementarity: float

    @property
    def merit(self) -> float:
        """The sum of ``residual`` and ``complementarity``: the smaller the better, 0 at an exact optimum."""
        return self.residual + self.complementarity


def interior_point(program: Program, max_steps: int = 100) -> Interior:
    """Minimise a program by Mehrotra's interior-point method; return the point with the least :attr:`Interior.merit`.

    The points compared are ``program.start``, with the multipliers that the method begins with, and the point after
    each step. The method stops once the optimality conditions hold to round-off, it makes no more progress, a linear
    system cannot be solved, ``max_steps`` steps are taken, or the time is over (:func:`softmeet.time_is_over`).
    Nothing is raised then, and nothing is proved about the point: callers bound its gap from x and y.
    """
    method = _Method(program)
    best = method.report(0)
    residual, complementarity, stalled = best.residual, best.complementarity, 0
    for step in range(1, max_steps + 1):
        late = stalled >= _ENOUGH and method.complementary(_NEARLY)
        if time_is_over() or method.finished() or late or stalled == _STALLED or not method.advance():
            break
        found = method.report(step)
        # Complementarity may rise by orders of magnitude while the moments improve; its progress counts from there.
        nearer = found.residual > _FEASIBLE * method.scale and found.residual < _PROGRESS * residual
        too_large = complementarity > _COMPLEMENTARY * method.cost_scale
        better = nearer or (too_large and found.complementarity < _PROGRESS * complementarity)
        stalled = 0 if better else stalled + 1
        residual = min(residual, found.residual)
        complementarity = found.complementarity if nearer else min(complementarity, found.complementarity)
        best = found if found.merit < best.merit else best
    return best


class _Method:
    """The state of the method for one program: the current x, y, z, w and the residual of the constraints.

    The module docstring has the meaning of the letters; w is None without upper bounds. ``advance`` changes the state.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.G = program, program.columns
        self.x = program.start.clone()
        c = torch.zeros_like(self.x) if program.barrier is None else program.barrier
        self.c = c
        # Soft constraints start with the multipliers that their excess implies, and that of the sum makes every reduced
        # cost positive: the start is dual feasible, and of the right size.
        soft = program.softness > 0
        excess = self.G.sums(self.x) - program.target
        self.y = torch.where(soft, -excess / program.softness.clamp_min(torch.finfo(excess.dtype).tiny), 0.0)
        slope = program.slope(self.x) - self.G.times(self.y)
        spread = (slope - slope.min()).mean().clamp_min(1e-3)
        if program.barrier is not None:
            self.z = c / self.x
            self.y[program.unit] = -1.0
        elif program.upper is None:
            self.y[program.unit] = slope.min() - spread
            self.z = slope - self.y[program.unit]
        else:
            self.z = slope.clamp_min(0) + spread
        self.w = None if program.upper is None else (-slope).clamp_min(0) + spread
        self.scale = 1 + float(program.target.norm())
        self.cost_scale = 1 + float((self.x * slope.abs()).sum())
        self.residual = self._residual()

    @property
    def slack(self) -> Tensor:
        """The distance u - x to the upper bounds, (N,), positive; only for a program that has them."""
        assert self.program.upper is not None
        return self.program.upper - self.x

    def _residual(self) -> Float[Tensor, " m"]:
        """Return g - Gᵀx - E y, (m,), at the current point: 0 if the constraints hold."""
        return self.program.target - self.G.sums(self.x) - self.program.softness * self.y

    def report(self, steps: int) -> Interior:
        """Return the current point as an :class:`Interior`, with ``steps`` as its number of steps."""
        total = (self.x * self.z - self.c).abs().sum()
        if self.w is not None:
            total = total + (self.slack * self.w).sum()
        return Interior(self.x, self.y, steps, float(self.residual.norm()), float(total))

    def complementary(self, relative: float) -> bool:
        """Return whether the complementarity is at most ``relative`` times the size of the costs at the start."""
        return self.report(0).complementarity <= relative * self.cost_scale

    def finished(self) -> bool:
        """Return whether complementarity and residual are no more than rounding, relative to costs and moments."""
        return self.complementary(_COMPLEMENTARY) and self.report(0).residual <= _FEASIBLE * self.scale

    def advance(self) -> bool:
        """Take one predictor and corrector step, in place; return True.

        If the system's matrix cannot be factored, or the step is not finite, return False and change nothing.
        """
        program, x, z = self.program, self.x, self.z
        theta = program.curvature(x) + z / x
        if self.w is not None:
            theta = theta + self.w / self.slack
        theta = 1 / theta
        dual = program.slope(x) - self.G.times(self.y) - z
        dual = dual if self.w is None else dual + self.w
        M = self.G.gram(theta)
        M.diagonal().add_(program.softness)
        solve = Factored.of(M)
        if solve is None:
            return False
        mu = self._mean_complementarity()
        affine = self._direction(solve, theta, dual, 0.0, None)
        reach = self._longest(affine)
        after = self._mean_complementarity(affine, reach)
        sigma = min(1.0, (after / mu) ** 3) if mu > 0 else 0.0
        second = self._second_order(affine, 1.0)
        step = self._direction(solve, theta, dual, sigma * mu, second)
        if not _finite(step):
            return False
        step, length = self._more_central(solve, theta, dual, sigma * mu, second, step)
        if min(length) < _SHORT:
            # If the predictor can be followed only a little, only a part of its second-order change is corrected.
            second = self._second_order(affine, min(1.0, reach[0] * reach[1]))
            careful = self._direction(solve, theta, dual, sigma * mu, second)
            careful, further = self._more_central(solve, theta, dual, sigma * mu, second, careful)
            if min(further) > min(length):
                step, length = careful, further
        if min(length) < _SHORT:
            # Very unequal products x z make steps short: this step only evens them out.
            centred = self._direction(solve, theta, dual, mu, None)
            if min(self._longest(centred)) > min(length):
                step, length = centred, self._longest(centred)
        step = self._refined(solve, theta, step)
        self._move(step, self._longest(step))
        return True

    def _second_order(self, step: _Step, share: float) -> _Products:
        """Return ``share`` times the second-order change of the products x z and (u - x) w along ``step``, negated."""
        dx, _, dz, dw = step
        return -share * dx * dz, None if dw is None else share * dx * dw

    def _refined(self, solve: Factored, theta: Tensor, step: _Step) -> _Step:
        """Correct ``step`` by the error of its constraints, which rounding leaves in sums over masses of all sizes."""
        dx, dy, dz, dw = step
        for _ in range(_REFINED):
            left = self.residual - self.G.sums(dx) - self.program.softness * dy
            if float(left.norm()) <= _FEASIBLE * self.scale:
                break
            more = solve(left)
            along = self.G.times(more)
            change = theta * along
            dx, dy = dx + change, dy + more
            lower, upper = -self.z * change / self.x, None if self.w is None else self.w * change / self.slack
            dz, dw = self._dual_part(lower, upper, self.program.curvature(self.x) * change - along, (dz, dw))
        return dx, dy, dz, dw

    def _direction(
        self, solve: Factored, theta: Tensor, dual: Tensor, mu: float, correction: _Products | None
    ) -> _Step:
        """Return Newton's step towards x z = c + mu and (u - x) w = mu, with ``correction`` added to both products."""
        x, z, w = self.x, self.z, self.w
        lower = self.c + mu - x * z
        if correction is not None:
            lower = lower + correction[0]
        h = -dual + lower / x
        upper = None
        if w is not None:
            upper = mu - self.slack * w
            if correction is not None and correction[1] is not None:
                upper = upper + correction[1]
            h = h - upper / self.slack
        dy = solve(self.residual - self.G.sums(theta * h))
        along = self.G.times(dy)
        dx = theta * (along + h)
        dz = (lower - z * dx) / x
        dw = None if w is None or upper is None else (upper + w * dx) / self.slack
        dz, dw = self._dual_part(dz, dw, dual + self.program.curvature(x) * dx - along)
        return dx, dy, dz, dw

    def _dual_part(
        self, dz: Tensor, dw: Tensor | None, change: Tensor, so_far: tuple[Tensor, Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (dz, dw), added to ``so_far``, from the products' equations or from dz - dw = ``change``.

        The second is used where x, or u - x, is nearly zero: division by it would amplify the rounding of dx.
        """
        x, z, w, curvature = self.x, self.z, self.w, self.program.curvature(self.x)
        dz = torch.where(z > x * (1 + curvature), change if dw is None else change + dw, dz)
        if dw is not None and w is not None:
            dw = torch.where(w > self.slack * (1 + curvature), dz - change, dw)
        if so_far is None:
            return dz, dw
        return so_far[0] + dz, None if dw is None or so_far[1] is None else so_far[1] + dw

    def _more_central(
        self, solve: Factored, theta: Tensor, dual: Tensor, mu: float, correction: _Products, step: _Step
    ) -> tuple[_Step, tuple[float, float]]:
        """Bend ``step`` towards products near ``mu`` as long as that makes it longer; return (step, its lengths)."""
        length = self._longest(step)
        for _ in range(_CORRECTIONS):
            primal, dual_length = (min(1.0, t + _LONGER) for t in length)
            dx, _, dz, dw = step
            lower = _towards(mu, (self.x + primal * dx) * (self.z + dual_length * dz) - self.c)
            upper = None
            if self.w is not None and dw is not None and correction[1] is not None:
                upper = correction[1] + _towards(mu, (self.slack - primal * dx) * (self.w + dual_length * dw))
            bent = correction[0] + lower, upper
            other = self._direction(solve, theta, dual, mu, bent)
            found = self._longest(other)
            if not _finite(other) or sum(found) < sum(length) + _WORTH * _LONGER:
                break
            step, length, correction = other, found, bent
        return step, length

    def _longest(self, step: _Step) -> tuple[float, float]:
        """Return the longest (primal, dual) steps that keep x, u - x, z and w positive.

        Both are the same if φ is curved, there is a barrier, or some constraint is soft.
        """
        dx, _, dz, dw = step
        primal, dual = _ratio(self.x, dx), _ratio(self.z, dz)
        if self.w is not None and dw is not None:
            primal, dual = min(primal, _ratio(self.slack, -dx)), min(dual, _ratio(self.w, dw))
        coupled = self.program.reference is not None or self.program.barrier is not None
        if coupled or bool((self.program.softness > 0).any()):
            primal = dual = min(primal, dual)
        return primal, dual

    def _mean_complementarity(self, step: _Step | None = None, length: tuple[float, float] = (0.0, 0.0)) -> float:
        """Return the mean of |x z - c| and (u - x) w, at the current point or after ``step`` with the given lengths."""
        x, z, w = self.x, self.z, self.w
        if step is not None:
            x, z = x + length[0] * step[0], z + length[1] * step[2]
            w = None if w is None or step[3] is None else w + length[1] * step[3]
        total = (x * z - self.c).abs().sum()
        if w is None or self.program.upper is None:
            return float(total) / len(x)
        return float(total + ((self.program.upper - x) * w).sum()) / (2 * len(x))

    def _move(self, step: _Step, length: tuple[float, float]) -> None:
        """Move x along ``step`` by its primal length and y, z, w by its dual length, both damped."""
        damping = _DAMPING if self.program.barrier is None else _INSIDE
        primal, dual = (min(1.0, damping * t) for t in length)
        self.x = self.x + primal * step[0]
        self.y = self.y + dual * step[1]
        self.z = self.z + dual * step[2]
        if self.w is not None and step[3] is not None:
            self.w = self.w + dual * step[3]
        self.residual = self._residual()


_Step = tuple[Tensor, Tensor, Tensor, Tensor | None]
_Products = tuple[Tensor, Tensor | None]


def _finite(step: _Step) -> bool:
    """Return whether all entries of a step are finite."""
    return all(bool(part.isfinite().all()) for part in step if part is not None)


def _towards(mu: float, products: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the changes that bring products into [``mu`` / 10, 10 ``mu``], each at least -10 ``mu``."""
    change = products.clamp(mu * _CLOSE, mu / _CLOSE) - products
    return change.clamp_min(-mu / _CLOSE)


def _ratio(x: Float[Tensor, " N"], dx: Float[Tensor, " N"]) -> float:
    """Return the largest t with x + t dx ≥ 0, at most 1 / 0.9995, so that a damped step of full length is 1."""
    falling: Bool[Tensor, " N"] = dx < 0
    return min(1.0 / _DAMPING, float((x[falling] / -dx[falling]).min())) if bool(falling.any()) else 1.0 / _DAMPING
