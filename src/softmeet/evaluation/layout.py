"""The parameters of a fit: one vector θ of weights, a temperature, an order and trusts.

Each is a smooth map of real numbers: weights are softmax(a), exp(a) if they need not sum to one, or a, shifted to sum
to one, if they may be below zero; the temperature is exp(b), the order c itself, and each trust exp(d). A weight or a
trust that does not help tends to zero, and is set to zero at the end if it is small enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Below these a weight, as a share of all, or a trust is set to zero.
NO_WEIGHT, NO_TRUST = 2e-3, 5e-3
_BOUNDS = {
    "weights": (-9.0, 3.0),
    "signed": (-20.0, 20.0),
    "temperature": (-1.5, 1.5),
    "order": (0.02, 1.0),
    "trust": (math.log(NO_TRUST) - 0.5, math.log(30.0)),
}


@dataclass(frozen=True)
class Values:
    """Fitted values in their own units.

    Attributes:
        weights: the pool's weight of each member.
        temperature: that of the rule's answer p, above 0: the ensemble's distribution is ∝ p^(1/temperature).
        trust: trusts ρ in nats per nat, of each member whose moments count; empty for an average.
        order: that of a power mean, from 0 to 1; without meaning for other averages.
    """

    weights: tuple[float, ...]
    temperature: float = 1.0
    trust: tuple[float, ...] = ()
    order: float = 0.5


class Parts(NamedTuple):
    """The tensors that a vector θ stands for: weights, (n,); temperature, (); order, (); trusts, (trusts,)."""

    weights: Float[Tensor, " n"]
    temperature: Float[Tensor, ""]
    order: Float[Tensor, ""]
    trust: Float[Tensor, " t"]


@dataclass(frozen=True)
class Layout:
    """The parameters that a vector θ holds: logarithms of weights and of a temperature, an order, logarithms of trusts.

    θ has n entries for weights, one each for a temperature and an order if it has them, and one for each trust; k in
    all. Signed weights are held themselves.

    Attributes:
        n: the number of members, each with a weight.
        trusts: the number of trusts, in the order of :class:`Values`; 0 for an average.
        free: whether weights may sum to anything, exp(θ), rather than to one, softmax(θ).
        tempered: whether θ has a temperature; without one it is 1.
        ordered: whether θ has the order of a power mean; without one it is that of :class:`Values`, 0.5.
        signed: whether weights, which then sum to one, may be below zero.
    """

    n: int
    trusts: int = 0
    free: bool = False
    tempered: bool = True
    signed: bool = False
    ordered: bool = False

    def pack(self, values: Values) -> Float[Tensor, " k"]:
        """Return the vector θ of some values, (k,), fp64, clipped to :meth:`bounds`: logarithms, but of signed weights.

        >>> Layout(2).pack(Values((0.5, 0.5)))
        tensor([-0.6931, -0.6931,  0.0000], dtype=torch.float64)
        """
        weights, trust = (torch.tensor(own, dtype=torch.float64) for own in (values.weights, values.trust))
        scale = torch.tensor([values.temperature] * self.tempered, dtype=torch.float64).log()
        order = torch.tensor([values.order] * self.ordered, dtype=torch.float64)
        trust = trust[: self.trusts].clamp_min(1e-9).log()
        return self.clip(torch.cat([weights if self.signed else weights.clamp_min(1e-9).log(), scale, order, trust]))

    def unpack(self, theta: Float[Tensor, " k"]) -> Parts:
        """Return the parts of a vector θ, differentiable in it."""
        sizes = (self.n, int(self.tempered), int(self.ordered), self.trusts)
        a, scale, order, trust = theta.split(sizes)
        weights = a + (1 - a.sum()) / self.n if self.signed else a.exp() if self.free else a.softmax(0)
        return Parts(
            weights,
            scale[0].exp() if self.tempered else theta.new_ones(()),
            order[0] if self.ordered else theta.new_tensor(Values(()).order),
            trust.exp(),
        )

    def values(self, theta: Float[Tensor, " k"]) -> Values:
        """Return the values of a vector θ, with weights and trusts near zero set to zero.

        Weights below 0.002 of their absolute sum and trusts below 0.005 count as near zero; the other weights are
        rescaled to sum to one, unless they are ``free``. An order is rounded to thousandths.
        """
        parts = self.unpack(theta.detach())
        weights, trust = parts.weights.tolist(), parts.trust.tolist()
        some = [w if abs(w) >= NO_WEIGHT * sum(map(abs, weights)) else 0.0 for w in weights]
        scale = 1.0 if self.free else sum(some)
        rounded = tuple(rho if rho >= NO_TRUST else 0.0 for rho in trust)
        return Values(tuple(w / scale for w in some), parts.temperature.item(), rounded, round(parts.order.item(), 3))

    def bounds(self) -> Sequence[tuple[float, float]]:
        """Return (the least, the largest value) of each entry of a vector θ."""
        parts = [_BOUNDS["signed" if self.signed else "weights"]] * self.n + [_BOUNDS["temperature"]] * self.tempered
        return parts + [_BOUNDS["order"]] * self.ordered + [_BOUNDS["trust"]] * self.trusts

    def clip(self, theta: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Return a copy of a vector θ with each entry clipped to its :meth:`bounds`."""
        return theta.clamp(*torch.tensor(self.bounds(), dtype=torch.float64).unbind(-1))
