"""Moments of a relaxed I-projection at a point, and the Hessian of its dual, by one read of every head.

    H = Cov_p([α_1 Q_1 | … | α_n Q_n]) + blockdiag(α_i γ_i Cov_{r_i}(Q_i))

Between two members only p counts. A member's own block takes one product, with the masses α_i² p + α_i γ_i r_i together
about their common mean; the scatter between the means of p and r_i, which is known, comes off. Where that is most of
the block, as for one-hot distributions that disagree, p and r_i are taken each about its own mean, to save digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from softmeet.heads import WhitenedHead
from softmeet.solvers.projection import Projection
from softmeet.solvers.sweep import block_size

# The most of a block's trace that may come off again: past it more than a digit would be lost.
_DOMINANT = 0.9
# Elements of a block's rows of all heads, once for each row of the batch that goes together.
_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Moments:
    """``joint`` and ``own``: the means of Q_i under p and r_i, members side by side; ``H``: the Hessian. fp64."""

    joint: Float[Tensor, "B D"]
    own: Float[Tensor, "B D"]
    H: Float[Tensor, "B D D"]


def moments(
    problem: Projection,
    log_p: Float[Tensor, "B v"],
    log_r: Float[Tensor, "B n v"],
    joint: Float[Tensor, "B D"],
    own: Float[Tensor, "B D"],
) -> Moments:
    """First and second moments in whitened coordinates; products run in the heads' dtype.

    Args:
        problem: the projection.
        log_p, log_r: the distributions at the point, in nats.
        joint, own: the means of Q_i under p and under r_i or points near them, about which second moments are taken.
    """
    widths = [h.rank for h in problem.heads]
    H = joint.new_zeros(len(joint), sum(widths), sum(widths))
    p, r = log_p.exp(), log_r.exp()
    prices = [(alpha**2, alpha * gamma) for alpha, gamma in zip(problem.alpha, problem.gamma, strict=True)]
    places = list(_places(widths))
    centres = [(a * joint[:, i] + b * own[:, i]) / (a + b) for (a, b), i in zip(prices, places, strict=True)]
    off, of_r = torch.zeros_like(joint), torch.zeros_like(own)
    together = max(1, _ELEMENTS // max(1, block_size(problem) * sum(widths)))
    for tokens in _blocks(problem):
        white = [_rows(h, tokens) for h in problem.heads]
        for k in (slice(start, start + together) for start in range(0, len(H), together)):
            light: list[Float[Tensor, "B b _"]] = []
            for i, (h, here) in enumerate(zip(problem.heads, places, strict=True)):
                Q, (a, b) = _sloped(h, white[i], k, tokens), prices[i]
                x = Q - centres[i][k].to(Q.dtype)[:, None]
                mass, of_member = a * p[k, tokens] + b * r[k, i, tokens], r[k, i, None, tokens].to(Q.dtype)
                H[k, here, here] += x.transpose(1, 2) @ (x * mass.to(Q.dtype)[..., None])
                if i:
                    H[k, here, : here.start] += problem.alpha[i] * (x.transpose(1, 2) @ torch.cat(light, dim=-1))
                own_light = (problem.alpha[i] * p[k, tokens]).to(Q.dtype)
                light.append((Q - joint[k, here].to(Q.dtype)[:, None]) * own_light[..., None])
                off[k, here] += light[i].sum(1)
                of_r[k, here] += (of_member @ x).squeeze(1)
    # Both are still α_i times, and about the centres.
    of_p = torch.cat([joint[:, i] + off[:, i] / alpha for alpha, i in zip(problem.alpha, places, strict=True)], dim=-1)
    of_r = of_r + torch.cat(centres, dim=-1)
    for i, here in enumerate(places):
        from_centre = problem.alpha[i] * (of_p[:, here] - centres[i])
        H[:, here, : here.start] -= from_centre[:, :, None] * off[:, None, : here.start]
        H[:, : here.start, here] = H[:, here, : here.start].transpose(1, 2)
        own_means = (of_p[:, here], of_r[:, here])
        _take_off(problem, i, H[:, here, here], prices[i], centres[i], own_means, (p, r[:, i]))
    for h in problem.heads:
        h.rows_read += h.head.v
    return Moments(of_p, of_r, H)


def _take_off(
    problem: Projection,
    i: int,
    block: Float[Tensor, "B d d"],
    prices: tuple[float, float],
    centre: Float[Tensor, "B d"],
    means: tuple[Float[Tensor, "B d"], Float[Tensor, "B d"]],
    masses: tuple[Float[Tensor, "B v"], Float[Tensor, "B v"]],
) -> None:
    """Take the scatter of the means about the centre off a member's own blocks, or make them anew, about the means."""
    scatter = torch.zeros_like(block)
    for price, mean in zip(prices, means, strict=True):
        scatter += price * (mean - centre)[:, :, None] * (mean - centre)[:, None, :]
    anew = _trace(scatter) > _DOMINANT * _trace(block)
    block -= scatter
    h = problem.heads[i]
    for k in anew.nonzero().flatten().tolist():
        block[k] = 0.0
        for tokens in _blocks(problem):
            Q = _sloped(h, _rows(h, tokens), slice(k, k + 1), tokens)[0]
            for price, mean, mass in zip(prices, means, masses, strict=True):
                x = Q - mean[k].to(Q.dtype)
                block[k] += price * (x.T @ (x * mass[k, tokens].to(Q.dtype)[:, None]))
        h.rows_read[k] += h.head.v


def _blocks(problem: Projection) -> Iterator[slice]:
    size, v = block_size(problem), problem.log_q.shape[-1]
    return (slice(start, min(start + size, v)) for start in range(0, v, size))


def _rows(h: WhitenedHead, tokens: slice) -> Float[Tensor, "b rank"]:
    """Rows of Q_i before any slope, where the distributions are; 0 past the head's last row."""
    W, white = h.block(tokens), h.whitening
    found = (W.to(h.device) - white.center.to(h.dtype)) @ white.factor.to(h.dtype)
    return pad(found, (0, 0, 0, tokens.stop - tokens.start - len(W)))


def _sloped(h: WhitenedHead, Q: Float[Tensor, "b rank"], k: slice, tokens: slice) -> Float[Tensor, "_ b rank"]:
    """Q_i of some rows of the batch; one for all without a soft-cap."""
    return Q[None] if h.slope is None else Q * h.slope[k, tokens, None].to(Q.dtype)


def _trace(H: Float[Tensor, "B d d"]) -> Float[Tensor, " B"]:
    return H.diagonal(dim1=-2, dim2=-1).sum(-1)


def _places(widths: list[int]) -> Iterator[slice]:
    start = 0
    for d in widths:
        yield slice(start, start + d)
        start += d
