"""The relaxed I-projection, its dual function, and the quantities that follow from a dual point.

    minimise  KL(p‖q) + Σ_i ρ_i KL(r_i‖p̂_i)   over p, r_i in the simplex,  Q_iᵀ p = Q_iᵀ r_i

Here q is the pool, p̂_i member i's distribution, r_i its corrected distribution, Q_i its whitened head, (v, d_i), and
ρ_i in (0, ∞] its trust; ρ_i = ∞ means r_i = p̂_i. The dual variables are ν = (ν_1, …, ν_n), D = Σ d_i numbers, and
z_i = Q_i ν_i are the scores. With α_i = min(1, ρ_i) and γ_i = min(1, 1/ρ_i) the dual function, to be minimised, is

    f(ν) = log Σ q exp(Σ_i α_i z_i) + Σ_i ρ_i log Σ p̂_i exp(-γ_i z_i)
    p = softmax(log q + Σ α_i z_i),  r_i = softmax(log p̂_i - γ_i z_i),  ∇_i f = α_i Q_iᵀ(p - r_i).

In other files the unscaled multipliers are λ_i = α_i ν_i. The scaling keeps the problem well conditioned for small and
for large trusts, since ρ_i γ_i = α_i at every ρ_i. The gap at ν is f(ν) - min f, in nats. p° is the p of the optimum.
Vectors over the vocabulary are fp64; only products with heads run in the heads' dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from softmeet.heads import WhitenedHead
from softmeet.simplex import kl
from softmeet.solvers.batched import Batched

# Moments hold if they are this close to the members', in whitened coordinates.
MOMENT_TOLERANCE = 1e-6
# A proof must show that all moments are at least this far from the members': less may be rounding of the members'.
SEPARATED = 1e-7


@dataclass(eq=False)
class Projection:
    """A batch of B relaxed I-projections over n members and v tokens.

        minimise  KL(p‖q) + Σ_i ρ_i KL(r_i‖p̂_i)   over p, r_i in the simplex,  Q_iᵀ p = Q_iᵀ r_i

    Q_i is member i's whitened head and r_i its corrected distribution. Solvers minimise the dual function f(ν) over the
    dual variables ν, D numbers per row (formulas in the module docstring). The gap at ν is f(ν) - min f.

    Args:
        log_q: log-probabilities of the pool q in nats, (B, v), fp64.
        log_p: log-probabilities of the members p̂_i in nats, (B, n, v), fp64; finite wherever ``log_q`` is.
        heads: the n whitened heads Q_i, each for the same B rows, as
            :meth:`softmeet.rules.problem.Problem.views` makes them.
        trust: the n trusts ρ_i, in (0, inf]; inf means r_i = p̂_i.
        tol: the gap, in nats, at which a row is done.
        start: dual variables ν to begin from, (B, D); None to begin from ν = 0, which is the pool.
        pool_may_answer: whether a row is done, too, once KL(q‖p°) ≤ ``tol`` is proved, p° the optimum.
        moments_hold: whether a row is done only once its p has the moments of all members of infinite trust, to
            ``MOMENT_TOLERANCE`` (1e-6) in Euclidean length.

    Attributes:
        alpha, gamma: α_i = min(1, ρ_i) and γ_i = min(1, 1/ρ_i), each (n,), in the dtype of ``log_q``.
        scale: α_i repeated for each coordinate of ν, (D,).
        price: ρ_i, with 0 in place of infinity, (n,): the factor of KL(r_i‖p̂_i) if r_i can differ from p̂_i.
        exact: whether ρ_i is infinite, (n,).
        widths, places: how many coordinates ν_i has (the rank of Q_i), and their slice of ν; n of each.
        eps: the coarsest unit round-off among ``log_q`` and the products with heads.
        read: the number of columns of all W_i together: the entries of all heads for one token.
    """

    log_q: Float[Tensor, "B v"]
    log_p: Float[Tensor, "B n v"]
    heads: tuple[WhitenedHead, ...]
    trust: tuple[float, ...]
    tol: float
    start: Float[Tensor, "B D"] | None = None
    pool_may_answer: bool = False
    moments_hold: bool = False
    alpha: Float[Tensor, " n"] = field(init=False)
    gamma: Float[Tensor, " n"] = field(init=False)
    price: Float[Tensor, " n"] = field(init=False)
    exact: Bool[Tensor, " n"] = field(init=False)
    scale: Float[Tensor, " D"] = field(init=False)
    widths: list[int] = field(init=False)
    places: list[slice] = field(init=False)
    eps: float = field(init=False)
    read: int = field(init=False)

    def __post_init__(self) -> None:
        rho = self.log_q.new_tensor(self.trust)
        self.alpha, self.gamma, self.exact = rho.clamp_max(1.0), (1 / rho).clamp_max(1.0), rho.isinf()
        self.price = rho.masked_fill(self.exact, 0.0)
        self.widths, self.places, self.eps, self.read = [], [], torch.finfo(self.log_q.dtype).eps, 0
        for h in self.heads:
            start = sum(self.widths)
            self.widths.append(h.rank)
            self.places.append(slice(start, start + h.rank))
            self.eps = max(self.eps, torch.finfo(h.dtype).eps)
            self.read += h.head.d
        self.scale = self.spread(self.alpha)

    def take(self, rows: Int[Tensor, " k"]) -> Projection:
        """Return the projections of the rows with the indices ``rows``, (k,), of this batch.

        Their heads share the counters of reads with this batch's (:meth:`passes`).
        """
        heads = tuple(h.take(rows) for h in self.heads)
        start = None if self.start is None else self.start[rows]
        return replace(self, log_q=self.log_q[rows], log_p=self.log_p[rows], heads=heads, start=start)

    def passes(self) -> Float[Tensor, " B"]:
        """Return how often all heads were read for each row since ``heads`` were made, (B,).

        Reads through this batch and through every :meth:`take` of it count. The result is the number of entries of
        [W_1 | … | W_n] that were read, divided by the number of all its entries.
        """
        total = torch.zeros_like(self.log_q[:, 0])
        for h in self.heads:
            total += h.rows_read[h.at] * h.head.d
        return total / self.read / self.log_q.shape[-1]

    def spread(self, x: Shaped[Tensor, "*b n"]) -> Shaped[Tensor, "*b D"]:
        """Repeat each member's value in ``x``, (…, n), once per coordinate of its dual variables; return (…, D)."""
        return x.repeat_interleave(torch.tensor(self.widths, device=x.device), dim=-1)

    def unwhitened(self, g: Float[Tensor, "B D"]) -> Float[Tensor, "B _"]:
        """Convert a gradient in the dual variables ν, (B, D), to the heads' own coordinates, (B, Σ columns of W_i).

        The blocks of the result are R_i⁻ᵀ g_i, where Q_i = (W_i - 1c_iᵀ) R_i is member i's whitened head.
        """
        parts = g.split(self.widths, dim=-1)
        found = [x.double() @ h.whitening.inverse for h, x in zip(self.heads, parts, strict=True)]
        return torch.cat(found, dim=-1).to(g)

    def whitened(self, x: Float[Tensor, "B _"]) -> Float[Tensor, "B D"]:
        """Convert a displacement in the heads' own coordinates, (B, Σ columns of W_i), to one of ν, (B, D).

        The blocks of the result are R_i⁻¹ x_i, where Q_i = (W_i - 1c_iᵀ) R_i is member i's whitened head.
        """
        parts = x.split([h.head.d for h in self.heads], dim=-1)
        found = [y.double() @ h.whitening.inverse.T for h, y in zip(self.heads, parts, strict=True)]
        return torch.cat(found, dim=-1).to(x)

    def single(self) -> Projection:
        """Return the same problem with ``log_q``, ``log_p`` and ``start`` in fp32; the heads are the same objects."""
        start = None if self.start is None else self.start.float()
        return replace(self, log_q=self.log_q.float(), log_p=self.log_p.float(), start=start)

    def scores(self, nu: Float[Tensor, "B D"]) -> Float[Tensor, "B n v"]:
        """Return the scores z_i = Q_i ν_i, (B, n, v), of dual variables ``nu``, by one pass over all heads."""
        parts = zip(self.heads, nu.split(self.widths, dim=-1), strict=True)
        return torch.stack([h.scores(part) for h, part in parts], dim=1)

    def moments(self, x: Float[Tensor, "B n v"]) -> Float[Tensor, "B D"]:
        """Return α_i Q_iᵀ x_i for every member i, concatenated to (B, D), by one pass over all heads.

        α_i = min(1, ρ_i). With x_i = p - r_i, the answer less the corrected member, this is the gradient of the dual
        function.
        """
        parts = zip(self.alpha, self.heads, x.unbind(1), strict=True)
        return torch.cat([alpha * h.moments(one)[0] for alpha, h, one in parts], dim=-1)

    def exactly(
        self, rows: Bool[Tensor, " B"], log_p: Float[Tensor, "B v"], log_r: Float[Tensor, "B n v"]
    ) -> Bool[Tensor, " B"]:
        """Return those of ``rows`` whose answer has the moments that ``moments_hold`` asks for; all without that.

        If it asks for moments, all heads are read once in those rows.

        Args:
            rows: a mask of the rows to look at.
            log_p, log_r: log-probabilities of the answer and of the corrected members, in nats.
        """
        if not self.moments_hold or not rows.any():
            return rows
        some = rows.nonzero().squeeze(-1)
        off = self.exact_part(self.take(some).moments(log_p[some, None].exp() - log_r[some].exp())).norm(dim=-1)
        return rows.index_copy(0, some, off <= MOMENT_TOLERANCE)

    def tilt(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, "B v"]:
        """Return the term that the scores ``z`` add to the pool's log q: Σ_i min(1, ρ_i) z_i, (B, v), in nats."""
        return (self.alpha[:, None] * z).sum(1)

    def pooled(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, "B v"]:
        """Return the answer at the scores ``z``: log p = log q + Σ_i min(1, ρ_i) z_i, normalised, (B, v), in nats."""
        return (self.log_q + self.tilt(z)).log_softmax(-1)

    def corrected(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, "B n v"]:
        """Return the corrected members at the scores ``z``: log r_i = log p̂_i - γ_i z_i, normalised, in nats.

        γ_i = min(1, 1/ρ_i), so a member of infinite trust is not corrected.
        """
        return (self.log_p - self.gamma[:, None] * z).log_softmax(-1)

    def dual(self, z: Float[Tensor, "B n v"]) -> Float[Tensor, " B"]:
        """Return the dual function f at the scores ``z``, (B,), in nats.

        f = log Σ q exp(Σ_i α_i z_i) + Σ_i ρ_i log Σ p̂_i exp(-γ_i z_i), with α_i = min(1, ρ_i) and γ_i = min(1, 1/ρ_i).
        By weak duality -f is at most the primal optimum.
        """
        own = (self.log_p - self.gamma[:, None] * z).logsumexp(-1)
        return self.value((self.log_q + self.tilt(z)).logsumexp(-1), own, z)

    def value(
        self, joint: Float[Tensor, " B"], own: Float[Tensor, "B n"], z: Float[Tensor, "B n v"]
    ) -> Float[Tensor, " B"]:
        """Return the dual function f, (B,), in nats, from normalisers that are known; :meth:`dual` has the formula.

        Args:
            joint: log Σ_j q_j exp(Σ_i α_i z_ij), (B,).
            own: log Σ_j p̂_ij exp(-γ_i z_ij), (B, n); unused for members of infinite trust.
            z: the scores; used for members of infinite trust.
        """
        for i, rho in enumerate(self.trust):
            part = -(self.log_p[:, i].exp() * z[:, i]).sum(-1) if math.isinf(rho) else rho * own[:, i]
            joint = joint + part
        return joint

    def pool_gap(self) -> Float[Tensor, " B"]:
        """Return Σ_i ρ_i KL(q‖p̂_i), (B,), in nats: an upper bound on the gap f(0) - min f of the pool q, at ν = 0.

        It is the primal objective at p = r_i = q, and f(0) - min f is the least value of that objective. It is inf if
        some member of infinite trust differs from q. No head is read.
        """
        return self.objective(self.log_q)

    def objective(self, log_p: Float[Tensor, "B v"]) -> Float[Tensor, " B"]:
        """Return KL(p‖q) + Σ_i ρ_i KL(p‖p̂_i), (B,), in nats: the primal objective at r_i = p, for given log p.

        Added to the dual function anywhere it bounds KL(p‖p°). It is inf if some member of infinite trust differs from
        p. No head is read.
        """
        divergence = kl(log_p[:, None].expand_as(self.log_p), self.log_p)
        own = torch.where(divergence > 0, divergence * divergence.new_tensor(self.trust), 0.0).sum(-1)
        return own + kl(log_p, self.log_q)

    def rounding(
        self, p: Float[Tensor, "B v"], r: Float[Tensor, "B n v"], z: Float[Tensor, "B n v"], nu: Float[Tensor, "B D"]
    ) -> Float[Tensor, " B"]:
        """Estimate by how much rounding of the scores can have moved the dual value, up or down, (B,), in nats.

        The estimate is ``eps`` times the mean size of the terms α_i z_i that scores add to log-probabilities, under p
        and r_i, plus the rounding of what centring of the heads subtracts from the scores.

        Args:
            p, r: the answer and the corrected members at ``z`` or at a nearby point, as probabilities.
            z: the scores.
            nu: the dual variables whose scores ``z`` are.
        """
        tilts = self.alpha[:, None] * z
        total = self.eps * ((p * tilts.sum(1).abs()).sum(-1) + (r * tilts.abs()).sum((-1, -2)))
        for alpha, h, part in zip(self.alpha, self.heads, nu.split(self.widths, dim=-1), strict=True):
            # Centring subtracts this from the scores, whose rounding stays.
            lost = (h.raw(part)[0].abs() @ h.whitening.center.abs()).to(total)
            total = total + alpha * torch.finfo(h.dtype).eps * lost
        return total

    def exact_part(self, nu: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return ``nu``, (B, D), with 0 in the coordinates of members whose trust is finite."""
        return nu * self.spread(self.exact)

    def excludes(
        self, z: Float[Tensor, "B n v"], nu: Float[Tensor, "B D"], size: Float[Tensor, " B"]
    ) -> Bool[Tensor, " B"]:
        """Return the rows, a mask (B,), in which ν proves that no p has the moments of the members of infinite trust.

        That is a Farkas proof: Σ_i (z_ij - E_{p̂_i} z_i) < -δ |ν| for every token j in the support of the pool, where
        the sum and |ν| take only members with ρ_i = ∞, and δ is ``SEPARATED``. Then no p on that support has moments
        closer than δ to theirs.

        Args:
            z: the scores of ``nu``.
            nu: dual variables, (B, D), or the difference of two; without a member of infinite trust no row is excluded.
            size: (B,), the largest absolute score from which ``z`` was computed, in nats; 64 ``eps`` times it is added
                to the margin δ |ν| as an allowance for rounding.
        """
        part = z[:, self.exact]
        centred = (part - (self.log_p[:, self.exact].exp() * part).sum(-1, keepdim=True)).sum(1)
        highest = torch.where(self.log_q.isneginf(), -torch.inf, centred).amax(-1)
        margin = 64 * self.eps * size + SEPARATED * self.exact_part(nu).norm(dim=-1)
        return highest.lt(-margin)


@dataclass(frozen=True, eq=False)
class Point(Batched):
    """The answer, the corrected members and the value of the dual function f of a :class:`Projection` at some scores z.

    With the pool q, α_i = min(1, ρ_i) and γ_i = min(1, 1/ρ_i):

    Attributes:
        z: the scores, (B, n, v).
        p: the answer ∝ q exp(Σ_i α_i z_i), probabilities, (B, v).
        r: the corrected members r_i ∝ p̂_i exp(-γ_i z_i), probabilities, (B, n, v).
        value: f, (B,), in nats.
    """

    z: Float[Tensor, "B n v"]
    p: Float[Tensor, "B v"]
    r: Float[Tensor, "B n v"]
    value: Float[Tensor, " B"]

    @classmethod
    def at(cls, problem: Projection, z: Float[Tensor, "B n v"]) -> Point:
        """Evaluate the answer p, the corrected members r_i and the dual function f at the scores ``z``.

        No head is read. It costs one exponential per entry of ``z``, and one per entry of p.
        """
        p, joint = _softmax(problem.log_q + problem.tilt(z))
        r, own = _softmax(problem.log_p - problem.gamma[:, None] * z)
        return cls(z, p, r, problem.value(joint[..., 0], own[..., 0], z))

    def slope(self, problem: Projection, y: Float[Tensor, "B n v"]) -> Float[Tensor, " B"]:
        """Return the derivative df(ν + t d)/dt of the dual function at t = 0, (B,), in nats per unit of t.

        ``y`` are the scores Q_i d_i of the direction d. It is Σ_i α_i (E_p y_i - E_{r_i} y_i), α_i = min(1, ρ_i), p and
        r_i this point's distributions; negative if f falls along d.
        """
        return (problem.alpha * ((self.p[:, None] - self.r) * y).sum(-1)).sum(-1)

    def logs(self, problem: Projection) -> tuple[Float[Tensor, "B v"], Float[Tensor, "B n v"]]:
        """Return (log p of the answer, (B, v); log r_i of the corrected members, (B, n, v)), in nats.

        They are normalised anew: next to huge scores the normalisers behind p and r have lost the digits that count.
        """
        return problem.pooled(self.z), problem.corrected(self.z)


def _softmax(x: Float[Tensor, "*b v"]) -> tuple[Float[Tensor, "*b v"], Float[Tensor, "*b 1"]]:
    """Return (the softmax of ``x``, the logarithm of its normaliser Σ exp x) over the last dimension."""
    top = x.amax(-1, keepdim=True)
    p = (x - top).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), top + total.log()
