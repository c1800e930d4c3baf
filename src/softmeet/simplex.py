"""Functions of distributions over v tokens, given as log-probabilities in nats of any floating dtype.

A probability of 0 is -inf, and 0 log 0 = 0. The last dimension has the tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def log_normalize(scores: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """Return the log-probabilities of softmax(scores), in nats: scores - logsumexp(scores); NaN if all are -inf.

    Example:
        >>> log_normalize(torch.tensor([0.0, 0.0, -torch.inf])).exp()
        tensor([0.5000, 0.5000, 0.0000])
    """
    return scores - scores.logsumexp(-1, keepdim=True)


def entropy(log_p: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """Return the entropy H(p) = -Σ p log p, in nats, from log p.

    Example:
        >>> entropy(torch.tensor([0.5, 0.5, 0.0]).log())
        tensor(0.6931)
    """
    p: Tensor = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def kl(log_p: Float[Tensor, "*b v"], log_q: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """Return KL(p‖q) = Σ p (log p - log q), in nats; +inf if p has mass on a token to which q gives none.

    Example:
        >>> p, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
        >>> kl(p, q), kl(q, p)
        (tensor(0.6931), tensor(inf))
    """
    p = log_p.exp()  # may underflow to 0 where log_p is finite
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return terms.sum(-1).clamp_min(0.0)


def logit_mean(log_p: Float[Tensor, "n *b v"], weights: Float[Tensor, " n"]) -> Float[Tensor, "*b v"]:
    """Return softmax(Σ_i w_i log p_i), the logarithmic pool of n members: the weighted average of their logits.

    Args:
        log_p: the members' log-probabilities log p_i, in nats.
        weights: w_i, of any sum and sign, at least one not 0.

    Returns:
        The pool's log-probabilities, in nats; -inf for a token to which a member of nonzero weight, be it negative,
        gives probability 0, NaN for a row in which that is so for every token.

    Example:
        >>> members = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> logit_mean(members, torch.tensor([0.5, 0.5])).exp()
        tensor([0.7500, 0.2500])
    """
    return log_normalize(weighted_log_probs(log_p, weights))


def weighted_log_probs(log_p: Float[Tensor, "n *b v"], weights: Float[Tensor, " n"]) -> Float[Tensor, "*b v"]:
    """Return Σ_i w_i log p_i of n members, in nats, not normalised; -inf if a member of nonzero weight has -inf.

    Example:
        >>> weighted_log_probs(torch.tensor([[0.0, -2.0], [0.0, -torch.inf]]), torch.tensor([1.0, 0.0]))
        tensor([ 0., -2.])
        >>> weighted_log_probs(torch.tensor([[0.0, -2.0], [-1.0, -torch.inf]]), torch.tensor([2.0, -1.0]))
        tensor([1., -inf])
    """
    scores = torch.zeros_like(log_p[0])
    for member, weight in zip(log_p, weights.tolist(), strict=True):
        if weight < 0:  # what this member excludes is excluded, too, and would be +inf
            member = torch.where(member.isneginf(), torch.inf, member)
        if weight:  # a member without weight excludes nothing, and 0 * -inf would be NaN
            scores = scores + weight * member
    return scores


def prob_mean(log_p: Float[Tensor, "n *b v"], weights: Float[Tensor, " n"]) -> Float[Tensor, "*b v"]:
    """Return Σ_i w_i p_i / Σ_i w_i, the linear pool of n members: the weighted average of their probabilities.

    Args:
        log_p: the members' log-probabilities log p_i, in nats.
        weights: w_i, of any sum; none negative, at least one positive.

    Returns:
        The pool's log-probabilities, in nats.

    Example:
        >>> members = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> prob_mean(members, torch.tensor([0.5, 0.5])).exp()
        tensor([0.7000, 0.3000])
    """
    shape = (-1,) + (1,) * (log_p.ndim - 1)
    return log_normalize((log_p + weights.log().reshape(shape)).logsumexp(0))


def total_variation(log_p: Float[Tensor, "*b v"], log_q: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """Return the total variation distance ½ Σ |p - q|, from 0 to 1, from log p and log q.

    Example:
        >>> total_variation(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log())
        tensor(0.2500)
    """
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def capped(scores: Float[Tensor, "*b v"], scale: float, soft_cap: float | None) -> Float[Tensor, "*b v"]:
    """Return logits of a head's scores: the scores times ``scale`` or, with a soft-cap c, c·tanh(scale · scores / c).

    Example:
        >>> capped(torch.tensor([1.0, 4.0]), 2.0, None), capped(torch.tensor([1.0, 4.0]), 1.0, 2.0)
        (tensor([2., 8.]), tensor([0.9242, 1.9281]))
    """
    # A product with 1 would cost a pass over the vocabulary for every position.
    out = scores if scale == 1 else scores * scale
    return out if soft_cap is None else soft_cap * torch.tanh(out / soft_cap)
