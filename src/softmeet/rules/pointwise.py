"""Rules of published methods that are no average of fixed weights: what they choose depends on how members agree.

p̂_i are the members' distributions and w_i their weights. A member of weight 0 takes no part.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from softmeet.rules.pools import ClosedForm
from softmeet.rules.problem import Problem
from softmeet.simplex import entropy, log_normalize, log_power_means

# What keeps the weight of a member that is certain finite.
_CERTAIN = 1e-12


class PointwiseMax(ClosedForm):
    """p ∝ max_i p̂_i: a token is likely if any member finds it so.

    The union of model arithmetic (Dekoninck et al., arXiv:2311.14479), which takes the maximum of the members' own
    log-probabilities; weights say only which members take part.
    """

    name = "pointwise-max"
    summary = "the pointwise maximum of the members' probabilities, renormalised"
    reference = "https://arxiv.org/abs/2311.14479"

    def solve(self, problem: Problem) -> Tensor:
        """Return the maximum on the support, normalised, for every row."""
        return problem.restricted(log_normalize(self.aggregate(problem.log_p, problem.weights)))

    def aggregate(self, log_p: Float[Tensor, n * b], weights: Float[Tensor, " n"]) -> Float[Tensor, "*b"]:
        """Return the largest log p_i of the members of positive weight."""
        return log_p[weights > 0].amax(0)


class PointwiseMin(ClosedForm):
    """p ∝ min_i p̂_i: a token is likely only if all members find it so.

    The intersection of model arithmetic (Dekoninck et al., arXiv:2311.14479); weights say only which members take part.
    """

    name = "pointwise-min"
    summary = "the pointwise minimum of the members' probabilities, renormalised"
    reference = "https://arxiv.org/abs/2311.14479"

    def solve(self, problem: Problem) -> Tensor:
        """Return the minimum on the support, normalised, for every row.

        Raises:
            DisjointSupportError: if a row has no token left.
        """
        return problem.restricted(log_normalize(self.aggregate(problem.log_p, problem.weights)))

    def aggregate(self, log_p: Float[Tensor, n * b], weights: Float[Tensor, " n"]) -> Float[Tensor, "*b"]:
        """Return the smallest log p_i of the members of positive weight."""
        return log_p[weights > 0].amin(0)


class Drop(ClosedForm):
    """p = Σ w_i p̂_i / Σ w_i over the members whose likeliest token is among the ``top`` likeliest of another one.

    The ``drop`` of EVA (Xu et al., arXiv:2404.09492), which leaves out a member that stands alone; where every member
    does, none is left out. Of tokens of one probability the first counts as likelier.
    """

    top: int = Field(default=5, ge=1)
    """Among how many of another member's likeliest tokens a member's own has to be."""

    name = "drop"
    summary = "prob-mean without members whose likeliest token no other expects"
    reference = "https://arxiv.org/abs/2404.09492"

    def solve(self, problem: Problem) -> Tensor:
        """Return the mean of the members that are kept, on the support, for every row."""
        log_p = _weighted(problem)
        weights = problem.weights[problem.weights > 0, None] * self._kept(log_p)
        return problem.restricted(log_normalize(log_power_means(log_p, weights, 1.0)))

    def _kept(self, log_p: Float[Tensor, "n B v"]) -> Bool[Tensor, "n B"]:
        best = log_p.argmax(-1)
        # [j, i, b]: how many tokens member j finds likelier than the likeliest of member i.
        own = torch.stack([one.gather(-1, best.T).T for one in log_p])
        before = torch.arange(log_p.shape[-1], device=log_p.device) < best[..., None]
        ahead = torch.stack([
            ((one > value[..., None]) | ((one == value[..., None]) & before)).sum(-1)
            for one, value in zip(log_p, own, strict=True)
        ])  # fmt: skip
        others = ~torch.eye(len(log_p), dtype=torch.bool, device=log_p.device)[..., None]
        kept = ((ahead < self.top) & others).any(0)
        return kept | ~kept.any(0)


class Core(ClosedForm):
    """p ∝ Σ c_i t_i p̂_i: members count more that agree with the others and are certain, and tokens that they agree on.

    CoRE (Zeng et al., arXiv:2510.13855, with its exponential filter): with p̄ = Σ w_i p̂_i and d_i = |p̂_i - p̄| at each
    token, s_i = (e^{-2 d_i} - e^{-2}) / (1 - e^{-2}); t_i is s_i divided by its mean over the tokens, and c_i ∝ w_i
    Σ s_i / H(p̂_i), H the entropy. What the authors' code does besides is in the guide on reproducing methods.
    """

    main: bool = Field(default=False)
    """Whether the first member has at least half of the weight, and no filter, as the main one of the authors' code."""

    name = "core"
    summary = "a mean of probabilities by how consistent members and tokens are"
    reference = "https://arxiv.org/abs/2510.13855"

    def solve(self, problem: Problem) -> Tensor:
        """Return the weighted mean on the support, normalised, for every row."""
        log_p, weights = _weighted(problem), problem.weights[problem.weights > 0, None]
        probs = log_p.exp()
        mean = (weights[..., None] * probs).sum(0) / weights.sum()
        filtered = (torch.exp(-2 * (probs - mean).abs()) - torch.e**-2) / (1 - torch.e**-2)
        shares = weights * filtered.sum(-1) / (entropy(log_p) + _CERTAIN)
        filtered /= filtered.mean(-1, keepdim=True)
        if self.main:
            shares = torch.cat((torch.maximum(shares[:1], shares[1:].sum(0, keepdim=True)), shares[1:]))
            filtered[0] = 1.0
        return problem.restricted(log_normalize((log_p + filtered.log() + shares.log()[..., None]).logsumexp(0)))


def _weighted(problem: Problem) -> Float[Tensor, "n B v"]:
    """Return the log-probabilities of the members of positive weight."""
    return problem.log_p[problem.weights > 0]
