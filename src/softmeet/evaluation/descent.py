"""How a fit goes down its loss: by L-BFGS where all positions count at once, by Adam where each step sees a few."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.evaluation.parameters import Layout, Values

LossAndGradient = Callable[[Float[Tensor, " k"]], tuple[float, Float[Tensor, " k"]]]
# L-BFGS takes its first step as long as the gradient: in units of a twentieth of a nat that is about right.
_UNIT = 20.0
# Adam's first step, in the logarithms that are learnt; it falls to zero along half a cosine.
_RATE = 0.2


def minimise(loss: LossAndGradient, layout: Layout, start: Values, evaluations: int) -> tuple[Values, float, int]:
    """(values, loss, evaluations) by L-BFGS-B from ``start``, rounded; the best point seen, should it end early."""
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
    return layout.values(best[1]).rounded(free=layout.free), best[0], int(done.nfev)


def descend(
    losses: Callable[[int], LossAndGradient], layout: Layout, start: Values, steps: int
) -> tuple[Values, float, int]:
    """(values, mean loss of the last half of the steps, steps) by Adam, rounded.

    Args:
        losses: the loss of the k-th step, on positions of its own.
        layout, start: of the parameters.
        steps: how many.
    """
    theta = torch.nn.Parameter(layout.pack(start))
    low, high = (torch.tensor(side, dtype=torch.float64) for side in zip(*layout.bounds(), strict=True))
    adam = torch.optim.Adam([theta], lr=_RATE, betas=(0.8, 0.95))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    seen = []
    for k in range(steps):
        found, theta.grad = losses(k)(theta.detach())
        seen.append(found)
        adam.step()
        rate.step()
        theta.data.clamp_(low, high)
    late = seen[steps // 2 :]
    return layout.values(theta).rounded(free=layout.free), sum(late) / len(late), steps
