"""Distributions over tokens, as log-probabilities in nats. Zeros are -inf; 0 log 0 = 0."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def log_normalize(scores: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """Scores - logsumexp(scores): the log-probabilities proportional to exp(scores)."""
    return scores - scores.logsumexp(-1, keepdim=True)


def entropy(log_p: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """H(p) = -Σ p log p, in nats."""
    p: Tensor = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def kl(log_p: Float[Tensor, "*b v"], log_q: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """KL(p‖q) = Σ p (log p - log q), in nats; +inf where p has mass outside the support of q."""
    p = log_p.exp()  # may underflow to 0 where log_p is finite
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return terms.sum(-1).clamp_min(0.0)


def logit_mean(log_p: Float[Tensor, "n *b v"], weights: Float[Tensor, " n"]) -> Float[Tensor, "*b v"]:
    """softmax(Σ w_i log p_i): the weighted average of the members' logits (a logarithmic pool)."""
    return log_normalize(weighted_log_probs(log_p, weights))


def weighted_log_probs(log_p: Float[Tensor, "n *b v"], weights: Float[Tensor, " n"]) -> Float[Tensor, "*b v"]:
    """Σ w_i log p_i, not normalised; -inf where a member with any weight has it."""
    scores = torch.zeros_like(log_p[0])
    for member, weight in zip(log_p, weights.tolist(), strict=True):
        if weight:  # a member without weight excludes nothing, and 0 * -inf would be NaN
            scores = scores + weight * member
    return scores


def prob_mean(log_p: Float[Tensor, "n *b v"], weights: Float[Tensor, " n"]) -> Float[Tensor, "*b v"]:
    """Σ w_i p_i / Σ w_i: the weighted average of the members' probabilities (a linear pool)."""
    shape = (-1,) + (1,) * (log_p.ndim - 1)
    return log_normalize((log_p + weights.log().reshape(shape)).logsumexp(0))


def total_variation(log_p: Float[Tensor, "*b v"], log_q: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """TV(p, q) = ½ Σ |p - q|."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
