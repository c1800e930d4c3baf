"""A dual point: the distributions at some scores, and the dual value there."""

from __future__ import annotations

from dataclasses import dataclass, fields

from jaxtyping import Float, Int
from torch import Tensor

from softmeet.solvers.projection import Projection


@dataclass(frozen=True, eq=False)
class Point:
    """The distributions at some scores z, and the dual value there: log p and log r_i are log q + Σ α_i z_i - joint
    and log p̂_i - γ_i z_i - own.
    """

    z: Float[Tensor, "B n v"]
    p: Float[Tensor, "B v"]
    r: Float[Tensor, "B n v"]
    joint: Float[Tensor, "B 1"]
    own: Float[Tensor, "B n 1"]
    value: Float[Tensor, " B"]

    @classmethod
    def at(cls, problem: Projection, z: Float[Tensor, "B n v"]) -> Point:
        """Evaluate the dual, with one exponential of each entry."""
        p, joint = _softmax(problem.log_q + problem.tilt(z))
        r, own = _softmax(problem.log_p - problem.gamma[:, None] * z)
        return cls(z, p, r, joint, own, problem.value(joint[..., 0], own[..., 0], z))

    def slope(self, problem: Projection, y: Float[Tensor, "B n v"]) -> Float[Tensor, " B"]:
        """The derivative of f along a direction with the scores ``y``: Σ α_i (E_p y_i - E_{r_i} y_i)."""
        return (problem.alpha * ((self.p[:, None] - self.r) * y).sum(-1)).sum(-1)

    def logs(self, problem: Projection) -> tuple[Float[Tensor, "B v"], Float[Tensor, "B n v"]]:
        """(log p, log r)."""
        log_p = problem.log_q + problem.tilt(self.z) - self.joint
        return log_p, problem.log_p - problem.gamma[:, None] * self.z - self.own

    def put(self, rows: Int[Tensor, " k"], other: Point) -> Point:
        """With some rows replaced."""
        names = [f.name for f in fields(self)]
        return Point(*(getattr(self, name).index_copy(0, rows, getattr(other, name)) for name in names))


def _softmax(x: Float[Tensor, "*b v"]) -> tuple[Float[Tensor, "*b v"], Float[Tensor, "*b 1"]]:
    """(softmax, log of its normaliser)."""
    top = x.amax(-1, keepdim=True)
    p = (x - top).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), top + total.log()
