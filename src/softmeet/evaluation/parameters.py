"""What a fit learns, as one vector: pool weights, temperature, and trusts, each through a map onto what it may be.

Weights on the simplex are softmax(a), free ones exp(a); the temperature is exp(b) and each trust exp(c). Away from zero
these are smooth, and a weight or a trust that is not wanted goes to zero; what is left of it is cut off at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Below these a weight, or a trust, is zero.
NO_WEIGHT, NO_TRUST = 2e-3, 5e-3
_BOUNDS = {"weights": (-9.0, 3.0), "temperature": (-1.5, 1.5), "trust": (math.log(NO_TRUST) - 0.5, math.log(30.0))}


@dataclass(frozen=True)
class Values:
    """Weights, temperature and trusts in their own units; ``trust`` is empty for an average."""

    weights: tuple[float, ...]
    temperature: float = 1.0
    trust: tuple[float, ...] = ()

    def rounded(self, *, free: bool) -> Values:
        """With what is next to nothing set to zero."""
        kept = [w if w >= NO_WEIGHT * sum(self.weights) else 0.0 for w in self.weights]
        scale = 1.0 if free else sum(kept)
        trust = tuple(rho if rho >= NO_TRUST else 0.0 for rho in self.trust)
        return Values(tuple(w / scale for w in kept), self.temperature, trust)


@dataclass(frozen=True)
class Layout:
    """Which parts there are: ``n`` weights, a temperature or none, and ``trusts`` trusts."""

    n: int
    trusts: int = 0
    free: bool = False
    tempered: bool = True

    def pack(self, values: Values) -> Float[Tensor, " k"]:
        """The vector of some values, clipped to the bounds."""
        parts = [torch.tensor(values.weights, dtype=torch.float64).clamp_min(1e-9).log()]
        if self.tempered:
            parts.append(torch.tensor([values.temperature], dtype=torch.float64).log())
        if self.trusts:
            parts.append(torch.tensor(values.trust, dtype=torch.float64).clamp_min(1e-9).log())
        low, high = (torch.tensor(side, dtype=torch.float64) for side in zip(*self.bounds(), strict=True))
        return torch.cat(parts).clamp(low, high)

    def unpack(self, theta: Float[Tensor, " k"]) -> tuple[Tensor, Tensor, Tensor]:
        """(weights, temperature, trusts), differentiable."""
        a = theta[: self.n]
        temperature = theta[self.n].exp() if self.tempered else theta.new_ones(())
        return (a.exp() if self.free else a.softmax(0)), temperature, theta[self.n + int(self.tempered) :].exp()

    def values(self, theta: Float[Tensor, " k"]) -> Values:
        """The same as numbers."""
        weights, temperature, trust = self.unpack(theta.detach())
        return Values(tuple(weights.tolist()), temperature.item(), tuple(trust.tolist()))

    def bounds(self) -> Sequence[tuple[float, float]]:
        """Of each entry."""
        parts = [_BOUNDS["weights"]] * self.n + [_BOUNDS["temperature"]] * self.tempered
        return parts + [_BOUNDS["trust"]] * self.trusts
