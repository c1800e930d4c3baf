"""The inner solve: Newton's method on a surrogate; it reads gathered rows only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet import kernels
from softmeet.conjugate_kernels import Curved
from softmeet.conjugate_kernels import conjugate_gradients as compiled
from softmeet.solvers.conjugate import conjugate_gradients
from softmeet.solvers.preconditioner import HeavyTokens, Preconditioner
from softmeet.solvers.surrogate import Point

_ARMIJO = 1e-4
# The part of its quadratic model's fall that F has to show for conjugate gradients to go on.
_FALL = 0.25
_HALVINGS = 30
_TINY = 1e-300


class Hessian:
    """∇²F at a point; call it with a direction."""

    def __init__(self, at: Point) -> None:
        self.at, surrogate = at, at.surrogate
        self.surrogate = surrogate
        self.scores = torch.zeros_like(at.y)
        self.u, self.w = u, w = at.masses
        self.alpha, self.gamma = u.new_tensor(surrogate.alpha)[:, None], u.new_tensor(surrogate.gamma)[:, None]
        self.total, self.totals = u.sum(-1, keepdim=True), w.sum(-1, keepdim=True)
        difference, own = at.moments
        self.mean = (difference + own) / self.total.clamp_min(_TINY)
        self.means = own / surrogate.spread(self.totals[..., 0]).clamp_min(_TINY)
        self.compiled = surrogate.gathered.compiled
        if self.compiled:
            self.low = [x.float().contiguous() for x in (u[0], w[0], self.alpha[:, 0], self.gamma[:, 0])]

    def __call__(self, d: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """The product with ``d``."""
        if self.compiled:
            return self._compiled(d)
        surrogate, spread = self.surrogate, self.surrogate.spread
        gathered = surrogate.gathered
        self.scores = y = gathered.scores(d)
        x = (self.alpha * y).sum(1)
        joint = self.u * (x - (self.u * x).sum(-1, keepdim=True) / self.total.clamp_min(_TINY))
        own = self.w * (y - (self.w * y).sum(-1, keepdim=True) / self.totals.clamp_min(_TINY))
        found = gathered.moments(joint[:, None] + self.gamma * own)
        return spread(self.alpha[None, :, 0]) * found + surrogate.pull(d)

    def _compiled(self, d: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """Of one row, by one read of what was gathered: sums about the origin, their means taken off afterwards."""
        gathered, (u, w, alpha, gamma) = self.surrogate.gathered, self.low
        y, sums, out = kernels.curve([a[0] for a in gathered.rows], d[0].float(), u, w, alpha, gamma)
        self.scores = y[None].to(d.dtype)
        spread = self.surrogate.spread
        joint = spread(self.alpha[:, 0] * sums[None, :1]) * self.mean
        own = spread((self.alpha * self.gamma)[:, 0] * sums[None, 1:]) * self.means
        return out[None].to(d.dtype) - joint - own + self.surrogate.pull(d)

    def solve(
        self, g: Float[Tensor, "b D"], precondition: Preconditioner, reduction: float, limit: int
    ) -> Float[Tensor, "b D"]:
        """∇²F⁻¹ g by conjugate gradients, to ``reduction`` of the preconditioned residual or as far as F falls with it.

        F here has the gradient g. Where masses are small, directions of little curvature lead to where F grows
        exponentially; conjugate gradients take them last (Steihaug, SIAM J. Numer. Anal. 20, 1983).
        """
        ridge = self.surrogate.ridge
        if not self.compiled or ridge is None or not isinstance(precondition, HeavyTokens):
            return conjugate_gradients(self, g, precondition, reduction, limit, _Falls(self, g))
        rows, trust = [a[0] for a in self.surrogate.gathered.rows], g.new_tensor(self.surrogate.trust)
        u, w, alpha, gamma = self.low
        curved = Curved(rows, u, w, alpha, gamma, trust, self.mean[0], self.means[0], ridge[0])
        inverse = precondition.compiled()
        return compiled(curved, inverse, g[0].contiguous(), reduction, limit, _FALL)[None]


class _Falls:
    """Whether F, with the gradient ``g`` at a point, falls by at least a part of what its quadratic model does."""

    def __init__(self, hessian: Hessian, g: Float[Tensor, "b D"]) -> None:
        self.hessian, self.g = hessian, g
        self.y, self.value = torch.zeros_like(hessian.at.y), hessian.at.value

    def __call__(
        self, s: Float[Tensor, "b D"], step: Float[Tensor, " b"], foretold: Float[Tensor, " b"]
    ) -> Bool[Tensor, " b"]:
        at = self.hessian.at
        y = self.y + step[:, None, None] * self.hessian.scores
        value = self.hessian.surrogate.value(at.s - s, at.y - y) + ((at.gradient - self.g) * s).sum(-1)
        falls = self.value - value >= _FALL * foretold
        self.y, self.value = y, value
        return falls


def minimise(
    start: Point,
    newton: Callable[[Point], Float[Tensor, "b D"]],
    *,
    steps: int,
    enough: Callable[[Point], Bool[Tensor, " b"]] | None = None,
    foretold: float = 0.0,
) -> Point:
    """Newton's method, at most ``steps`` times; rows that stop sooner stay put.

    Args:
        start: where to begin.
        newton: ∇²F⁻¹ ∇F at a point, or near it.
        steps: at most.
        enough: where to stop.
        foretold: stop once F has fallen as its quadratic model said, to this share: one more step would bring little.
    """
    surrogate, now, done = start.surrogate, start, torch.zeros_like(start.value, dtype=torch.bool)
    for _ in range(steps):
        if enough is not None:
            done = done | enough(now)
        if bool(done.all()):
            break
        d = newton(now)
        d = torch.where(d.isfinite().all(-1, keepdim=True), d, 0.0)
        decrement = (now.gradient * d).sum(-1)
        z = surrogate.gathered.scores(d)
        t = torch.where(done, 0.0, torch.ones_like(now.value))
        for _ in range(_HALVINGS):
            trial = surrogate.value(now.s - t[:, None] * d, now.y - t[:, None, None] * z)
            failed = ~(trial <= now.value - _ARMIJO * t * decrement)
            if not failed.any():
                break
            t = torch.where(failed, t / 2, t)
        t = torch.where(trial <= now.value, t, 0.0)
        if not t.any():
            break
        fall = now.value - trial
        done = done | ((t == 1) & ((fall - 0.5 * decrement).abs() <= foretold * 0.5 * decrement))
        there = now.s - t[:, None] * d, now.y - t[:, None, None] * z
        now = Point(surrogate, *there, torch.where(t > 0, trial, now.value))
    return now
