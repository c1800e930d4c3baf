"""Minimise the loss of a fit, by L-BFGS where all positions count at once, by Adam where each step sees a few.

What is fitted is one vector: pool weights, temperature and trusts, each through a smooth map onto what it may be.
Weights on the simplex are softmax(a), free ones exp(a); the temperature is exp(b) and each trust exp(c). A weight or a
trust that is of no use tends to zero, and is set to zero at the end where it is small enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LossAndGradient = Callable[[Float[Tensor, " k"]], tuple[float, Float[Tensor, " k"]]]

# Below these a weight, or a trust, is zero.
NO_WEIGHT, NO_TRUST = 2e-3, 5e-3
_BOUNDS = {"weights": (-9.0, 3.0), "temperature": (-1.5, 1.5), "trust": (math.log(NO_TRUST) - 0.5, math.log(30.0))}
# L-BFGS takes its first step as long as the gradient: in units of a twentieth of a nat that is about right.
_UNIT = 20.0
# Adam's first step, in the logarithms that are learnt; it falls to zero along half a cosine.
_RATE = 0.2


@dataclass(frozen=True)
class Values:
    """Weights, temperature and trusts in their own units; ``trust`` is empty for an average."""

    weights: tuple[float, ...]
    temperature: float = 1.0
    trust: tuple[float, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Which parameters a vector holds.

    Attributes:
        n: the number of weights.
        trusts: the number of trusts.
        free: whether weights may sum to anything, not only to one.
        tempered: whether there is a temperature.
    """

    n: int
    trusts: int = 0
    free: bool = False
    tempered: bool = True

    def pack(self, values: Values) -> Float[Tensor, " k"]:
        """Return some values as a vector, clipped to the bounds.

        >>> Layout(2).pack(Values((0.5, 0.5)))
        tensor([-0.6931, -0.6931,  0.0000], dtype=torch.float64)
        """
        numbers = [*values.weights, *[values.temperature] * self.tempered, *(values.trust if self.trusts else ())]
        return self.clip(torch.tensor(numbers, dtype=torch.float64).clamp_min(1e-9).log())

    def unpack(self, theta: Float[Tensor, " k"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (weights, temperature, trusts) of a vector, differentiable."""
        a = theta[: self.n]
        temperature = theta[self.n].exp() if self.tempered else theta.new_ones(())
        return (a.exp() if self.free else a.softmax(0)), temperature, theta[self.n + int(self.tempered) :].exp()

    def values(self, theta: Float[Tensor, " k"]) -> Values:
        """Return the values of a vector, with weights and trusts that are next to nothing set to zero."""
        tensors = self.unpack(theta.detach())
        weights, temperature, trust = tensors[0].tolist(), tensors[1].item(), tensors[2].tolist()
        some = [w if w >= NO_WEIGHT * sum(weights) else 0.0 for w in weights]
        scale = 1.0 if self.free else sum(some)
        rounded = tuple(rho if rho >= NO_TRUST else 0.0 for rho in trust)
        return Values(tuple(w / scale for w in some), temperature, rounded)

    def bounds(self) -> Sequence[tuple[float, float]]:
        """Return the least and the largest value of each entry of a vector."""
        parts = [_BOUNDS["weights"]] * self.n + [_BOUNDS["temperature"]] * self.tempered
        return parts + [_BOUNDS["trust"]] * self.trusts

    def clip(self, theta: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Clip a vector to the bounds."""
        return theta.clamp(*torch.tensor(self.bounds(), dtype=torch.float64).unbind(-1))


def fit_by_lbfgs(loss: LossAndGradient, layout: Layout, start: Values, evaluations: int) -> tuple[Values, float, int]:
    """Minimise a loss by L-BFGS-B within the layout's bounds.

    Args:
        loss: of a vector, with its gradient, fp64.
        layout: of the vector.
        start: where to begin.
        evaluations: the most evaluations of the loss.

    Returns:
        (the best values seen; their loss; the number of evaluations).
    """
    from scipy.optimize import minimize

    best: list[Any] = [math.inf, layout.pack(start)]

    def value(theta: Any) -> tuple[float, Any]:
        at = torch.tensor(theta, dtype=torch.float64)
        found, gradient = loss(at)
        if found < best[0]:
            best[:] = [found, at]
        return _UNIT * found, _UNIT * gradient.numpy()

    done = minimize(
        value, layout.pack(start).numpy(), jac=True, method="L-BFGS-B", bounds=layout.bounds(),
        options={"maxfun": evaluations, "ftol": 1e-6, "gtol": 1e-4},
    )  # fmt: skip
    return layout.values(best[1]), best[0], int(done.nfev)


def fit_by_adam(
    losses: Callable[[int], LossAndGradient], layout: Layout, start: Values, steps: int
) -> tuple[Values, float, int]:
    """Minimise a loss by Adam, each step of which sees some of the positions.

    Args:
        losses: gives the loss of the k-th step.
        layout: of the vector.
        start: where to begin.
        steps: how many.

    Returns:
        (values; the mean loss of the last half of the steps; the number of steps).
    """
    theta = torch.nn.Parameter(layout.pack(start))
    adam = torch.optim.Adam([theta], lr=_RATE, betas=(0.8, 0.95))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    seen = []
    for k in range(steps):
        found, theta.grad = losses(k)(theta.detach())
        seen.append(found)
        adam.step()
        rate.step()
        theta.data = layout.clip(theta.data)
    late = seen[steps // 2 :]
    return layout.values(theta), sum(late) / len(late), steps
