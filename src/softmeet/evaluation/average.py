"""The loss of an average with its derivatives, as a function of weights, a temperature and an order.

Averages are power means of the members' probabilities, p ∝ (Σ w_i p̂_i^α)^{1/(αT)}: of order α = 1 the probability
mean, of order 0, the limit, the logit mean. The loss -log p(target) has few parameters, and its Fisher information is
a covariance under p, so that it costs little beside the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.evaluation.layout import Layout, Values
from softmeet.simplex import log_power_means, power_mean_slopes, weighted_log_probs

# Stands for log 0, so that 0 · log 0 is 0.
_LOG_ZERO = -1e4


class Sums(NamedTuple):
    """A loss in nats, its gradient in θ, (k,), and its Fisher information in θ, (k, k), summed over positions; fp64."""

    loss: float
    gradient: Float[Tensor, " k"]
    information: Float[Tensor, "k k"]

    def plus(self, other: Sums) -> Sums:
        """Return the sums over the positions of both."""
        return Sums(self.loss + other.loss, self.gradient + other.gradient, self.information + other.information)


@dataclass(frozen=True)
class Family:
    """A family of averages, with the parameters θ that ``layout`` describes.

    Attributes:
        layout: the parameters; without trusts.
        order: α, unless the layout has it: 0 for the logit mean, 1 for the probability mean.
        members: indices of the members that are averaged; None for all.
    """

    layout: Layout
    order: float = 0.0
    members: tuple[int, ...] | None = None

    def sums(
        self, theta: Float[Tensor, " k"], log_p: Float[Tensor, "n B v"], targets: Int[Tensor, " B"],
        support: Tensor | None,
    ) -> Sums:  # fmt: skip
        """Return the loss at some targets with its derivatives at ``theta``.

        Args:
            theta: the parameters θ, (k,), fp64.
            log_p: log-probabilities in nats of the members that are averaged, (n, B, v); sums over the vocabulary are
                taken in its dtype, of terms that are measured from the target's, which keeps seven digits in fp32.
            targets: the ids of the tokens that came, (B,), int64.
            support: (v,) bool, True for the ids that can have a probability above 0; None for all.
        """
        rows = torch.arange(len(targets), device=log_p.device)
        parts = self.layout.unpack(theta)
        temperature, order = parts.temperature.item(), parts.order.item() if self.layout.ordered else self.order
        weights = parts.weights.to(log_p)
        scores = means(log_p, weights, order)
        by_weight, by_order = power_mean_slopes(log_p, weights, order, scores)
        if support is not None:
            scores = scores.masked_fill(~support, -torch.inf)
        log_r = (scores / temperature).log_softmax(-1)
        # In the order of θ's parts: weights, then the temperature, then the order.
        sharpened = [-scores.clamp_min(_LOG_ZERO) / temperature] * self.layout.tempered
        columns = torch.stack([*by_weight, *sharpened, *[by_order] * self.layout.ordered])
        columns = columns - columns[:, rows, targets, None]
        weighted = columns * log_r.exp()
        mean = weighted.sum(-1).double().cpu() / temperature
        second = torch.einsum("kbv,jbv->kj", weighted, columns).double().cpu() / temperature**2
        chain = _jacobian(self.layout, theta)
        return Sums(
            -log_r[rows, targets].double().sum().item(),
            chain.T @ mean.sum(-1),
            chain.T @ (second - mean @ mean.T) @ chain,
        )

    def log_probs(
        self, values: Values, log_p: Float[Tensor, "n B v"], support: Tensor | None,
        weights: Float[Tensor, "n B"] | None = None,
    ) -> Float[Tensor, "B v"]:  # fmt: skip
        """Return the average's log-probabilities in nats, at some values and with arguments as of :meth:`sums`.

        ``weights``, one of each member at each of B positions, take the place of those in ``values``.
        """
        own = torch.tensor(values.weights, dtype=torch.float64) if weights is None else weights
        order = values.order if self.layout.ordered else self.order
        return (means(log_p, own.to(log_p), order, support) / values.temperature).log_softmax(-1)


def means(
    log_p: Float[Tensor, "n B v"], weights: Float[Tensor, "n ..."], order: float, support: Tensor | None = None
) -> Float[Tensor, "B v"]:
    """Return the logarithm of a power mean, at order 0 with weights that need not sum to 1, up to an added constant.

    It is -inf outside the ``support``, (v,) bool, if there is one.
    """
    found = log_power_means(log_p, weights, order) if order else weighted_log_probs(log_p, weights)
    return found if support is None else found.masked_fill(~support, -torch.inf)


def _jacobian(layout: Layout, theta: Float[Tensor, " k"]) -> Float[Tensor, "j k"]:
    """Return the derivatives of (weights, temperature if θ has one, order if θ has one) in θ, fp64."""

    def flat(at: Tensor) -> Tensor:
        parts = layout.unpack(at)
        held = [parts.temperature[None]] * layout.tempered + [parts.order[None]] * layout.ordered
        return torch.cat([parts.weights, *held])

    return torch.autograd.functional.jacobian(flat, theta.detach())  # type: ignore[no-any-return]
