"""The inner solve: Newton's method on a surrogate; it reads gathered rows only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet import kernels
from softmeet.solvers.surrogate import Point, Surrogate

_ARMIJO = 1e-4
_HALVINGS = 30
_TINY = 1e-300


class Hessian:
    """∇²F at a point; call it with a direction."""

    def __init__(self, surrogate: Surrogate, at: Point) -> None:
        self.surrogate = surrogate
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
        y = gathered.scores(d)
        x = (self.alpha * y).sum(1)
        joint = self.u * (x - (self.u * x).sum(-1, keepdim=True) / self.total.clamp_min(_TINY))
        own = self.w * (y - (self.w * y).sum(-1, keepdim=True) / self.totals.clamp_min(_TINY))
        found = gathered.moments(joint[:, None] + self.gamma * own)
        return spread(self.alpha[None, :, 0]) * found + surrogate.pull(d)

    def _compiled(self, d: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """Of one row, by one read of what was gathered: sums about the origin, their means taken off afterwards."""
        gathered, (u, w, alpha, gamma) = self.surrogate.gathered, self.low
        sums, out = kernels.curve([a[0] for a in gathered.rows], [x[0] for x in gathered.parts(d)], u, w, alpha, gamma)
        spread = self.surrogate.spread
        joint = spread(self.alpha[:, 0] * sums[None, :1]) * self.mean
        own = spread((self.alpha * self.gamma)[:, 0] * sums[None, 1:]) * self.means
        return torch.cat(out)[None].to(d.dtype) - joint - own + self.surrogate.pull(d)


def minimise(
    surrogate: Surrogate,
    start: Point,
    newton: Callable[[Point], Float[Tensor, "b D"]],
    *,
    steps: int,
    enough: Callable[[Point], Bool[Tensor, " b"]],
) -> Point:
    """Newton's method, at most ``steps`` times, until ``enough`` says so; such rows stay put.

    Args:
        surrogate: F.
        start: where to begin.
        newton: ∇²F⁻¹ ∇F at a point, or near it.
        steps: at most.
        enough: where to stop.
    """
    now, done = start, torch.zeros_like(start.value, dtype=torch.bool)
    for _ in range(steps):
        done = done | enough(now)
        if bool(done.all()):
            break
        d = newton(now)
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
        now = surrogate.at(now.s - t[:, None] * d, now.y - t[:, None, None] * z)
    return now
