"""An approximate Newton direction of the dual f: heavy tokens have their curvature exactly, the tail that of an average
token.

Symbols are those of :mod:`softmeet.solvers.projection`. The light tokens of a row (its tail) are together taken to have
the curvature of tokens drawn evenly from the vocabulary. That is computed once for given heads, in the heads' own
coordinates, all members side by side: the covariance C of rows of [W_1 | … | W_n], with blocks C_ii, and for given
trusts the inverse of

    diag(α) C diag(α) + blockdiag(α_i γ_i C_ii)

within the directions that the heads have. In this file's tensors D = Σ d_i counts the columns of the W_i, except in
:func:`direction` and in the whitened coordinates it takes and returns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.solvers import tuning
from softmeet.solvers.linalg import add_ridge, conjugate_gradients, held, ridged_factor
from softmeet.solvers.projection import Projection

# The most steps of conjugate gradients.
_STEPS = 64
# Tokens drawn per column of all heads, without which their covariance would be singular; the share of the mean of the
# diagonal that is added to it.
_PER_COLUMN, _RIDGE = 4, 1e-3
# For how many trusts the inverse Hessian of a tail is kept.
_INVERSES = 8
# Tokens whose rows are in double precision at one time.
_TOGETHER = 1024
# The least share of mass that a tail is taken to have.
_LEAST = 1e-6


def direction(
    problem: Projection, gradient: Float[Tensor, "B D"], p: Float[Tensor, "B v"], r: Float[Tensor, "B n v"], count: int
) -> Float[Tensor, "B D"]:
    """Return a direction of the dual variables in which the dual function f falls, (B, D): approximately -H⁻¹∇f.

    H is f's Hessian; the direction is found by conjugate gradients on the model of it in :class:`Around`. Rows in which
    that fails get -∇f.

    Args:
        problem: the batch of relaxed I-projections.
        gradient: ∇f at the current point, (B, D).
        p, r: the answer and the corrected members there, as probabilities.
        count: how many heavy tokens of each row have their curvature exactly, as :func:`heavy_tokens` gives it.
    """
    found = torch.empty_like(gradient)
    size = held(count * problem.read) if found.device.type == "cpu" else max(1, len(found))
    for rows in torch.arange(len(found), device=found.device).split(size):
        g = gradient[rows]
        x = Around(problem.take(rows), p[rows], r[rows], count).solve(-g, _STEPS, tuning.CONJUGATE_REDUCTION)
        # If it is not finite, or f would rise along it, the negative gradient takes its place.
        falls = (x * g).sum(-1, keepdim=True) < 0
        found[rows] = torch.where(falls & x.isfinite().all(-1, keepdim=True), x, -g)
    return found


def heavy_tokens(problem: Projection, step: int, *, bounded: bool = False) -> int:
    """Return how many heavy tokens of each row should have their curvature exactly in a step; see :class:`Around`.

    The number is ``tuning.HEAVY`` or, if more, a share of the columns of all heads. From the third step on it doubles
    with each step, up to the share ``tuning.HEAVY_SHARE`` of the vocabulary. It is never above
    ``tuning.HEAVY_AT_MOST`` or the number of tokens.

    Args:
        problem: the batch of relaxed I-projections.
        step: how many steps were taken before: 0 in the first step.
        bounded: whether a proved bound on the gap is to end the row; its directions have to be more accurate, and the
            share of the columns is twice as large.
    """
    share = tuning.HEAVY_PER_COLUMN_FOR_BOUNDS if bounded else tuning.HEAVY_PER_COLUMN
    v, least = problem.log_q.shape[-1], max(tuning.HEAVY, int(share * problem.read))
    return min(v, tuning.HEAVY_AT_MOST, max(least, min(least << max(0, step - 1), int(tuning.HEAVY_SHARE * v))))


class Around:
    """A model of the dual's Hessian H: heavy tokens have their curvature exactly, all others that of an average token.

    The others' curvature is that of tokens drawn evenly from the vocabulary (:class:`Tail`). Vectors are in the
    coordinates of the heads W_i themselves, side by side, D = Σ d_i: no head is whitened for it.

    Args:
        problem: a batch of b relaxed I-projections.
        p, r: the answer, (b, v), and the corrected members, (b, n, v), as probabilities, at the dual point of each row
            at which H is wanted.
        count: the number of heavy tokens of each row, from 1 to v: those with the largest p + Σ ρ_i r_i, the sum over
            members of finite trust. :func:`heavy_tokens` gives a number that pays.
    """

    def __init__(self, problem: Projection, p: Float[Tensor, "b v"], r: Float[Tensor, "b n v"], count: int) -> None:
        self.problem, self.tail = problem, tail_of(problem)
        # The price of infinite trusts is 0: r_i cannot change there.
        weight = p + (problem.price[:, None] * r).sum(1)
        tokens: Int[Tensor, "b K"] = weight.topk(count, dim=-1).indices
        rows = [h.rows(tokens) for h in problem.heads]
        self.dtype = max((x.dtype for x in rows), key=lambda one: one.itemsize)
        self.rows = [x.to(self.dtype) for x in rows]
        self.alpha, self.gamma = problem.alpha.to(self.dtype), problem.gamma.to(self.dtype)
        ends = torch.tensor([0] + [x.shape[-1] for x in rows]).cumsum(0).tolist()
        self.places = [slice(*pair) for pair in pairwise(ends)]
        self.scale = self._spread(self.alpha)
        self.p = p.gather(-1, tokens).to(self.dtype)
        self.r = r.gather(-1, tokens[:, None].expand(-1, len(self.alpha), -1)).to(self.dtype)
        self.of_p = (1 - self.p.sum(-1, keepdim=True)).clamp_min(_LEAST)
        self.of_r = (1 - self.r.sum(-1)).clamp_min(_LEAST)
        self.mean, self.covariance = self.tail.mean.to(self.dtype), self.tail.covariance.to(self.dtype)
        self.of_r_wide = self._spread(self.of_r)
        self.joint_mean = self._sums(self.p[:, None].expand_as(self.r)) + self.of_p * self.mean
        self.own_mean = self._sums(self.r) + self.of_r_wide * self.mean

    def _spread(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b D"]:
        """Repeat the value of each member i, (…, n), for each of the d_i columns of its head W_i; return (…, D)."""
        widths = torch.tensor([h.stop - h.start for h in self.places], device=x.device)
        return x.repeat_interleave(widths, dim=-1)

    def _sums(self, m: Float[Tensor, "b n K"]) -> Float[Tensor, "b D"]:
        """Return Σ_j m_ij q_ij of every member i, side by side; q_ij is the row of W_i for heavy token j."""
        return torch.cat([torch.bmm(m[:, i, None], rows)[:, 0] for i, rows in enumerate(self.rows)], dim=-1)

    def times(self, x: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """Return H x, (b, D), for the directions ``x``, one per row, in the heads' own coordinates; H is not formed."""
        # Row vectors on the left: batched products of this shape are fast in no other form.
        parts = zip(self.rows, self.places, strict=True)
        y = torch.cat([torch.bmm(x[:, None, here], rows.transpose(1, 2)) for rows, here in parts], dim=1)
        scaled = self.scale * x
        joint = (self.alpha[:, None] * y).sum(1) - (self.joint_mean * scaled).sum(-1, keepdim=True)
        joint = self.p * joint
        centres = torch.stack([(self.own_mean[:, here] * x[:, here]).sum(-1) for here in self.places], dim=1)
        own = self.r * (y - centres[..., None])
        found = self._sums(joint[:, None] + self.gamma[:, None] * own)
        # Deviations from a mean sum to 0 over all tokens, so those of light tokens follow from those of heavy ones.
        found = found - joint.sum(-1, keepdim=True) * self.mean + self.of_p * (scaled @ self.covariance)
        lost = self._spread(self.gamma * own.sum(-1)) * self.mean
        light = torch.cat([x[:, here] @ self.covariance[here, here] for here in self.places], dim=-1)
        return self.scale * (found - lost + self._spread(self.gamma) * self.of_r_wide * light)

    def solve(self, b: Float[Tensor, "b D"], steps: int, reduction: float = 0.0) -> Float[Tensor, "b D"]:
        """Return approximately H⁻¹ b, (b, D), by at most ``steps`` steps of preconditioned conjugate gradients.

        ``b`` and the result are in whitened coordinates. A row stops once √(eᵀM⁻¹e), e its residual b - H x and M⁻¹
        the preconditioner, is at most ``reduction`` times its value at x = 0; with 0 it takes all steps.
        """
        own = self.problem.unwhitened(b).to(self.dtype)
        found = conjugate_gradients(self.times, own, _Preconditioner(self), reduction, steps)
        return self.problem.whitened(found.to(b))


class _Preconditioner:
    """An approximate H⁻¹ for :class:`Around`: the largest masses of p and all r_i exactly, the others by the tail.

    By Woodbury: (τ T + UᵀU)⁻¹ = (T⁻¹ - T⁻¹Uᵀ(τ + U T⁻¹Uᵀ)⁻¹U T⁻¹) / τ, with one row of U for each of those masses, T
    the tail's curvature at one unit of mass and τ its mean mass.
    """

    def __init__(self, around: Around) -> None:
        K = around.p.shape[1]
        self.inverse = around.tail.inverse(around.problem).to(around.dtype)
        self.mass = ((around.of_p[:, 0] + around.of_r.sum(-1)) / (1 + around.of_r.shape[1]))[:, None]
        masses = torch.cat([around.p[:, None], (around.alpha * around.gamma)[:, None] * around.r], dim=1).flatten(1)
        heaviest = masses.topk(max(1, min(tuning.PRECONDITIONED, K // 4)), dim=-1)
        layer, token = heaviest.indices // K, heaviest.indices % K
        U = torch.cat([rows.gather(1, token[..., None].expand(-1, -1, rows.shape[-1])) for rows in around.rows], dim=-1)
        means = [around.joint_mean, *[around.own_mean] * len(around.places)]
        share = torch.zeros(len(means), U.shape[-1], dtype=U.dtype, device=U.device)
        share[0] = around.scale
        for i, here in enumerate(around.places):
            share[1 + i, here] = 1
        wide = layer[..., None].expand(-1, -1, U.shape[-1])
        U = U * share[layer] - torch.stack(means, dim=1).gather(1, wide) * share[layer]
        U = U * heaviest.values.sqrt()[..., None]
        self.low = U @ self.inverse
        G = add_ridge(torch.bmm(self.low, U.transpose(1, 2)).double(), torch.finfo(U.dtype).eps)
        G.diagonal(dim1=-2, dim2=-1).add_(self.mass.double())
        factor, _ = torch.linalg.cholesky_ex(G)
        self.low_inverse = torch.cholesky_inverse(factor)

    def __call__(self, g: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        low = torch.bmm(torch.bmm(g[:, None], self.low.transpose(1, 2)).double(), self.low_inverse)
        return (g @ self.inverse - torch.bmm(low.to(g), self.low)[:, 0]) / self.mass


@dataclass(eq=False)
class Tail:
    """The mean and covariance of the tokens' rows of all heads, estimated from tokens at even distances in id.

    They stand for the curvature of an average token; :func:`tail_of` makes and keeps them. D = Σ d_i is the number of
    columns of [W_1 - 1c_1ᵀ | … | W_n - 1c_nᵀ], in which c_i is the centre of head i, (d_i,), as whitening subtracts it.

    Attributes:
        mean: the mean of those tokens' rows of that matrix, (D,), fp32.
        covariance: their covariance, (D, D), fp32.
        whitened: that covariance in whitened coordinates, FᵀCF with the factors F of the whitenings side by side, fp32.
            It is rounded there: the rounding of C, times the squares of F, could be larger than its small eigenvalues.
    """

    mean: Float[Tensor, " D"]
    covariance: Float[Tensor, "D D"]
    whitened: Float[Tensor, "rank rank"]
    _inverses: dict[tuple[float, ...], Tensor] = field(default_factory=dict)

    def inverse(self, problem: Projection) -> Float[Tensor, "D D"]:
        """Return the inverse of the tail's Hessian for the problem's trusts, (D, D), fp32; the last eight are kept.

        It is in the heads' own coordinates, and 0 on directions that whitening leaves out.
        The Hessian is diag(α) C diag(α) + blockdiag(α_i γ_i C_ii) plus a small ridge, C the covariance, C_ii its block
        of member i, α_i = min(1, ρ_i), γ_i = min(1, 1/ρ_i): that of one unit of mass of p and of every r_i.
        """
        found = self._inverses.get(problem.trust)
        if found is None:
            F = torch.block_diag(*(h.whitening.factor for h in problem.heads))
            C = self.whitened.double()
            scale = problem.scale.double()
            H = C * scale[:, None] * scale
            for here, alpha, gamma in zip(problem.places, problem.alpha.tolist(), problem.gamma.tolist(), strict=True):
                H[here, here] += alpha * gamma * C[here, here]
            # The drawn tokens may have no component in some directions.
            found = (F @ torch.cholesky_solve(F.T, ridged_factor(H, _RIDGE))).float()
            # Whoever chooses trusts, as a server's clients do, must not fill the memory.
            for old in list(self._inverses)[: 1 - _INVERSES]:
                self._inverses.pop(old, None)
            self._inverses[problem.trust] = found
        return found


def tail_of(problem: Projection) -> Tail:
    """Return the :class:`Tail` of the problem's heads; it is computed once for given heads.

    The first member's head keeps the tails of the last four sets of heads with which it was first.
    """
    first = problem.heads[0].head
    key = tuple(h.whitening for h in problem.heads)
    for known, tail in first.tails:
        if len(known) == len(key) and all(a is b for a, b in zip(known, key, strict=True)):
            return tail  # type: ignore[return-value]
    v = problem.log_q.shape[-1]
    count = min(v, max(tuning.TAIL, _PER_COLUMN * problem.read))
    tokens = (torch.arange(count, dtype=torch.float64) * (v / count)).long()
    X = torch.cat([h.even_rows(tokens) for h in problem.heads], dim=-1)
    mean = X.mean(0)
    C = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for some in (X - mean).split(_TOGETHER):
        C.addmm_(some.T.double(), some.double(), alpha=1 / count)
    F = torch.block_diag(*(h.whitening.factor for h in problem.heads))
    tail = Tail(mean, C.float(), (F.T @ C @ F).float())
    # At most four are kept: views of one row each, which free directions make, would fill it.
    first.tails[:] = [*first.tails[-3:], (key, tail)]
    return tail
