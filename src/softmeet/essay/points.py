"""Three points of one row that rules are built from, and the tests that go with them.

They are a point with the nearest moments, the I-projection of a distribution onto given moments, and the only point
with the members' moments. Gᵀp = g is the system of :class:`~softmeet.essay.feasible_set.FeasibleSet`, C its solutions p
≥ 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.essay.column_generation import Optimum, SimplexProgram, solve_program
from softmeet.essay.feasible_set import FeasibleSet
from softmeet.essay.interior import Interior, Program, interior_point
from softmeet.essay.matrices import MomentMatrix, subset
from softmeet.simplex import kl
from softmeet.solvers.linalg import factored
from softmeet.solvers.projection import MOMENT_TOLERANCE, SEPARATED

# The Frank-Wolfe gap to which the nearest p is found: round-off of a squared distance in whitened coordinates.
_FRANK_WOLFE_TOLERANCE = 1e-12
# Probabilities below zero by this much are rounding, of moments that are themselves rounded.
_NEGATIVE = 1e-9
# The rounding of moments, relative to their length.
_ROUNDING = 1e-14


def least_squares_point(row: FeasibleSet, columns: MomentMatrix, target: Float[Tensor, " m"]) -> Optimum:
    """Find a p in the simplex that minimises |Gᵀp - g|²; its multipliers y are g - Gᵀp, but for the last of them.

    Args:
        row: the row's feasible set; only its mask of tokens that may have mass, its members' mean, which orders the
            tokens, and its settings are used.
        columns: G, (v, m), the moments of every token, such as :attr:`FeasibleSet.tokens`; its last column is all ones,
            for the hard constraint Σp = 1.
        target: g, (m,), fp64, the wanted moments, and 1 at the end.
    """
    softness = torch.ones_like(target)
    softness[-1] = 0.0
    program = SimplexProgram(
        columns=columns,
        target=target,
        softness=softness,
        cost=torch.zeros_like(row.log_q),
        alive=row.alive,
        unit=len(target) - 1,
        feasible=None,
        weight=row.log_mean,
        tol=_FRANK_WOLFE_TOLERANCE * (1 + float(target.square().sum())),
    )
    return solve_program(program, row.problem.settings.max_steps)


def separating_multipliers(row: FeasibleSet) -> Float[Tensor, " m"] | None:
    """Return multipliers y, (m,), of Gᵀp = g that prove the feasible set empty; None if none were found.

    y = g - Gᵀp, the members' whitened moments less those of the p in the simplex with the nearest ones, in Euclidean
    distance; the last entry is 0. At that p yᵀ(g_j - g) ≤ -|y|² for every token j, g_j its moments, up to the accuracy
    of p; :func:`proves_empty` checks it.
    """
    y = -row.excess(least_squares_point(row, row.tokens, row.target).p)
    y[-1] = 0.0
    return y if proves_empty(row, y) else None


def proves_empty(row: FeasibleSet, y: Float[Tensor, " m"]) -> bool:
    """Return whether multipliers ``y``, (m,), of Gᵀp = g are a Farkas proof that no p has the members' moments.

    They are if yᵀ(g_j - g) < -δ|y| for every token j that may have mass, g_j and g being the moments of token j and of
    the members, and δ = 1e-7 (``SEPARATED``). The last entry of ``y``, for Σp = 1, does not count. A smaller margin may
    be rounding, if heads share directions.
    """
    return bool(row.scores(y)[row.alive].max() < -SEPARATED * y[:-1].norm())


def moments_hold(row: FeasibleSet, p: Float[Tensor, " v"]) -> bool:
    """Return whether ``p`` has the members' moments and sums to 1: |Gᵀp - g| ≤ ``MOMENT_TOLERANCE``, which is 1e-6.

    Gᵀp - g (:meth:`FeasibleSet.excess`) holds the differences of all whitened moments and of the sum.
    """
    return float(row.excess(p).norm()) <= MOMENT_TOLERANCE


def columns_of(row: FeasibleSet, tokens: Bool[Tensor, " v"]) -> MomentMatrix:
    """Return the rows of the matrix of ``row.system`` for ``tokens``, a mask, in the order of their ids."""
    ids = tokens.nonzero().squeeze(-1)
    return row.system[0] if len(ids) == len(tokens) else subset(row.system[0], ids, len(tokens))


def can_move(columns: MomentMatrix, tokens: Bool[Tensor, " v"]) -> bool:
    """Return whether masses of ``tokens``, a mask, can change and keep their moments: their rows of G are dependent."""
    G = columns.rows(tokens.nonzero().squeeze(-1))
    return len(G) > G.shape[1] or int(torch.linalg.matrix_rank(G, rtol=1e-9)) < len(G)


def interior_masses(
    row: FeasibleSet,
    tokens: Bool[Tensor, " v"],
    target: Float[Tensor, " r"],
    start: Float[Tensor, " k"],
    **terms: Tensor,
) -> tuple[Float[Tensor, " v"], Interior]:
    """Find masses of ``tokens`` with given moments by interior points, without a linear cost.

    Args:
        row: the row's feasible set; its system and the setting ``max_steps``, the most steps, are used.
        tokens: the mask, (v,), of the k tokens that may have mass.
        target: the wanted moments, in the coordinates of ``row.system``.
        start: masses of those tokens to begin from, positive.
        terms: ``upper``, ``barrier`` and ``reference`` of :class:`Program`, (k,) each.

    Returns:
        (the masses, (v,), 0 outside ``tokens``; the point of the interior-point method).
    """
    unit = len(target) - 1
    nothing, hard = torch.zeros_like(start), torch.zeros_like(target)
    program = Program(columns_of(row, tokens), target, nothing, hard, start, unit, **terms)
    found = interior_point(program, row.problem.settings.max_steps)
    return torch.zeros_like(row.log_q).masked_scatter(tokens, found.x), found


def entropic_projection(
    row: FeasibleSet, tokens: Bool[Tensor, " v"], reference: Float[Tensor, " v"], target: Float[Tensor, " m"]
) -> tuple[Float[Tensor, " v"], Float[Tensor, " m"], int]:
    """Find the p on ``tokens`` with the moments ``target`` that minimises KL(p‖``reference``), by interior points.

    Args:
        row: the row's feasible set; its matrix G and the setting ``max_steps``, the most steps, are used.
        tokens: the mask, (v,), of tokens that may have mass in p, all of them in ``row.alive``.
        reference: the distribution to project, as probabilities, (v,); values below the square of the dtype's ``eps``
            are lifted to that.
        target: the wanted whitened moments, (m,), and 1 at the end, for Σp.

    Returns:
        (p, probabilities, (v,), 0 outside ``tokens``; the multipliers y, (m,), 0 at the end, with which p is nearly
        proportional to ``reference`` · exp(G y) on ``tokens``; the number of steps). Nothing is proved about p.
    """
    # A reference that underflows is lifted to this mass, which is too small to matter.
    start = reference[tokens].clamp_min(torch.finfo(reference.dtype).eps ** 2)
    p, found = interior_masses(row, tokens, target @ row.joint, start, reference=start)
    return p / p.sum(), _without_sum(row.joint @ found.y), found.steps


def moments_repaired(row: FeasibleSet, p: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
    """Return ``p`` changed so that it has the members' moments up to round-off, with the least Σ_j (change_j)² / p_j.

    The change is made twice, the second time for the rounding of the first. One that would make a probability negative,
    or would not bring the moments nearer to the members', is not made: then ``p`` keeps the moments that it has. ``p``,
    probabilities, (v,), fp64, is not changed in place.
    """
    for _ in range(2):
        columns, target = row.system
        solve = factored(columns.gram(p))
        if solve is None:
            break
        moved = p * (1 - columns.times(solve(columns.sums(p) - target)))
        if bool((moved < 0).any()) or float(row.excess(moved).norm()) >= float(row.excess(p).norm()):
            break
        p = moved
    return p


def with_what_is_left(row: FeasibleSet, p: Float[Tensor, " v"]) -> tuple[Float[Tensor, " v"], float]:
    """Return :func:`moments_repaired`, and how far its moments still are from the members'; 0 if that is rounding."""
    repaired = moments_repaired(row, p)
    left = float(row.excess(repaired).norm())
    return repaired, left if left > _ROUNDING * (1 + float(row.target.norm())) else 0.0


def exact_gap(row: FeasibleSet, log_p: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> float:
    """Return a bound on the gap of ``log_p`` as an I-projection, in nats: KL(p̃‖p) for a p̃ with almost exact moments.

    p̃ is p as :func:`moments_repaired` returns it, and |Gᵀp̃ - g| · |y| is added for the remaining error of its moments.
    It is a bound on KL(p°‖p), p° the I-projection of the pool onto the feasible set, if p is the pool tilted by y.

    Args:
        row: the row's feasible set.
        log_p: log p in nats, (v,).
        y: the multipliers of Gᵀp = g, (m,), with which log p = log q + G y up to a constant, q the pool.
    """
    repaired = moments_repaired(row, log_p.exp())
    return float(kl(repaired.log(), log_p)) + float(row.excess(repaired).norm() * y.norm())


def unique_feasible_point(row: FeasibleSet) -> tuple[Float[Tensor, " v"] | None, Float[Tensor, " m"]]:
    """Find the only distribution with the members' moments, or a Farkas proof that there is none.

    With G = [Q_1 | … | Q_n | 1], (v, m), and g, (m,), the members' moments and 1, ``row.unique`` must be True, which is
    not checked: G has as many independent columns as there are tokens that may have mass, so that Gᵀp = g has at most
    one solution. If it has none, the residual e of g on the range of Gᵀ proves it: G e = 0 and gᵀe = |e|² > 0. If its
    solution has a p_j < 0, the y with (G y)_j = -1, and 0 at all other tokens, proves that no p ≥ 0 has these moments:
    gᵀy = -p_j > 0.

    Returns:
        (p, zeros), p the probabilities, (v,); or (None, y), y the multipliers, (m,), with G y ≤ gᵀy - δ for some δ > 0,
        the proof; or (None, zeros) if neither was found. The zeros are a tensor, (m,).
    """
    ids = row.alive.nonzero().squeeze(-1)
    G, g = row.tokens.rows(ids), row.target
    inverse = torch.linalg.pinv(G, rtol=1e-9)
    signed = g @ inverse
    for _ in range(2):  # again for the rounding of the first
        signed = signed + (g - signed @ G) @ inverse
    e = g - signed @ G
    nothing = torch.zeros_like(g)
    tolerance = max(_NEGATIVE, 64 * torch.finfo(row.problem.dtype).eps)
    off, negative = float(e.norm()) > 1e3 * tolerance, float(signed.min()) < -tolerance
    p = torch.zeros_like(row.log_q).index_copy(0, ids, signed.clamp_min(0.0))
    p = p / p.sum()
    if not (off or negative) or float(row.excess(p).norm()) <= MOMENT_TOLERANCE:
        return p, nothing
    y = _without_sum(e if off else -inverse[:, int(signed.argmin())])
    if not proves_empty(row, y):
        nearer = separating_multipliers(row)
        return None, nothing if nearer is None else nearer
    return None, y


def distance_to_unique(row: FeasibleSet, p: Float[Tensor, " v"]) -> float:
    """Return a bound on |p - p°|, p° the only distribution with the members' moments; inf if there is none.

    It is the error of the moments of ``p``, with their rounding, divided by the least singular value of G.
    ``row.unique`` must be True, which is not checked.
    """
    ids = row.alive.nonzero().squeeze(-1)
    G = row.tokens.rows(ids)
    rounding = torch.finfo(G.dtype).eps * (1 + float(row.target.norm()))
    least = float(torch.linalg.svdvals(G)[len(ids) - 1])
    return (float(row.excess(p).norm()) + rounding) / least if least else torch.inf


def _without_sum(y: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Return a copy of multipliers ``y`` with 0 for the last, of Σp = 1, which adds the same to every token's G y."""
    y = y.clone()
    y[-1] = 0.0
    return y
