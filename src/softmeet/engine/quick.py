"""Averages in generation at the members' own price: a few passes over the vocabulary, in the logits' own dtype.

What a report needs (each member's log-probabilities in fp64, objectives, divergences) is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear, pad

from softmeet.errors import NonFiniteError
from softmeet.members.opaque import Head, OpaqueHead
from softmeet.rules.gates import that_closes
from softmeet.rules.settings import Settings
from softmeet.simplex import capped

# The most numbers that all members' logits may have at once: 256 MiB in fp32.
_ELEMENTS = 1 << 26


def may(settings: Settings, rows: int, v: int) -> bool:
    """Return whether a rule that is an average need not be solved for, unless :func:`average` finds a row that has to.

    It has to if a gate may close, a member has weight 0, heads are read, or the rows are so many that they would have
    to be cut, as of a long prompt whose tokens are all scored.
    """
    weights = weights_of(settings)
    return that_closes(settings.gate) is None and all(weights) and rows * v * len(weights) <= _ELEMENTS


def native_logits(head: Head, hidden: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
    """Return a head's logits in fp32 or fp64, by a product in its own dtype, as the model computes them.

    In half precision that rounds logits to it, and is several times as fast on a CPU as ``head.logits``, which
    multiplies in fp32.

    Example:
        >>> from softmeet import SoftmaxHead
        >>> native_logits(SoftmaxHead(torch.ones(2, 1).bfloat16()), torch.ones(1, 1, dtype=torch.bfloat16))
        tensor([[1., 1.]])
    """
    if isinstance(head, OpaqueHead) or head.dtype != hidden.dtype or head.dtype.itemsize > 2:
        return head.logits(hidden)
    bias = None if head.bias is None else head.bias.to(head.dtype)
    return capped(linear(hidden, head.weight.detach(), bias).float(), head.scale, head.soft_cap)


def of_drawn(
    heads: Sequence[Head],
    states: Sequence[Float[Tensor, "1 _"]],
    drawn: Sequence[int],
    support: Bool[Tensor, " v"] | None,
    v: int,
) -> Float[Tensor, "B v"]:
    """Return the log-probabilities in nats of each text's drawn member.

    Args:
        heads: the members' output layers.
        states: the last hidden state of each of B texts, (1, d_i), by the member i that was drawn for it.
        drawn: the numbers of these members.
        support: (v,), True for the ids that can have a probability above 0; None for all.
        v: the number of ids.

    Raises:
        NonFiniteError: if a member's logits hold NaN or +inf.
    """
    place, found = heads[0].device, dict[int, Tensor]()
    for i in {*drawn}:
        head, rows = heads[i], [k for k, member in enumerate(drawn) if member == i]
        logits = native_logits(head, torch.cat([states[k] for k in rows]).to(head.device)).to(place)
        logits = logits if head.v == v else pad(logits, (0, v - head.v), value=-torch.inf)
        logits = logits if support is None else logits.masked_fill(~support, -torch.inf)
        found |= zip(rows, logits.log_softmax(-1), strict=True)
    told = torch.stack([found[k] for k in range(len(drawn))])
    if not bool(told.amax(-1).isfinite().all()):
        raise NonFiniteError("expected finite logits, or -inf for an impossible token, of every member that is drawn")
    return told


def weights_of(settings: Settings) -> tuple[float, ...]:
    """Return the members' weights of settings from :meth:`Settings.for_members`."""
    assert isinstance(settings.weights, tuple), "settings for members have a weight for each"
    return settings.weights


def average(
    logits: Sequence[Float[Tensor, "B _"]], settings: Settings, support: Bool[Tensor, " v"] | None, v: int
) -> Float[Tensor, "B v"] | None:
    """Return an average's log-probabilities in nats, in the dtype of the logits.

    They are None where the rule has no quick form, or a row is not finite: solving then finds the answer, or says what
    is wrong.

    Args:
        logits: each member's, fp32 or fp64; a head may have fewer than v rows. The first one's device is the result's.
        settings: the rule and all other settings, from :meth:`Settings.for_members`; :func:`may` is true of them.
        support: (v,), True for the ids that can have a probability above 0; None for all.
        v: the number of ids.
    """
    place = logits[0].device
    own = [
        (one if one.shape[-1] == v else pad(one, (0, v - one.shape[-1]), value=-torch.inf)).to(place) for one in logits
    ]
    scores = settings.rule.quick(own, weights_of(settings))
    if scores is None:
        return None
    if support is not None:
        scores.masked_fill_(~support, -torch.inf)
    if settings.rule_temperature != 1:
        scores.div_(settings.rule_temperature)
    total = scores.logsumexp(-1, keepdim=True)
    return scores.sub_(total) if bool(total.isfinite().all()) else None
