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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.essay.matrices import MomentMatrix
from softmeet.solvers.clock import time_is_over
from softmeet.solvers.linalg import factored

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
    best = found = method.report(0)
    residual, complementarity, stalled = best.residual, best.complementarity, 0
    for step in range(1, max_steps + 1):
        exact = found.residual <= _FEASIBLE * method.scale
        finished = exact and found.complementarity <= _COMPLEMENTARY * method.cost_scale
        late = stalled >= _ENOUGH and found.complementarity <= _NEARLY * method.cost_scale
        if time_is_over() or finished or late or stalled == _STALLED or not method.advance():
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
    """The state of the method for one program: the current x, y, multipliers z and the residual of the constraints.

    The module docstring has the meaning of the letters. There is one bound, x ≥ 0, or two, x ≤ u as well; tensors
    (b, N) have a row for each of these b bounds, so that the rows of ``z`` are z and, with upper bounds, w. ``aims``
    are the products of z with the distances to the bounds that are wanted: c and 0. ``advance`` changes the state.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.G = program, program.columns
        self.x = program.start.clone()
        nothing = torch.zeros_like(self.x)
        self.aims = (nothing if program.barrier is None else program.barrier)[None]
        # The distance to a bound is what it is at x = 0, and x times the sign.
        self.at_zero, self.signs = nothing[None], torch.ones_like(nothing[:1, None])
        if program.upper is not None:
            self.at_zero, self.signs = torch.stack([nothing, program.upper]), torch.cat([self.signs, -self.signs])
            self.aims = torch.cat([self.aims, nothing[None]])
        # Soft constraints start with the multipliers that their excess implies, and that of the sum makes every reduced
        # cost positive: the start is dual feasible, and of the right size.
        soft = program.softness > 0
        excess = self.G.sums(self.x) - program.target
        self.y = torch.where(soft, -excess / program.softness.clamp_min(torch.finfo(excess.dtype).tiny), 0.0)
        slope = program.slope(self.x) - self.G.times(self.y)
        spread = (slope - slope.min()).mean().clamp_min(1e-3)
        self.z = (self.signs * slope).clamp_min(0) + spread
        if program.barrier is not None:
            self.z[0] = program.barrier / self.x
            self.y[program.unit] = -1.0
        elif program.upper is None:
            self.y[program.unit] = slope.min() - spread
            self.z[0] = slope - self.y[program.unit]
        self.scale = 1 + float(program.target.norm())
        self.cost_scale = 1 + float((self.x * slope.abs()).sum())
        self._measure()

    def _distances(self, x: Float[Tensor, " N"]) -> Float[Tensor, "b N"]:
        """Return the distances of ``x`` to its bounds: x itself and, with upper bounds, u - x."""
        return self.at_zero + self.signs * x

    def _measure(self) -> None:
        """Compute the distances to the bounds and the residual g - Gᵀx - E y, (m,), of the current point."""
        self.distances = self._distances(self.x)
        self.residual = self.program.target - self.G.sums(self.x) - self.program.softness * self.y

    def _complementarity(self, x: Float[Tensor, " N"], z: Float[Tensor, "b N"]) -> float:
        """Return Σ |x z - c| + Σ (u - x) w at a point ``x`` with the multipliers ``z``."""
        return float((self._distances(x) * z - self.aims).abs().sum(-1).sum())

    def report(self, steps: int) -> Interior:
        """Return the current point as an :class:`Interior`, with ``steps`` as its number of steps."""
        return Interior(self.x, self.y, steps, float(self.residual.norm()), self._complementarity(self.x, self.z))

    def advance(self) -> bool:
        """Take one predictor and corrector step, in place; return True.

        If the system's matrix cannot be factored, or the step is not finite, return False and change nothing.
        """
        program, x = self.program, self.x
        theta = 1 / sum(self.z / self.distances, program.curvature(x))
        dual = sum(-self.signs * self.z, program.slope(x) - self.G.times(self.y))
        M = self.G.gram(theta)
        M.diagonal().add_(program.softness)
        solve = factored(M)
        if solve is None:
            return False
        system = solve, theta, dual
        mu = self._complementarity(x, self.z) / self.z.numel()
        affine = self._direction(system, 0.0)
        reach = self._longest(affine)
        after = self._complementarity(x + reach[0] * affine[0], self.z + reach[1] * affine[2]) / self.z.numel()
        sigma = min(1.0, (after / mu) ** 3) if mu > 0 else 0.0
        second = self._second_order(affine, 1.0)
        step = self._direction(system, sigma * mu, second)
        if not _finite(step):
            return False
        step, length = self._more_central(system, sigma * mu, second, step)
        if min(length) < _SHORT:
            # If the predictor can be followed only a little, only a part of its second-order change is corrected.
            second = self._second_order(affine, min(1.0, reach[0] * reach[1]))
            careful = self._direction(system, sigma * mu, second)
            careful, further = self._more_central(system, sigma * mu, second, careful)
            if min(further) > min(length):
                step, length = careful, further
        if min(length) < _SHORT:
            # Very unequal products x z make steps short: this step only evens them out.
            centred = self._direction(system, mu)
            if min(self._longest(centred)) > min(length):
                step = centred
        self._move(self._refined(system, step))
        return True

    def _second_order(self, step: _Step, share: float) -> Float[Tensor, "b N"]:
        """Return ``share`` times the second-order change of the products x z and (u - x) w along ``step``, negated."""
        dx, _, dz = step
        return -share * self.signs * dx * dz

    def _refined(self, system: _System, step: _Step) -> _Step:
        """Correct ``step`` by the error of its constraints, which rounding leaves in sums over masses of all sizes."""
        (solve, theta, _), (dx, dy, dz) = system, step
        for _ in range(_REFINED):
            left = self.residual - self.G.sums(dx) - self.program.softness * dy
            if float(left.norm()) <= _FEASIBLE * self.scale:
                break
            more = solve(left)
            along = self.G.times(more)
            change = theta * along
            dx, dy = dx + change, dy + more
            own = -self.signs * self.z * change / self.distances
            dz = dz + self._dual_part(own, self.program.curvature(self.x) * change - along)
        return dx, dy, dz

    def _direction(self, system: _System, mu: float, correction: Tensor | float = 0.0) -> _Step:
        """Return Newton's step towards x z = c + mu and (u - x) w = mu, with ``correction`` added to both products."""
        solve, theta, dual = system
        lack = self.aims + mu - self.distances * self.z + correction
        h = sum(self.signs * lack / self.distances, -dual)
        dy = solve(self.residual - self.G.sums(theta * h))
        along = self.G.times(dy)
        dx = theta * (along + h)
        dz = (lack - self.signs * self.z * dx) / self.distances
        return dx, dy, self._dual_part(dz, dual + self.program.curvature(self.x) * dx - along)

    def _dual_part(self, dz: Float[Tensor, "b N"], change: Float[Tensor, " N"]) -> Float[Tensor, "b N"]:
        """Return the multipliers' steps ``dz``, from the products' equations, or those for which dz - dw = ``change``.

        The second are used where x, or u - x, is nearly zero: division by it would amplify the rounding of dx.
        """
        found, stiff = list(dz), self.z > self.distances * (1 + self.program.curvature(self.x))
        for k, sign in enumerate(self.signs):
            found[k] = torch.where(stiff[k], sum(found[:k] + found[k + 1 :], sign * change), found[k])
        return torch.stack(found)

    def _more_central(
        self, system: _System, mu: float, correction: Tensor, step: _Step
    ) -> tuple[_Step, tuple[float, float]]:
        """Bend ``step`` towards products near ``mu`` as long as that makes it longer; return (step, its lengths)."""
        length = self._longest(step)
        for _ in range(_CORRECTIONS):
            primal, dual = (min(1.0, t + _LONGER) for t in length)
            dx, _, dz = step
            products = (self.distances + primal * self.signs * dx) * (self.z + dual * dz) - self.aims
            bent = correction + _towards(mu, products)
            other = self._direction(system, mu, bent)
            found = self._longest(other)
            if not _finite(other) or sum(found) < sum(length) + _WORTH * _LONGER:
                break
            step, length, correction = other, found, bent
        return step, length

    def _longest(self, step: _Step) -> tuple[float, float]:
        """Return the longest (primal, dual) steps that keep x, u - x, z and w positive.

        Both are the same if φ is curved, there is a barrier, or some constraint is soft.
        """
        dx, _, dz = step
        primal, dual = _ratio(self.distances, self.signs * dx), _ratio(self.z, dz)
        coupled = self.program.reference is not None or self.program.barrier is not None
        if coupled or bool((self.program.softness > 0).any()):
            primal = dual = min(primal, dual)
        return primal, dual

    def _move(self, step: _Step) -> None:
        """Move x along ``step`` by its longest primal length and y, z, w by its longest dual one, both damped."""
        dx, dy, dz = step
        damping = _DAMPING if self.program.barrier is None else _INSIDE
        primal, dual = (min(1.0, damping * t) for t in self._longest(step))
        self.x, self.y, self.z = self.x + primal * dx, self.y + dual * dy, self.z + dual * dz
        self._measure()


# The steps of x, (N,), y, (m,), and z, (b, N); and a step's system: its solver, Θ, and φ'(x) - G y - z + w.
_Step = tuple[Tensor, Tensor, Tensor]
_System = tuple[Callable[[Tensor], Tensor], Tensor, Tensor]


def _finite(step: _Step) -> bool:
    """Return whether all entries of a step are finite."""
    return all(bool(part.isfinite().all()) for part in step)


def _towards(mu: float, products: Float[Tensor, "b N"]) -> Float[Tensor, "b N"]:
    """Return the changes that bring products into [``mu`` / 10, 10 ``mu``], each at least -10 ``mu``."""
    change = products.clamp(mu * _CLOSE, mu / _CLOSE) - products
    return change.clamp_min(-mu / _CLOSE)


def _ratio(x: Float[Tensor, "b N"], dx: Float[Tensor, "b N"]) -> float:
    """Return the largest t with x + t dx ≥ 0, at most 1 / 0.9995, so that a damped step of full length is 1."""
    falling: Bool[Tensor, "b N"] = dx < 0
    return min(1.0 / _DAMPING, float((x[falling] / -dx[falling]).min())) if bool(falling.any()) else 1.0 / _DAMPING
