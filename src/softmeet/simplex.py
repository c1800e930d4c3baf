"""Functions of distributions over v tokens, given as log-probabilities in nats of any floating dtype.

A probability of 0 is -inf, and 0 log 0 = 0. The last dimension has the tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Below this order log Σ w p^order of a power mean is near 0, and its rounding, which is divided by the order, counts.
_SMALL_ORDER = 0.01


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


def weighted_log_probs(log_p: Float[Tensor, "n *b v"], weights: Float[Tensor, " n *w"]) -> Float[Tensor, "*b v"]:
    """Return Σ_i w_i log p_i of n members, in nats, not normalised; -inf if a member of nonzero weight has -inf.

    Args:
        log_p: the members' log-probabilities log p_i, or logits.
        weights: w_i, (n,), or for every row of the batch, (n, *b); the sum is differentiable in them.

    Example:
        >>> weighted_log_probs(torch.tensor([[0.0, -2.0], [0.0, -torch.inf]]), torch.tensor([1.0, 0.0]))
        tensor([ 0., -2.])
        >>> weighted_log_probs(torch.tensor([[0.0, -2.0], [-1.0, -torch.inf]]), torch.tensor([2.0, -1.0]))
        tensor([1., -inf])
    """
    each = _of_each(weights, log_p)
    impossible: Tensor = log_p.isneginf()
    if any_impossible := bool(impossible.any()):  # 0 * -inf would be NaN, and so would be derivatives
        log_p = log_p.masked_fill(impossible, 0.0)
    scores = each[0] * log_p[0]
    for weight, own in zip(each[1:], log_p[1:], strict=True):
        scores = torch.addcmul(scores, weight, own)
    return scores.masked_fill((impossible & (each != 0)).any(0), -torch.inf) if any_impossible else scores


def _of_each(weights: Float[Tensor, " n *w"], log_p: Float[Tensor, "n *b v"]) -> Float[Tensor, "n ..."]:
    """Return weights, (n,) or (n, *b), in the dtype of log-probabilities and in a shape that multiplies them."""
    shape = weights.shape[1:] or (1,) * (log_p.ndim - 2)
    return weights.to(log_p).reshape(len(weights), *shape, 1)


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
    return log_normalize(log_power_means(log_p, weights, 1.0))


def power_mean(log_p: Float[Tensor, "n *b v"], weights: Float[Tensor, " n"], order: float) -> Float[Tensor, "*b v"]:
    """Return the power mean (Σ_i w_i p_i^order)^(1/order) of n members, normalised over the tokens.

    Order 1 is :func:`prob_mean`. Order 0 is :func:`logit_mean`, with weights that sum to 1: the limit.

    Args:
        log_p: the members' log-probabilities log p_i, in nats.
        weights: w_i, of any sum, by which they are divided; none negative, at least one positive.
        order: from 0 to 1.

    Returns:
        The mean's log-probabilities, in nats. A member's probability of 0 adds nothing to the mean of a token; at order
        0 it makes the mean 0 (-inf), unless the member's weight is 0, and a row in which no token is left is NaN.

    Example:
        >>> members = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> power_mean(members, torch.tensor([0.5, 0.5]), 0.5).exp()
        tensor([0.7236, 0.2764])
    """
    return log_normalize(log_power_means(log_p, weights, order))


def log_power_means(
    log_p: Float[Tensor, "n *b v"], weights: Float[Tensor, " n *w"], order: float
) -> Float[Tensor, "*b v"]:
    """Return log (Σ_i w_i p_i^order)^(1/order) of n members, in nats, not normalised; w_i are divided by their sum.

    Every average of the package is this one: of order 1 that of probabilities, and of order 0, the limit, that of
    logits, whose weights :func:`weighted_log_probs` takes as they are.

    Rounding is that of ``log_p`` itself, at small orders, too; but at a token that a member of weight excludes it is
    greater by the factor 1 / order. An order below some 10⁻¹⁵⁴ (10⁻¹⁹ for float32) counts as 0.

    Args:
        log_p: the members' log-probabilities log p_i, in nats.
        weights: w_i, none negative, (n,), or for every row of the batch, (n, *b); the means are differentiable in them.
        order: from 0 to 1.

    Example:
        >>> log_power_means(torch.tensor([[0.0, -2.0], [-1.0, -torch.inf]]), torch.tensor([1.0, 1.0]), 0.5)
        tensor([-0.4381, -3.3863])
    """
    shares = weights / weights.sum(0)
    if order < torch.finfo(log_p.dtype).tiny ** 0.5:  # differs from order 0 by nothing, and products would underflow
        return weighted_log_probs(log_p, shares)
    logs = _of_each(shares.log(), log_p)
    means = torch.add(logs, log_p, alpha=order).logsumexp(0) / order
    if order >= _SMALL_ORDER:
        return means
    top = log_p.amax(0)
    x = (_of_each(shares, log_p) * torch.expm1(order * (log_p - top))).sum(0)
    # The mean is top + log(1 + x) / order. Near -1, where the largest are members of little weight, 1 + x is rounded.
    return torch.where(x > -0.5, top + x.log1p() / order, means)


def power_mean_slopes(
    log_p: Float[Tensor, "n *b v"], weights: Float[Tensor, " n"], order: float, means: Float[Tensor, "*b v"]
) -> tuple[Float[Tensor, "n *b v"], Float[Tensor, "*b v"]]:
    """Return the derivatives of power means in the members' weights and in the order.

    Args:
        log_p: the members' log-probabilities log p_i, in nats.
        weights: w_i, which sum to 1 unless the order is 0.
        order: from 0 to 1.
        means: what :func:`log_power_means`, or at order 0 :func:`weighted_log_probs`, makes of them.

    Returns:
        (∂ means / ∂ w_i as if each weight moved alone, (n, *b, v); ∂ means / ∂ order, zeros at order 0). Where a mean
        is 0, or a member that it does not need has probability 0, they are 0.

    Example:
        >>> log_p, weights = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([0.5, 0.5])
        >>> power_mean_slopes(log_p, weights, 1.0, log_power_means(log_p, weights, 1.0))[0]
        tensor([[0.7143, 1.6667],
                [1.2857, 0.3333]])
    """
    if not order:
        return log_p.masked_fill(log_p.isneginf(), 0.0), torch.zeros_like(means)
    beyond = (log_p - means).masked_fill(log_p.isneginf(), 0.0)
    slopes = (order * beyond).exp().masked_fill(log_p.isneginf(), 0.0) / order
    return slopes, (_of_each(weights, log_p) * slopes * beyond).sum(0)


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
