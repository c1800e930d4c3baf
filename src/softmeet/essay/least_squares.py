"""The rule ``least-squares``: the distribution whose moments are nearest to the members', if none has them exactly."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.essay.base import Bounds, Choice, ExactRule
from softmeet.essay.column_generation import Optimum
from softmeet.essay.feasible_set import FeasibleSet
from softmeet.essay.matrices import MomentMatrix, mapped
from softmeet.essay.points import can_move, entropic_projection, least_squares_point, proves_empty
from softmeet.rules.problem import Problem
from softmeet.solvers.clock import time_is_over

# Tokens whose scores are within this share of their spread from the least may have mass at a nearest point.
_FACE = 1e-8
_REPAIRS = 20


class LeastSquares(ExactRule):
    """The rule that minimises Σ_i ‖Q_iᵀ(p - p̂_i)‖² over the simplex: the nearest moments, in whitened coordinates.

    With ``metric="raw"``, Σ_i ‖W_iᵀ(p - p̂_i)‖², the essay's literal form, which depends on the units of the hidden
    states. The nearest moments are unique; of several p with them the I-projection of the pool is taken, so this is
    ``max-entropy`` if the feasible set C is not empty. If C is empty, the excess r = Gᵀp - g proves it, G being [Q_1 |
    … | Q_n] with rows g_j and g the members' moments: rᵀ(g_j - g) ≥ ‖r‖² - gap / 2 for every token j, with the gap of
    Frank and Wolfe (1956). The objective and the gap are squared distances, not nats.
    """

    name = "least-squares"
    summary = "the distribution whose moments are nearest to the members'; gives most tokens probability 0"
    can_assign_zeros = True
    always_answers = True
    metric: Literal["whitened", "raw"] = "whitened"
    """Of the moments' distance: whitened, or raw for ‖Wᵀ(p - p̂)‖."""

    def constrained(self, problem: Problem) -> bool:
        """Return False: the answer need not have the members' moments, only moments as near to them as possible."""
        return False

    def choose(self, row: FeasibleSet, member: Float[Tensor, " v"] | None) -> Choice:
        """Choose the p with the nearest moments: least Σ_i ‖Q_iᵀ(p - p̂_i)‖², or with W_i if ``metric`` is ``raw``.

        Of several such p the I-projection of the pool onto them is chosen. If ``member``, a distribution with the
        members' moments exactly, probabilities, (v,), is not None, it is the choice, with 0 steps. The multipliers of
        the choice are zeros, as :meth:`bounds` uses none. Once the time is over the point that the program reached is.
        """
        if member is not None:
            return Choice(member, torch.zeros_like(row.target), 0)
        T = self._metric(row)
        columns = row.tokens if T is None else mapped(row.tokens, T)
        target = row.target if T is None else row.target @ T
        found = least_squares_point(row, columns, target)
        p, steps = found.p, found.steps
        if not time_is_over():
            solved = _by_algebra(row, columns, target, found)
            p = solved if self._distance(row, solved)[1] < self._distance(row, p)[1] else p
            p, more = _most_entropy(row, columns, p, _face(row, found) | (p > 0))
            steps += more
        return Choice(p, torch.zeros_like(row.target), steps)

    def bounds(self, row: FeasibleSet, p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> Bounds:
        """Bound the squared distance of the moments over the simplex from below, by Frank and Wolfe's gap at ``p``.

        The value is |r|², r being the moments of ``p`` less the members', in the coordinates that ``metric`` names. The
        lower bound is |r|² less that gap, 2(rᵀGᵀp - min_j rᵀg_j), g_j token j's moments, or 0 if that is larger. No
        bound from above is given: ``most`` is inf. ``y`` is not used.
        """
        value, gap = self._distance(row, p)
        return Bounds(value, max(value - gap, 0.0))

    def proof(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> Float[Tensor, " m"]:
        """Return multipliers y, (m,), with yᵀ(g_j - g) < 0 for every token j, which proves C empty; 0 without a proof.

        y = T Tᵀ(g - Gᵀp), g - Gᵀp being the members' whitened moments less those of ``p``. Tᵀ times whitened moments
        are the moments that ``metric`` compares, so T is the identity unless that is ``raw``. Token j runs over those
        that may have mass; the last entry of y, for Σp = 1, is 0.
        """
        y = -self._excess(row, p)[1]
        return y if proves_empty(row, y) else torch.zeros_like(y)

    def _metric(self, row: FeasibleSet) -> Float[Tensor, "m k"] | None:
        """Return the matrix T that maps whitened moments to those that are compared, or None if they are the same."""
        if self.metric == "whitened":
            return None
        T: Tensor = torch.block_diag(*(h.whitening.inverse for h in row.heads), torch.ones_like(row.target[:1, None]))
        return T

    def _excess(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> tuple[Float[Tensor, " k"], Float[Tensor, " m"]]:
        """Return (r, T r): r are the moments of ``p`` less the members', 0 at the end, for Σp, as they are compared."""
        T, r = self._metric(row), row.excess(p)
        r[-1] = 0.0
        return (r, r) if T is None else (r @ T, T @ (r @ T))

    def _distance(self, row: FeasibleSet, p: Float[Tensor, " v"]) -> tuple[float, float]:
        """Return (|r|² at ``p``; Frank and Wolfe's gap there, a bound on how far |r|² is above its least value)."""
        r, y = self._excess(row, p)
        scores = row.tokens.times(y)
        return float(r.square().sum()), 2 * float((p * scores).sum() - scores[row.alive].min())


def _by_algebra(
    row: FeasibleSet, columns: MomentMatrix, target: Float[Tensor, " k"], found: Optimum
) -> Float[Tensor, " v"]:
    """Solve by linear algebra for the masses on the support of ``found``; return the distribution.

    min ‖Σ u_j (g_j - g)‖² + (Σu - 1)² is least at a multiple of the answer. Tokens that would turn negative leave the
    support (Lawson and Hanson 1974); if the time is over before none does, that of ``found`` is returned.
    """
    ids = _positive(row, found).nonzero().squeeze(-1)
    u = found.p[ids]
    for _ in range(_REPAIRS):
        system = columns.rows(ids).T - target[:, None]
        system[-1] = 1.0
        goal = torch.zeros_like(system[:, :1])
        goal[-1] = 1.0
        u = torch.linalg.lstsq(system, goal, driver="gelsd").solution.squeeze(-1)
        if bool((u >= 0).all()):
            break
        if time_is_over():
            return found.p
        ids, u = ids[u > 0], u[u > 0]
    return torch.zeros_like(found.p).index_copy(0, ids, u / u.sum())


def _positive(row: FeasibleSet, found: Optimum) -> Bool[Tensor, " v"]:
    """Return the tokens, a mask (v,), whose masses in ``found`` are positive and not on their way to zero.

    Those are the tokens whose mass exceeds their reduced cost less the least one (strict complementarity).
    """
    return row.alive & (found.p > found.reduced - found.reduced[row.alive].min())


def _face(row: FeasibleSet, found: Optimum) -> Bool[Tensor, " v"]:
    """Return the tokens, a mask (v,), that points with the nearest moments may use: those of least reduced cost.

    These are all tokens if the heads have one column space and their members disagree.
    """
    reduced = found.reduced[row.alive]
    close = found.reduced - reduced.min() <= _FACE * (reduced.max() - reduced.min())
    return row.alive & (close | _positive(row, found))


def _most_entropy(
    row: FeasibleSet, columns: MomentMatrix, p: Float[Tensor, " v"], face: Bool[Tensor, " v"]
) -> tuple[Float[Tensor, " v"], int]:
    """Project the pool onto the points with the moments of ``p``, which have mass only on the tokens ``face``.

    Returns:
        (the distribution, the number of steps).
    """
    if not can_move(columns, face):
        return p, 0
    nearest, _, steps = entropic_projection(row, face, row.log_q.exp(), row.tokens.sums(p))
    kept = float((row.tokens.sums(nearest - p)).norm()) <= _FACE
    return nearest if kept else p, steps
