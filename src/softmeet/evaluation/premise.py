"""Does a member's softmax explain its errors? A test to first order, on held-out text, before any fitting.

Let q be the pool and s_i the distribution of member i's family with the moments of q. To first order in its trust,
trusting member i lowers the loss at a token y by log p̂_i(y) - log s_i(y) + KL(s_i‖p̂_i). Under the premise its mean is
KL(s_i‖p̂_i) + KL(p̂_i‖s_i): the ratio of both means is the *premise score*, 1 when the premise holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.evaluation.family import moment_match
from softmeet.rules.solution import Solution
from softmeet.simplex import kl

_CHUNK = 64
_TOL = 1e-6


@dataclass(frozen=True)
class Premise:
    """One member's test over some tokens; ``gain`` and ``error`` in nats per token and unit of trust.

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
    """The test of every member against the ensemble's pool on the first ``limit`` tokens of a text.

    Raises:
        InvalidInputError: the text has fewer than two tokens.
    """
    return premise_at(ensemble, ensemble.positions(text, limit))


@torch.inference_mode()
def premise_at(ensemble: Ensemble, stretches: Iterable[tuple[list[Tensor], Tensor]], **pool: Any) -> list[Premise]:
    """The test at some positions: hidden states of each member, (t, d_i), and the tokens that came, (t,).

    ``pool`` are settings of the pool, such as ``weights``, in place of the ensemble's.
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
    """(what trusting member i would gain at each target, its mean under the premise)."""
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
