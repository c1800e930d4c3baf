"""What ``Rule.verify`` returns, an answer recomputed from what is stored of it, and a bound that rules use for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.rules.answer import Answer
from softmeet.simplex import log_normalize
from softmeet.solvers.base import Status

# In nats, the rounding of a divergence between equal distributions in fp64; the least and largest exponent t.
_ROUNDED, _EXPONENTS = 1e-12, (1e-3, 1e12)


@dataclass(frozen=True, eq=False)
class Recomputed:
    """The result of ``Rule.verify`` for B rows.

    Attributes:
        log_probs: log-probabilities in nats of the distribution recomputed from the answer's dual variables.
        gap: the gap that is certified, in nats; inf if no gap could be certified.
        status: :class:`softmeet.Status` as int.
    """

    log_probs: Float[Tensor, "B v"]
    gap: Float[Tensor, " B"]
    status: Int[Tensor, " B"]

    @staticmethod
    def of_rows(rows: Sequence[tuple[Float[Tensor, " v"], float, int]], like: Float[Tensor, "B v"]) -> Recomputed:
        """Stack the results of single rows.

        Args:
            rows: for each row (its log-probabilities in nats, its gap in nats, its :class:`softmeet.Status`).
            like: log-probabilities of the batch, for their dtype and device, and for the shape if there are no rows.
        """
        log_probs = torch.stack([log_p for log_p, _, _ in rows]) if rows else like
        gap = like.new_tensor([gap for _, gap, _ in rows])
        return Recomputed(log_probs, gap, gap.new_tensor([int(s) for _, _, s in rows]).long())

    @staticmethod
    def nothing(answer: Answer) -> Recomputed:
        """Return the result for a rule that cannot verify: NaN distributions, gap inf and status UNVERIFIED."""
        unknown = torch.full_like(answer.gap, torch.inf)
        status = torch.full_like(answer.status, int(Status.UNVERIFIED))
        return Recomputed(torch.full_like(answer.log_probs, torch.nan), unknown, status)


def reach(gap: Float[Tensor, " B"], claimed: Float[Tensor, "B v"], given: Float[Tensor, "B v"]) -> Float[Tensor, " B"]:
    """Bound KL(p°‖a), (B,), in nats, of distributions a that were given, by those of others p, which are near them.

    For any t > 0 it is at most KL(p°‖p) + (KL(p°‖p) + log Σ p (p/a)^t) / t, by the variational formula of Donsker and
    Varadhan. Two values of t are tried: 1, and the one that is best for small differences. Rounding counts as none.

    Args:
        gap: bounds on KL(p°‖p), in nats, for an unknown p°.
        claimed: log p, in nats.
        given: log a, in nats, up to a constant.
    """
    p, a = log_normalize(claimed), log_normalize(given)
    ratio = torch.where(p.isneginf(), 0.0, p - a)
    mass, likely = p.exp(), torch.where(p.exp() == 0, 0.0, ratio)
    mean = (mass * likely).sum(-1)
    spread = (mass * (likely - mean[:, None]) ** 2).sum(-1)
    best = torch.stack([torch.ones_like(gap), (2 * gap / spread).sqrt().nan_to_num(1.0).clamp(*_EXPONENTS)])
    further = ((gap + (p + best[..., None] * ratio).logsumexp(-1)) / best).amin(0)
    further = torch.where(gap > 0, further, mean)
    equal = mean.abs() + (2 * gap * spread).sqrt() <= _ROUNDED
    return torch.where(equal, gap, gap + further.nan_to_num(torch.inf, torch.inf))
