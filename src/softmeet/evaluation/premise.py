"""Test whether a member's softmax explains its errors: to first order, on held-out text, before any fitting.

Let q be the pool and s_i the distribution of member i's family with the moments of q. To first order in its trust,
trusting member i lowers the loss at a token y by log p̂_i(y) - log s_i(y) + KL(s_i‖p̂_i). Under the premise its mean is
KL(s_i‖p̂_i) + KL(p̂_i‖s_i): the ratio of both means is the *premise score*, 1 when the premise holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.heads import SoftmaxHead, WhitenedHead
from softmeet.rules.solution import Solution
from softmeet.simplex import kl
from softmeet.solvers.base import iterate
from softmeet.solvers.minimise import full_hessian_pays, minimise_dual
from softmeet.solvers.newton import DualNewton
from softmeet.solvers.projection import Projection

_CHUNK = 64
_TOL = 1e-6
_STEPS, _POLISH = 100, 2
_COARSE = 1e-4


@dataclass(frozen=True)
class Premise:
    """The result of one member's premise test; ``gain`` and ``error`` are in nats per token and unit of trust.

    Attributes:
        gain: the mean of what trusting it lowers the loss by, to first order.
        error: its standard error over tokens; neighbouring tokens are not independent, so it is a lower bound.
        score: ``gain`` over what it would be under the premise.
        score_error: the same for the score.
    """

    gain: float
    error: float
    score: float
    score_error: float

    @property
    def verdict(self) -> str:
        """One word: ``trust``, ``do not trust`` or ``unclear`` at two standard errors."""
        if abs(self.gain) < 2 * self.error:
            return "unclear"
        return "trust" if self.gain > 0 else "do not trust"


@torch.inference_mode()
def premise_scores(ensemble: Ensemble, text: str, limit: int = 512) -> list[Premise]:
    """Test every member against the ensemble's pool on the first ``limit`` tokens of a text.

    Raises:
        InvalidInputError: the text has fewer than two tokens.
    """
    return premise_at(ensemble, ensemble.positions(text, limit))


@torch.inference_mode()
def premise_at(ensemble: Ensemble, stretches: Iterable[tuple[list[Tensor], Tensor]], **pool: Any) -> list[Premise]:
    """Test every member against a pool at some positions.

    Args:
        ensemble: the members.
        stretches: pairs of each member's hidden states, (t, d_i), and the tokens that came, (t,).
        pool: settings of the pool, such as ``weights``, in place of the ensemble's.

    Returns:
        A result for each member.
    """
    # The pool itself, whatever the rule.
    own = ensemble.model.settings.ungated().changed(**{**pool, "rule_temperature": 1.0, "bands": 1, "trust": 0.0})
    settings = own.changed(rule=own.pool)
    members, found = range(len(ensemble.names)), []
    for hidden, targets in stretches:
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            _, solution = ensemble.model.combiner.solve_rows([h[rows] for h in hidden], settings)
            found.append(torch.stack([torch.stack(_first_order(solution, i, targets[rows])) for i in members]))
    return [_summary(gain, expected) for gain, expected in torch.cat(found, -1)]


def _first_order(
    solution: Solution, i: int, targets: Int[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Return (what trusting member i would gain at each target, the mean of that under the premise), in nats."""
    problem = solution.problem
    log_q, log_p = problem.log_pool, problem.log_p[i]
    # s_i is the I-projection of p̂_i onto the distributions with the moments of q: q plays the exact member.
    log_s, _ = moment_match(log_q, log_p, problem.views([i]), _TOL)
    gathered = (log_p - log_s).gather(-1, targets[:, None]).squeeze(-1)
    return gathered + kl(log_s, log_p), kl(log_s, log_p) + kl(log_p, log_s)


def _summary(gain: Float[Tensor, " t"], expected: Float[Tensor, " t"]) -> Premise:
    count, scale = len(gain), expected.mean().item()
    mean, error = gain.mean().item(), (gain.std() / math.sqrt(count)).item()
    if scale <= _TOL:
        return Premise(mean, error, math.nan, math.nan)
    score = mean / scale
    spread = ((gain - score * expected).std() / math.sqrt(count)).item() / scale
    return Premise(mean, error, score, spread)


def moment_match(
    log_truth: Float[Tensor, "B v"], log_start: Float[Tensor, "B v"], views: tuple[WhitenedHead, ...], tol: float
) -> tuple[Float[Tensor, "B v"], Float[Tensor, "B d"]]:
    """Find the I-projection of ``log_start`` onto the distributions with the moments of ``log_truth`` under one head.

    Args:
        log_truth: log-probabilities in nats, fp64.
        log_start: the family's base: any of its members.
        views: the head, whitened, over the same batch.
        tol: nats; at the size of real models no less than 10⁻⁴.

    Returns:
        (the projection's log-probabilities; what to add to the base's hidden state, (B, d)), fp64.
    """
    projection, newton = Projection(log_start, log_truth[:, None], views, (math.inf,), tol), DualNewton()
    if not full_hessian_pays(projection):
        coarse = replace(projection, tol=max(tol, _COARSE))
        found = minimise_dual(coarse, _STEPS, certify=False, rescue=False)
        return found.log_p, views[0].raw(found.nu)[0]
    state = iterate(newton, projection, _STEPS)
    # The dual value stands still at the square root of rounding; whole steps bring the moments down to rounding itself.
    for _ in range(_POLISH):
        newton.aim(projection, state)
        state.nu, state.z = state.nu + state.direction, state.z + projection.scores(state.direction)
        state.log_p, state.log_r = projection.pooled(state.z), projection.corrected(state.z)
    return projection.pooled(state.z), views[0].raw(state.nu)[0]


def best_hidden(head: SoftmaxHead, log_truth: Float[Tensor, "B v"], tol: float = 1e-12) -> Float[Tensor, "B d"]:
    """Find the hidden states h, fp64, of least KL(truth‖softmax(W h + β)): a member's own where the premise holds.

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
