"""The curvature that a dual's many light tokens bring, taken to be that of tokens drawn evenly from the vocabulary.

Found once for some heads, in the heads' own coordinates, all members side by side: the covariance C of rows of W_i, and
with trusts the inverse of

    diag(α) C diag(α) + blockdiag(α_i γ_i C_ii)

within the directions that the heads have (:class:`softmeet.solvers.projection.Projection`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.solvers.projection import Projection

# Tokens drawn: at least so many, and so many times the columns.
_LEAST, _TIMES = 8192, 4
# What is added to the diagonal before it is inverted, as a share of its mean: evenly drawn tokens miss directions.
_RIDGE = 1e-3


@dataclass(eq=False)
class Tail:
    """``mean`` and ``covariance`` of rows of [W_1 - c_1 | … | W_n - c_n], fp32; inverses for the trusts asked for."""

    mean: Float[Tensor, " D"]
    covariance: Float[Tensor, "D D"]
    _inverses: dict[tuple[float, ...], Tensor] = field(default_factory=dict)

    def inverse(self, problem: Projection) -> Float[Tensor, "D D"]:
        """Of the curvature at one unit of mass of p and of every r_i, fp32."""
        if problem.trust not in self._inverses:
            F = torch.block_diag(*(h.whitening.factor for h in problem.heads))
            C = F.T @ self.covariance.double() @ F
            scale = problem.scale.double()
            H = C * scale[:, None] * scale
            for here, alpha, gamma in zip(problem.places, problem.alpha.tolist(), problem.gamma.tolist(), strict=True):
                H[here, here] += alpha * gamma * C[here, here]
            H.diagonal().add_(_RIDGE * H.diagonal().mean())
            self._inverses[problem.trust] = (F @ torch.cholesky_solve(F.T, torch.linalg.cholesky(H))).float()
        return self._inverses[problem.trust]


def tail_of(problem: Projection) -> Tail:
    """Find what is kept with the first head, or make it."""
    first = problem.heads[0].head
    key = tuple(h.whitening for h in problem.heads)
    for known, tail in first.tails:
        if len(known) == len(key) and all(a is b for a, b in zip(known, key, strict=True)):
            return tail  # type: ignore[return-value]
    v = problem.log_q.shape[-1]
    count = min(v, max(_LEAST, _TIMES * problem.read))
    tokens = (torch.arange(count, dtype=torch.float64) * (v / count)).long()
    X = torch.cat([h.even_rows(tokens) for h in problem.heads], dim=-1)
    mean = X.mean(0)
    X -= mean
    tail = Tail(mean, X.T @ X / count)
    # Views of one row each, as of free directions, would fill it.
    first.tails[:] = [*first.tails[-3:], (key, tail)]
    return tail
