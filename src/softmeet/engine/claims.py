"""Readers that know when they know: each takes the share that it claims of what a rule has answered.

The answer becomes p = (1 - c) p_rule + c p_own, for several of them one after the other, in their order. It is the one
place where this is done, behind the rule, whatever asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.rules.solution import Solution


def claimed(ours: Float[Tensor, "B v"], states: Sequence[Float[Tensor, "B _"]]) -> Float[Tensor, "B v"]:
    """Return a rule's log-probabilities, in nats, behind the claims of readers.

    Args:
        ours: (B, v), the rule's answer.
        states: for each reader that claims, (B, v + 1): its log-probabilities in nats, and behind them log c.

    Example:
        >>> rule, own = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0, 0.25]])
        >>> claimed(rule.log(), [own.log()]).exp()
        tensor([[0.6250, 0.3750]])
    """
    for own in states:
        told = own.to(ours)
        log_c = told[:, -1:]
        ours = torch.logaddexp(ours + torch.log1p(-log_c.exp()), told[:, :-1] + log_c)
    return ours


def behind_claims(solution: Solution, states: Sequence[Float[Tensor, "B _"]]) -> Solution:
    """Return a solution with the claims of readers in its log-probabilities; all else is what the rule has found."""
    shares = torch.stack([own[:, -1].exp() for own in states]).double()
    return replace(solution, log_probs=claimed(solution.log_probs, states), claims=shares)


def claim_drawn(states: Sequence[Float[Tensor, "1 _"]], chance: Callable[[], float]) -> Float[Tensor, " v"] | None:
    """Draw who answers by the shares of readers that claim; return the log-probabilities of the one that does.

    Args:
        states: as of :func:`claimed`, behind one text.
        chance: returns a number drawn evenly from [0, 1).

    Returns:
        those, (v,), in nats; None if it is the rule.
    """
    for own in reversed(states):
        if chance() < float(own[0, -1].exp()):
            return own[0, :-1]
    return None
