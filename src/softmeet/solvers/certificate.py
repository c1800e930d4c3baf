"""Upper bounds on the gap f(λ) - min f of a relaxed I-projection, from exact or approximate Newton directions.

Symbols are those of :mod:`softmeet.solvers.projection`: p the answer and r_i the corrected members at the dual point λ,
ρ_i the trusts, γ_i = min(1, 1/ρ_i). a_j is token j's row of all whitened heads (scaled by α_i), a_ij that of Q_i, m and
m_i their means under p and r_i.

For feasible (p̃, r̃), that is distributions with Q_iᵀp̃ = Q_iᵀr̃_i, primal(p̃, r̃) + f(λ) = KL(p̃‖p) + Σ ρ_i
KL(r̃_i‖r_i): the right-hand side bounds f(λ) - min f. With the Hessian H, the gradient g and H s = g, the changes x_j =
-(a_j - m)ᵀs and y_ij = γ_i (a_ij - m_i)ᵀs_i make p̃ = p(1 + x), r̃_i = r_i(1 + y_i) feasible if all of them are at
least -1, and then

    gap ≤ Σ_j p_j φ(x_j) + Σ_i ρ_i Σ_j r_ij φ(y_ij),   φ(x) = (1 + x) log(1 + x) - x.

:func:`gap_bound` takes all tokens and a direction whose scores are known. :func:`restricted_gap_bound` reads some rows
of the heads, changes those tokens only, and gives tokens that would turn negative the probability 0, at φ(-1) = 1.

:func:`repaired_gap_bound` takes a direction that only nearly solves the system. Along it every token changes a little,
p̃ ∝ p(1 + x)₊ and r̃_i ∝ r_i(1 + y_i)₊. The remaining difference of the moments, e_i = Q_iᵀ(p̃ - r̃_i), is made up by
r̃_i on its M heaviest tokens J: r_i w_i is added there, w_i = (a_i - m_J)ᵀt_i with Cov_J(Q_i) t_i = e_i. That point is
feasible, so by (6) in docs/theory/solvers.md#eq-6

    gap ≤ Σ_j p_j φ(x̃_j) + Σ_i ρ_i Σ_j r_ij φ(ỹ_ij),   p̃ = p(1 + x̃),   r̃_i + r_i w_i = r_i(1 + ỹ_i).

What all this leaves of the moments is priced by :mod:`softmeet.solvers.leftover`, never neglected.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.solvers import tuning
from softmeet.solvers.leftover import ROUNDING, carried, moment_prices, residual_slack, token_prices
from softmeet.solvers.linalg import add_ridge, held, some
from softmeet.solvers.projection import Projection

# A change smaller than this share of all mass is below the rounding of the sums that it enters.
_NEGLIGIBLE = 1e-17
_ROUNDS = 8
# The series of φ is used below the first number, up to the power that is the second: its relative error there, and that
# of the closed form above, are far below the accuracy that a bound needs.
_SERIES = {torch.float32: (0.1, 8), torch.float64: (1e-3, 5)}
# The most systems of one repair, a new one each time that tokens reach 0, and solutions of each system.
_REPAIRS, _REFINED = 4, 2
# A system is solved again, by another method or for fewer tokens, where its residual is above this share.
_SOLVED = 1e-7


def phi(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Compute φ(x) = (1 + x) log(1 + x) - x, elementwise for x ≥ -1, without cancellation near 0.

    Near 0 the series Σ_k (-x)^k / (k (k - 1)), k from 2, is used. ``x`` must be fp32 or fp64; other dtypes raise a
    KeyError.

    Example:
        >>> import torch
        >>> phi(torch.tensor([-1.0, 0.0, 1e-6], dtype=torch.float64))
        tensor([1.0000e+00, 0.0000e+00, 5.0000e-13], dtype=torch.float64)
    """
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
    """Bound the gap of every row, in nats, by a direction that solves the Newton system of the dual function, H s = ∇f.

    No head is read. The bound is the first one in the module docstring; it supposes that the system is solved exactly,
    and callers add :func:`residual_slack` for the error of its solution.

    Args:
        problem: the batch of relaxed I-projections.
        p, r: the answer and the corrected members at the current dual point, as probabilities.
        change: the scores Q_i(-s_i) of the Newton direction -s, (B, n, v).

    Returns:
        (the bound, (B,), fp64; the mask (B,), True for rows in which it does not hold, because a token would get
        negative probability). If products with heads are in fp32, so are the terms of the sum, whose relative error is
        about 1e-5.
    """
    x = problem.tilt(change)
    y = -problem.gamma[:, None] * change
    low = torch.float32 if problem.eps > torch.finfo(torch.float64).eps else torch.float64
    joint, broken = _terms(p.to(low), (x - (p * x).sum(-1, keepdim=True)).to(low))
    own, negative = _terms(r.to(low), (y - (r * y).sum(-1, keepdim=True)).to(low))
    return joint + (problem.price * own).sum(-1), broken.any(-1) | negative.any(-1).any(-1)


def _terms(p: Float[Tensor, "*b v"], x: Float[Tensor, "*b v"]) -> tuple[Float[Tensor, "*b"], Bool[Tensor, "*b v"]]:
    """Return (Σ p φ(x), fp64; the mask of tokens whose p(1 + x) would be negative, for which φ(-1) = 1 is taken).

    Changes p |x| below 1e-17 count as 0.
    """
    x = torch.where(p * x.abs() < _NEGLIGIBLE, 0.0, x)
    return (p * phi(x.clamp_min(-1))).sum(-1).double(), x < -1


def restricted_gap_bound(
    problem: Projection,
    row: int,
    log_p: Float[Tensor, " v"],
    log_r: Float[Tensor, "n v"],
    gradient: Float[Tensor, " D"],
    limit: int = 4096,
) -> float:
    """Bound the gap of one row, in nats, by changing the probabilities of a few tokens only; inf if no bound is found.

    The gap is f(ν) - min f at the row's dual point ν. The changes solve a Newton system restricted to those tokens,
    whose rows of the heads are read; tokens that would get negative probability get 0, and the system is solved again,
    at most eight times in all. What its solution leaves is added as by :func:`residual_slack`. The module docstring has
    the bound. The time of :func:`softmeet.time_limit` is not asked: callers do.

    Args:
        problem: the batch of relaxed I-projections.
        row: the index of the row in that batch.
        log_p, log_r: log-probabilities of the answer and of the corrected members at the row's dual point, in nats.
        gradient: the gradient of the dual function there, (D,), with the blocks α_i Q_iᵀ(p - r_i), α_i = min(1, ρ_i).
        limit: how many tokens may change, at least 1: those with the largest p + Σ ρ_i r_i, the sum over members of
            finite trust.
    """
    log_p, log_r, gradient, price = log_p.double(), log_r.double(), gradient.double(), problem.price.double()
    p, r = log_p.exp(), log_r.exp()
    tokens = (p + price @ r).topk(min(limit, len(p))).indices
    here = problem.take(torch.tensor([row], device=p.device))
    rows = [h.gather(tokens[None])[0].double() for h in here.heads]
    joint = torch.cat([alpha * a for a, alpha in zip(rows, problem.alpha.tolist(), strict=True)], dim=-1)
    p, r = p[tokens], r[:, tokens]
    # One layer for each distribution that may change, with its masses, rows, price and place in s.
    layers = [_Share(p, joint, 1.0, slice(0, joint.shape[1]))]
    for i, a in enumerate(rows):
        if price[i] > 0:
            layers.append(_Share(r[i], -float(problem.gamma[i]) * a, float(price[i]), problem.places[i]))
    for _ in range(_ROUNDS):
        H, g = torch.zeros(len(gradient), len(gradient), dtype=p.dtype, device=p.device), gradient.clone()
        for layer in layers:
            layer.enter(H, g)
        # A distribution whose tokens have all been dropped has no mean.
        if not (H.isfinite().all() and g.isfinite().all()):
            break
        s = _solved(H, g, gradient)
        bounds, broken = zip(*(layer.bound(s) for layer in layers), strict=True)
        e = H @ s - g
        if not any(broken):
            changes = [layer.change for layer in layers[1:]]
            # Masses add up to 1, and what they miss it by is rounding, too.
            noise = torch.finfo(e.dtype).eps * float(1 + H.norm() * s.norm() + g.norm())
            return float(sum(bounds) + _made_up(here, (log_p, log_r), tokens, rows, changes, (e, s, gradient), noise))
    return math.inf


def _made_up(
    problem: Projection,
    point: tuple[Float[Tensor, " v"], Float[Tensor, "n v"]],
    tokens: Int[Tensor, " k"],
    rows: list[Float[Tensor, "k _"]],
    changes: list[Float[Tensor, " k"]],
    system: tuple[Float[Tensor, " D"], Float[Tensor, " D"], Float[Tensor, " D"]],
    noise: float,
) -> Float[Tensor, ""]:
    """Return :func:`residual_slack` of a problem with one row, by masses on some ``tokens`` where that has no price.

    Args:
        problem: the relaxed I-projection of that row alone.
        point: (log p, log r_i) at the dual point, in nats, fp64.
        tokens, rows: the tokens' ids, and their rows of every whitened head, (k, rank), fp64.
        changes: by how much each r_i changes there, as a share.
        system: (e, s, gradient) as of :func:`residual_slack`.
        noise: how long the rounding of e may be.
    """
    log_p, log_r = (part[None] for part in point)
    e, s, gradient = (part[None] for part in system)
    slack = residual_slack(problem, (log_p, log_r), e, s, gradient)
    if slack.isfinite() or math.inf in problem.trust:
        return slack[0]
    costs, mass = [], log_r[0, :, tokens].exp()
    # H s - g is what the corrected members have too much of.
    for i, part in enumerate((-e).split(problem.widths, dim=-1)):
        X, wanted = rows[i][None], part / problem.alpha[i]
        cost = carried(X, (wanted, torch.zeros_like(slack)), *token_prices(problem, i, (log_p, log_r), tokens[None]))
        alone = _by_itself(X, mass[i][None], changes[i][None], wanted, noise / float(problem.alpha[i]))
        costs.append(torch.minimum(cost, problem.price[i] * alone))
    return torch.stack(costs).sum()


def _by_itself(
    X: Float[Tensor, "b k d"],
    mass: Float[Tensor, "b k"],
    change: Float[Tensor, "b k"],
    e: Float[Tensor, "b d"],
    noise: float = 0.0,
) -> Float[Tensor, " b"]:
    """Bound the cost, per unit of its price, of a member's making up a difference of moments by itself; (b,), in nats.

    It needs no token on which the others have mass. From r(1 + y) a member goes to r(1 + y + w) with Σ r w x = e and
    Σ r w = 0; as divergences are convex, that costs at most Σ r w log(1 + y + w). Inf if there is no such w, up to the
    rounding of ``e``.

    Args:
        X: the tokens' rows x of the member's head.
        mass: its probabilities r of those tokens.
        change: y, -1 or more.
        e: the difference.
        noise: how long its rounding may be, which is not made up: a member with mass on few tokens could not.
    """
    e = torch.where(e.norm(dim=-1, keepdim=True) <= noise, 0.0, e)
    w, left, lost = _taken_up(X, mass, e, -0.5 * (1 + change))
    moved = mass.double() * w
    cost = torch.special.xlogy(moved, 1 + change.double() + w).sum(-1)
    proved = (left.norm(dim=-1) <= (ROUNDING * e.double().norm(dim=-1)).clamp_min(noise)) & cost.isfinite()
    proved &= lost.abs() <= ROUNDING * moved.abs().sum(-1)
    return torch.where(proved, cost.clamp_min(0), torch.inf)


def _solved(H: Float[Tensor, "D D"], g: Float[Tensor, " D"], gradient: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """Return s = H⁻¹g, by Cholesky or, if that leaves more than a small share of ``gradient``, by singular values."""
    factor, failed = torch.linalg.cholesky_ex(H)
    if not failed:
        s = torch.zeros_like(g)
        for _ in range(_REFINED):
            s = s + torch.cholesky_solve((g - H @ s)[:, None], factor).squeeze(-1)
        if (H @ s - g).norm() <= _SOLVED * gradient.norm():
            return s
    found: Tensor = torch.linalg.lstsq(H, g[:, None], driver="gelsd").solution.squeeze(-1)
    return found


def repaired_gap_bound(
    problem: Projection, point: tuple[Float[Tensor, "B v"], Float[Tensor, "B n v"]], y: Float[Tensor, "B n v"]
) -> Float[Tensor, " B"]:
    """Bound the gap of every row, (B,), in nats, by a direction that only nearly solves the Newton system.

    It is inf in rows without a bound. All trusts must be finite, which is not checked. Every head is read once. The
    bound is the last one in the module docstring: the moments of p and r_i that the direction leaves different are made
    equal by changing each r_i on its most probable tokens, and what that leaves is priced as the docstring says.

    Args:
        problem: the batch of relaxed I-projections.
        point: (log p, log r_i) at the current dual point, in nats.
        y: the scores Q_i d_i, (B, n, v), of an approximate Newton direction d ≈ -H⁻¹∇f, f the dual function.
    """
    p, r = (part.exp() for part in point)
    x, own = _changed(p, problem.tilt(y)), _changed(r, -problem.gamma[:, None] * y)
    bound, prices = (p * phi(x)).sum(-1), moment_prices(problem, *point)
    for i, h in enumerate(problem.heads):
        e = h.moments(p * (1 + x) - r[:, i] * (1 + own[:, i]))[0]
        count = max(tuning.REPAIRED, tuning.REPAIRED_PER_COLUMN * h.rank)
        tokens = r[:, i].topk(min(r.shape[-1], count), dim=-1).indices
        size = held(tokens.shape[1] * h.rank)
        whole, slack = own[:, i], torch.zeros_like(prices[:, i])
        for rows in torch.arange(len(r), device=r.device).split(size):
            ids = tokens[rows]
            mass, lowest = r[rows, i].gather(-1, ids), -1 - whole[rows].gather(-1, ids)
            X = h.take(rows).gather(ids)
            w, left, lost = _taken_up(X, mass, e[rows], lowest)
            whole[rows] = whole[rows].scatter_add(-1, ids, w.to(whole))
            # Q and a constant column of length 1 are orthonormal: the difference of the masses is one more moment.
            slack[rows] = torch.hypot(left.norm(dim=-1), lost / r.shape[-1] ** 0.5) * prices[rows, i]
            for k in slack[rows].isinf().nonzero().flatten().tolist():
                one = rows[k : k + 1]
                costs = token_prices(problem, i, (point[0][one], point[1][one]), ids[k : k + 1])
                slack[one] = carried(X[k : k + 1], (left[k : k + 1], lost[k : k + 1]), *costs)
                if slack[one].isinf() and lost[k].abs() <= ROUNDING:
                    here = whole[one].gather(-1, ids[k : k + 1])
                    slack[one] = problem.price[i] * _by_itself(X[k : k + 1], mass[k : k + 1], here, left[k : k + 1])
        bound = bound + problem.price[i] * (r[:, i] * phi(whole.clamp_min(-1))).sum(-1) + slack.nan_to_num(torch.inf)
    return bound


def _changed(p: Float[Tensor, "*b v"], x: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """Return the relative change x̃ ≥ -1, for which p(1 + x̃) is the distribution proportional to p(1 + x - E_p x)₊."""
    up = (1 + x - (p * x).sum(-1, keepdim=True)).clamp_min(0)
    return up / (p * up).sum(-1, keepdim=True) - 1


def _taken_up(
    X: Float[Tensor, "b M d"], mass: Float[Tensor, "b M"], e: Float[Tensor, "b d"], lowest: Float[Tensor, "b M"]
) -> tuple[Float[Tensor, "b M"], Float[Tensor, "b d"], Float[Tensor, " b"]]:
    """Find relative changes w ≥ ``lowest`` of some tokens' masses with Σ mass w x ≈ ``e`` and Σ mass w ≈ 0.

    Tokens that reach ``lowest`` stay there, and the system is solved again for the others, a few times.

    Args:
        X: the tokens' rows x of a head.
        mass: their probabilities.
        e: the wanted change of the moments.
        lowest: the least change of each token.

    Returns:
        (w; the part of ``e`` that is not reached, fp64; -Σ mass w, fp64). In rows without a finite solution w is 0.
    """
    mass, lowest = mass.double(), lowest.double()
    w, left, lost = torch.zeros_like(mass), e.double(), torch.zeros_like(mass[:, :1])
    free, wrong = torch.ones_like(mass, dtype=torch.bool), torch.zeros_like(mass[:, 0], dtype=torch.bool)
    for _ in range(_REPAIRS):
        some_mass = mass.masked_fill(~free, 0.0)
        total = some_mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        mean = torch.bmm((some_mass / total).to(X.dtype)[:, None], X)
        centred = X - mean
        weighted = centred * some_mass.sqrt().to(X.dtype)[..., None]
        gram = add_ridge(torch.bmm(weighted.transpose(1, 2), weighted).double(), torch.finfo(X.dtype).eps)
        factor, failed = torch.linalg.cholesky_ex(gram)
        for _ in range(_REFINED):
            t = torch.cholesky_solve((left - lost * mean[:, 0])[..., None], factor)[..., 0]
            change = torch.bmm(centred, t[..., None].to(X.dtype))[..., 0].double() + lost / total
            w = torch.maximum(w + change.masked_fill(~free, 0.0), lowest)
            lost = -(mass * w).sum(-1, keepdim=True)
            left = e - torch.bmm((mass * w)[:, None].to(X.dtype), X)[:, 0].double()
        wrong, free = wrong | (failed != 0), free & (w > lowest)
        if not some((left.norm(dim=-1) > _SOLVED * e.norm(dim=-1)) & ~wrong):
            break
    wrong |= ~(left.isfinite().all(-1) & w.isfinite().all(-1))
    left, lost = torch.where(wrong[:, None], e.double(), left), torch.where(wrong, 0.0, lost[:, 0])
    return torch.where(wrong[:, None], 0.0, w), left, lost


class _Share:
    """One distribution's part of the Newton system H s = g of :func:`restricted_gap_bound`, over k tokens.

    Attributes:
        mass: the distribution's probabilities of those tokens, (k,): p or r_i.
        rows: the tokens' rows a: all α_i a_ij side by side for p, -γ_i a_ij for r_i.
        price: the factor of its divergence: 1 for p, ρ_i for r_i.
        place: the slice of s that belongs to these rows.
        dropped: the mask of tokens that get probability 0, and change: all tokens' changes, both set by :meth:`bound`.
    """

    def __init__(self, mass: Float[Tensor, " k"], rows: Float[Tensor, "k d"], price: float, place: slice) -> None:
        self.mass, self.rows, self.price, self.place = mass, rows, price, place
        self.dropped = torch.zeros_like(mass, dtype=torch.bool)

    def enter(self, H: Float[Tensor, "D D"], g: Float[Tensor, " D"]) -> None:
        """Add this part to the system ``H`` s = ``g``, in place, with the block ``place`` of each.

        H gets price · Σ mass (a - m)(a - m)ᵀ over the tokens that are not dropped, m their mean row; price · Σ mass
        (a - m) over the dropped ones is subtracted from g.
        """
        kept = self.mass.masked_fill(self.dropped, 0.0)
        self.kept, self.lost = kept, self.mass - kept
        self.centred = self.rows - kept @ self.rows / kept.sum()
        H[self.place, self.place] += self.price * (self.centred * kept[:, None]).T @ self.centred
        g[self.place] -= self.price * (self.lost @ self.centred)

    def bound(self, s: Float[Tensor, " D"]) -> tuple[float, bool]:
        """Bound this part's cost at the solution ``s`` of the system that :meth:`enter` was last called for.

        Returns:
            (price · Σ mass φ(x) over all k tokens, x the relative changes, -1 for dropped ones; whether further tokens
            had to be dropped, so that the system must be built and solved again).
        """
        x = self.lost.sum() / self.kept.sum() - self.centred @ s[self.place]
        cost, broken = _terms(self.kept, x)
        self.dropped = self.dropped | broken
        self.change = torch.where(self.dropped, -1.0, x)
        return self.price * float(cost + self.lost.sum()), bool(broken.any())
