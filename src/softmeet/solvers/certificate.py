"""Upper bounds on the duality gap of a relaxed I-projection, from one linear solve.

For feasible (p̃, r̃), primal(p̃, r̃) + f(λ) = KL(p̃‖p_λ) + Σ ρ_i KL(r̃_i‖r_i,λ): the right-hand side bounds f(λ) - f*.
With H s = g, the changes x_j = -(a_j - m)ᵀs and y_ij = γ_i (a_ij - m_i)ᵀs_i make p̃ = p(1 + x), r̃_i = r_i(1 + y_i)
feasible when all are at least -1, and then

    gap ≤ Σ_j p_j φ(x_j) + Σ_i ρ_i Σ_j r_ij φ(y_ij),   φ(x) = (1 + x) log(1 + x) - x.

:func:`gap_bound` takes all tokens and a direction whose scores are known. :func:`restricted_gap_bound` reads some rows
of the heads, changes those tokens only, and gives tokens that would turn negative the probability 0, at φ(-1) = 1.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.solvers.projection import Projection

# A change smaller than this share of all mass is below the rounding of the sums that it enters.
_NEGLIGIBLE = 1e-17
_ROUNDS = 8
# Where the series of φ is used, and the last power in it: its relative error there, and that of the closed form beyond,
# are far below what a bound needs.
_SERIES = {torch.float32: (0.1, 8), torch.float64: (1e-3, 5)}


def phi(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """(1 + x) log(1 + x) - x for x ≥ -1, without cancellation near 0: Σ_k (-x)^k / (k (k - 1)), k from 2."""
    near, terms = _SERIES[x.dtype]
    series = torch.full_like(x, 1 / (terms * (terms - 1)))
    for k in range(terms - 1, 1, -1):
        series.mul_(x).neg_().add_(1 / (k * (k - 1)))
    series.mul_(x).mul_(x)
    exact = torch.special.xlogy(1 + x, 1 + x) - x
    return torch.where(x.abs() < near, series, exact)


def gap_bound(
    problem: Projection, p: Float[Tensor, "B v"], r: Float[Tensor, "B n v"], change: Float[Tensor, "B n v"]
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """(bound in nats, rows where it does not hold because a token would turn negative).

    Args:
        problem: the projection.
        p, r: the distributions at the current dual point.
        change: Q_i(-s_i), the scores of the Newton direction.

    Terms are in fp32 where the products with heads were: each is found to a relative 1e-5.
    """
    x = problem.tilt(change)
    y = -problem.gamma[:, None] * change
    return cost(problem, p, r, x - (p * x).sum(-1, keepdim=True), y - (r * y).sum(-1, keepdim=True))


def cost(
    problem: Projection, p: Float[Tensor, "B v"], r: Float[Tensor, "B n v"], x: Tensor, y: Tensor
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """(Σ p φ(x) + Σ ρ_i Σ r_i φ(y_i), rows where a token would turn negative) of changes p(1 + x), r_i(1 + y_i)."""
    low = torch.float32 if problem.eps > torch.finfo(torch.float64).eps else torch.float64
    joint, broken = _terms(p.to(low), x.to(low))
    own, negative = _terms(r.to(low), y.to(low))
    return joint + (problem.price * own).sum(-1), broken.any(-1) | negative.any(-1).any(-1)


def _terms(p: Float[Tensor, "*b v"], x: Float[Tensor, "*b v"]) -> tuple[Float[Tensor, "*b"], Bool[Tensor, "*b v"]]:
    """(Σ p φ(x), the tokens where p(1 + x) would be negative); a token of negligible change is left as it is."""
    x = torch.where(p * x.abs() < _NEGLIGIBLE, 0.0, x)
    return (p * phi(x.clamp_min(-1))).sum(-1).double(), x < -1


def restricted_gap_bound(
    problem: Projection,
    row: int,
    p: Float[Tensor, " v"],
    r: Float[Tensor, "n v"],
    gradient: Float[Tensor, " D"],
    limit: int = 4096,
) -> float:
    """The bound of one row from at most ``limit`` gathered tokens, the heaviest by p + Σ ρ_i r_i; inf if none is found.

    Args:
        problem, row: the projection and the row of its batch.
        p, r: the distributions at the dual point.
        gradient: of the dual there, whitened and scaled as :class:`Projection` has it.
        limit: tokens to gather.
    """
    p, r, gradient, price = p.double(), r.double(), gradient.double(), problem.price.double()
    tokens = (p + price @ r).topk(min(limit, len(p))).indices
    one = torch.tensor([row], device=p.device)
    rows = [h.take(one).gather(tokens[None])[0].double() for h in problem.heads]
    joint = torch.cat([alpha * a for a, alpha in zip(rows, problem.alpha.tolist(), strict=True)], dim=-1)
    p, r = p[tokens], r[:, tokens]
    # One layer per distribution that may change: its mass, rows, price, place in s, and what is left of it.
    layers = [_Layer(p, joint, 1.0, slice(0, joint.shape[1]))]
    for i, a in enumerate(rows):
        if price[i] > 0:
            layers.append(_Layer(r[i], -float(problem.gamma[i]) * a, float(price[i]), problem.places[i]))
    for _ in range(_ROUNDS):
        H, g = torch.zeros(len(gradient), len(gradient), dtype=p.dtype, device=p.device), gradient.clone()
        for layer in layers:
            layer.enter(H, g)
        s, slack = _solved(H, g, gradient)
        bounds, broken = zip(*(layer.bound(s) for layer in layers), strict=True)
        if slack.isinf() or not any(broken):
            return float(sum(bounds) + slack)
    return math.inf


def _solved(
    H: Float[Tensor, "D D"], g: Float[Tensor, " D"], gradient: Float[Tensor, " D"]
) -> tuple[Float[Tensor, " D"], Float[Tensor, ""]]:
    """H⁻¹g and its :func:`residual_slack`: by Cholesky's factor, or where that is of no use by singular values."""
    factor, failed = torch.linalg.cholesky_ex(H)
    if not failed:
        s = torch.cholesky_solve(g[:, None], factor).squeeze(-1)
        slack = residual_slack(H, s, g, gradient)
        if slack.isfinite():
            return s, slack
    s = torch.linalg.lstsq(H, g[:, None], driver="gelsd").solution.squeeze(-1)
    return s, residual_slack(H, s, g, gradient)


def residual_slack(
    H: Float[Tensor, "*b D D"], s: Float[Tensor, "*b D"], g: Float[Tensor, "*b D"], gradient: Float[Tensor, "*b D"]
) -> Float[Tensor, "*b"]:
    """What H s ≠ g may hide: an infeasibility e moves the bound by at most |e·(λ - λ*)|, taken as 4 |e| |s|.

    A residual past rounding, against the size of the gradient, gives inf: no certificate.
    """
    e = ((H @ s[..., None]).squeeze(-1) - g).norm(dim=-1)
    return torch.where(e <= 1e-4 * gradient.norm(dim=-1), 4 * e * s.norm(dim=-1), math.inf)


class _Layer:
    """One distribution's share of the linear system: p with rows α_i a_i, or r_i with rows -γ_i a_i and price ρ_i."""

    def __init__(self, mass: Float[Tensor, " k"], rows: Float[Tensor, "k d"], price: float, place: slice) -> None:
        self.mass, self.rows, self.price, self.place = mass, rows, price, place
        self.dropped = torch.zeros_like(mass, dtype=torch.bool)

    def enter(self, H: Float[Tensor, "D D"], g: Float[Tensor, " D"]) -> None:
        """Add price · Σ mass (a - m)(a - m)ᵀ over the kept tokens to H, and take the dropped ones out of g."""
        kept = self.mass.masked_fill(self.dropped, 0.0)
        self.kept, self.lost = kept, self.mass - kept
        self.centred = self.rows - kept @ self.rows / kept.sum()
        H[self.place, self.place] += self.price * (self.centred * kept[:, None]).T @ self.centred
        g[self.place] -= self.price * (self.lost @ self.centred)

    def bound(self, s: Float[Tensor, " D"]) -> tuple[float, bool]:
        """(price · KL-like cost, whether tokens had to be dropped and the system must be solved again)."""
        x = self.lost.sum() / self.kept.sum() - self.centred @ s[self.place]
        cost, broken = _terms(self.kept, x)
        self.dropped = self.dropped | broken
        return self.price * float(cost + self.lost.sum()), bool(broken.any())
