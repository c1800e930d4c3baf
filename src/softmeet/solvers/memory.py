"""Limited-memory BFGS around any model of the Hessian (Nocedal and Wright, Numerical Optimization, 2006, alg. 7.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_SIZE = 4


@dataclass(frozen=True, eq=False)
class Memory:
    """The last steps and the changes of the gradient that they made, newest last; 0 where empty."""

    steps: Float[Tensor, "b m D"]
    changes: Float[Tensor, "b m D"]

    @property
    def empty(self) -> bool:
        """Whether no row remembers anything."""
        return not bool(self.steps.any())

    @classmethod
    def blank(cls, like: Float[Tensor, "b D"]) -> Memory:
        """Nothing yet."""
        return cls(*(like.new_zeros(len(like), _SIZE, like.shape[-1]) for _ in range(2)))

    def added(
        self, s: Float[Tensor, "b D"], y: Float[Tensor, "b D"], useful: Bool[Tensor, " b"], forget: Bool[Tensor, " b"]
    ) -> Memory:
        """With a step and its change, for ``useful`` rows in which f curved upwards; rows that ``forget`` lose all."""
        useful = useful & ((s * y).sum(-1) > 0)

        def update(old: Float[Tensor, "b m D"], new: Float[Tensor, "b D"]) -> Float[Tensor, "b m D"]:
            added = torch.cat([old[:, 1:], new[:, None]], dim=1)
            return torch.where(useful[:, None, None], added, old).masked_fill(forget[:, None, None], 0.0)

        return Memory(update(self.steps, s), update(self.changes, y))

    def before(self, g: Float[Tensor, "b D"]) -> tuple[Float[Tensor, "b D"], Float[Tensor, "b m"]]:
        """(what the model's inverse Hessian is to be applied to, the weights that :meth:`after` needs)."""
        weights = []
        for j in reversed(range(_SIZE)):
            s, y = self.steps[:, j], self.changes[:, j]
            weights.append((s * g).sum(-1) * _inverse((s * y).sum(-1)))
            g = g - weights[-1][:, None] * y
        return g, torch.stack(weights[::-1], dim=-1)

    def after(self, x: Float[Tensor, "b D"], weights: Float[Tensor, "b m"]) -> Float[Tensor, "b D"]:
        """The updated inverse applied to the gradient, from the model's answer ``x``."""
        for j in range(_SIZE):
            s, y = self.steps[:, j], self.changes[:, j]
            x = x + (weights[:, j] - (y * x).sum(-1) * _inverse((s * y).sum(-1)))[:, None] * s
        return x


def _inverse(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    return torch.where(x > 0, 1 / x, 0.0)
