"""The best that a member's family can do: the softmax of its head with the moments of a given distribution."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.heads import SoftmaxHead, WhitenedHead
from softmeet.solvers.base import iterate
from softmeet.solvers.minimise import full_hessian_pays, minimise
from softmeet.solvers.newton import DualNewton
from softmeet.solvers.projection import Projection

_STEPS, _POLISH = 100, 2
_COARSE = 1e-4


def moment_match(
    log_truth: Float[Tensor, "B v"], log_start: Float[Tensor, "B v"], views: tuple[WhitenedHead, ...], tol: float
) -> tuple[Float[Tensor, "B v"], Float[Tensor, "B d"]]:
    """The I-projection of ``log_start`` onto the distributions with the moments of ``log_truth``, under one head.

    Args:
        log_truth: log-probabilities in nats, fp64.
        log_start: the family's base: any of its members.
        views: the head, whitened, over the same batch.
        tol: nats; at the size of real models no less than 10⁻⁴.

    Returns:
        (its log-probabilities; what to add to the base's hidden state, fp64).
    """
    projection, newton = Projection(log_start, log_truth[:, None], views, (math.inf,), tol), DualNewton()
    if not full_hessian_pays(projection):
        coarse = replace(projection, tol=max(tol, _COARSE))
        found = minimise(coarse, _STEPS, certify=False, rescue=False)
        return found.log_p, views[0].raw(found.nu)[0]
    state = iterate(newton, projection, _STEPS)
    # The dual value stands still at the square root of rounding; whole steps bring the moments down to rounding itself.
    for _ in range(_POLISH):
        newton.aim(projection, state)
        state.nu, state.z = state.nu + state.direction, state.z + projection.scores(state.direction)
        state.log_p, state.log_r = projection.pooled(state.z), projection.corrected(state.z)
    return projection.pooled(state.z), views[0].raw(state.nu)[0]


def best_hidden(head: SoftmaxHead, log_truth: Float[Tensor, "B v"], tol: float = 1e-12) -> Float[Tensor, "B d"]:
    """Argmin KL(truth‖softmax(W h + β)) over h, fp64: what a member of this head thinks under the premise.

    Args:
        head: without a soft-cap, for which the moments do not determine the best h.
        log_truth: log-probabilities in nats; where its support is not full the best h may be at infinity.
        tol: nats.
    """
    B, v = log_truth.shape
    base = torch.zeros(v, dtype=torch.float64) if head.bias is None else head.bias.double() * head.scale
    views = (WhitenedHead(head, v, torch.float64, batch=B),)
    _, hidden = moment_match(log_truth.double(), base.log_softmax(-1).expand(B, v), views, tol)
    return hidden / head.scale
