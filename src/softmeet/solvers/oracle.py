"""Moments of a relaxed I-projection at a point and the Hessian of its dual, by one pass over all heads.

    H = Cov_p([α_1 Q_1 | … | α_n Q_n]) + blockdiag(α_i γ_i Cov_{r_i}(Q_i))

Symbols are those of :mod:`softmeet.solvers.projection`. A block of two different members depends on p alone; a member's
own block sums over the masses α_i² p + α_i γ_i r_i. Second moments are taken about the heads' centres, and the outer
products of the means, known after the pass, are subtracted. If those are most of a block, as for one-hot
distributions, digits would be lost, and the row is read again, each distribution about its own mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from softmeet.solvers.linalg import cached
from softmeet.solvers.projection import Projection

# The largest share of a block's trace that may be subtracted again: above it 1.5 digits would be lost.
_DOMINANT = 0.97


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of the heads at a dual point ν of a :class:`Projection`, for B rows, in fp64.

    Attributes:
        joint: Q_iᵀp of every member, side by side, (B, D): the means of the whitened heads' rows under the answer p.
        own: Q_iᵀr_i of every member, side by side, (B, D): the means under the corrected members r_i.
        H: the Hessian of the dual function, (B, D, D); the module docstring has the formula.
    """

    joint: Float[Tensor, "B D"]
    own: Float[Tensor, "B D"]
    H: Float[Tensor, "B D D"]


def moments(problem: Projection, log_p: Float[Tensor, "B v"], log_r: Float[Tensor, "B n v"]) -> Moments:
    """Compute the means of the whitened heads' rows under p and r_i and the dual's Hessian, by one pass over all heads.

    Products run in the heads' dtype. Rows in which subtracting the means' products would lose digits, as they are more
    than 97 % of a block's trace, are read a second time.

    Args:
        problem: the batch of relaxed I-projections.
        log_p, log_r: log-probabilities of the answer p and of the corrected members r_i at the dual point, in nats, as
            :class:`~softmeet.solvers.dual.DualState` has them.
    """
    p, r = log_p.exp(), log_r.exp()
    places, D = problem.places, len(problem.scale)
    joint, own, H = p.new_zeros(len(p), D), p.new_zeros(len(p), D), p.new_zeros(len(p), D, D)
    for tokens in _blocks(problem):
        rows = _rows(problem, tokens)
        size = cached(2 * (tokens.stop - tokens.start) * max(problem.widths), p.device)
        slopes = [1.0 if h.slope is None else h.slope[:, tokens] for h in problem.heads]
        for i, (Q, here, slope) in enumerate(zip(rows, places, slopes, strict=True)):
            of_p, of_r = slope * p[:, tokens], slope * r[:, i, tokens]
            joint[:, here] += of_p.to(Q.dtype) @ Q
            own[:, here] += of_r.to(Q.dtype) @ Q
            for j in range(i + 1):
                mass = problem.alpha[i] * problem.alpha[j] * of_p
                mass = mass + problem.alpha[i] * problem.gamma[i] * of_r if j == i else mass
                weights = (slopes[j] * mass).to(Q.dtype)[..., None]
                for k in range(0, len(p), size):
                    H[k : k + size, here, places[j]] += torch.matmul(Q.T, rows[j] * weights[k : k + size])
    for h, here in zip(problem.heads, places, strict=True):
        h.rows_read[h.at] += h.head.v
        H[:, : here.start, here] = H[:, here, : here.start].transpose(1, 2)
    dominated = _centre(problem, H, joint, own)
    for k in dominated.nonzero().flatten().tolist():
        H[k] = _about_means(problem, k, (joint[k], own[k]), (p[k], r[k]))
    return Moments(joint, own, H)


def _blocks(problem: Projection) -> list[slice]:
    """Return slices that cover all tokens, each so small that a head's rows of it stay in the processor's cache."""
    v = problem.log_q.shape[-1]
    size = cached(max(h.head.d for h in problem.heads), problem.log_q.device, 64)
    return [slice(start, min(start + size, v)) for start in range(0, v, size)]


def curved(
    problem: Projection, p: Float[Tensor, "B v"], r: Float[Tensor, "B n v"], y: Float[Tensor, "B n v"]
) -> Float[Tensor, "B D"]:
    """Return H d, (B, D), for a direction d of the dual variables, by one pass over all heads.

    H is the Hessian of the dual function at the point of ``p`` and ``r``; it is not formed.

    Args:
        problem: the batch of relaxed I-projections.
        p, r: the answer and the corrected members at the point, as probabilities.
        y: the scores Q_i d_i of the direction, (B, n, v); :meth:`Projection.scores` computes them.
    """
    x = problem.tilt(y)
    joint = p * (x - (p * x).sum(-1, keepdim=True))
    own = r * (y - (r * y).sum(-1, keepdim=True))
    return problem.moments(joint[:, None] + problem.gamma[:, None] * own)


def _centre(
    problem: Projection, H: Float[Tensor, "B D D"], joint: Float[Tensor, "B D"], own: Float[Tensor, "B D"]
) -> Bool[Tensor, " B"]:
    """Subtract the outer products of the means from the second moments ``H``, in place, which makes them covariances.

    Return the mask of the rows in which the products were more than 97 % of the trace of some member's block, so that
    digits are lost. ``joint`` and ``own`` are the means of :class:`Moments`.
    """
    dominated = torch.zeros(len(H), dtype=torch.bool, device=H.device)
    scaled = problem.scale * joint
    for here, alpha, gamma in zip(problem.places, problem.alpha, problem.gamma, strict=True):
        block, mean = H[:, here, here], own[:, here]
        scatter = (scaled[:, here] ** 2).sum(-1) + alpha * gamma * (mean**2).sum(-1)
        dominated |= scatter > _DOMINANT * block.diagonal(dim1=-2, dim2=-1).sum(-1)
        block -= alpha * gamma * mean[:, :, None] * mean[:, None, :]
    H -= scaled[:, :, None] * scaled[:, None, :]
    return dominated


def _about_means(
    problem: Projection,
    k: int,
    means: tuple[Float[Tensor, " D"], Float[Tensor, " D"]],
    masses: tuple[Float[Tensor, " v"], Float[Tensor, "n v"]],
) -> Float[Tensor, "D D"]:
    """Compute H of row ``k`` with each distribution about its own mean, by another pass over all heads for that row.

    Args:
        problem: the batch of relaxed I-projections.
        k: the index of the row.
        means: (the means under p, the means under r_i), as in :class:`Moments`.
        masses: (p, r), as probabilities.
    """
    (of_p, of_r), (p, r) = means, masses
    H = torch.zeros(len(of_p), len(of_p), dtype=p.dtype, device=p.device)
    for tokens in _blocks(problem):
        joint = []
        for i, (Q, here) in enumerate(zip(_rows(problem, tokens), problem.places, strict=True)):
            alpha, gamma, slope = problem.alpha[i], problem.gamma[i], problem.heads[i].slope
            own = Q if slope is None else Q * slope[k, tokens, None].to(Q.dtype)
            joint.append(alpha * (own - of_p[here].to(Q.dtype)))
            own = own - of_r[here].to(Q.dtype)
            H[here, here] += alpha * gamma * (own.T @ (own * r[i, tokens, None].to(Q.dtype)))
        x = torch.cat(joint, dim=-1)
        H += x.T @ (x * p[tokens, None].to(x.dtype))
    for h in problem.heads:
        h.rows_read[h.at[k]] += h.head.v
    return H


def _rows(problem: Projection, tokens: slice) -> list[Float[Tensor, "b _"]]:
    """Return the rows ``tokens`` of every Q_i before any slope, on the device of p; 0 past a head's last row."""
    dtype = torch.float64 if torch.float64 in [h.dtype for h in problem.heads] else torch.float32
    found = []
    for h in problem.heads:
        W, white = h.block(tokens), h.whitening
        Q = (W.to(h.device) - white.center.to(h.dtype)) @ white.factor.to(h.dtype)
        found.append(pad(Q, (0, 0, 0, tokens.stop - tokens.start - len(W))).to(dtype))
    return found
