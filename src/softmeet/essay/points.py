"""Three points of one row that rules are built from: the nearest, the I-projection, and the only one."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.essay.column_generation import Optimum, SimplexProgram, solve_program
from softmeet.essay.feasible_set import FeasibleSet
from softmeet.essay.interior import Program, interior_point
from softmeet.essay.matrices import MomentMatrix, subset
from softmeet.simplex import kl
from softmeet.solvers.linalg import Factored
from softmeet.solvers.projection import MOMENT_TOLERANCE, SEPARATED

# The Frank-Wolfe gap at which the nearest p is found, of a squared distance in whitened coordinates: round-off there.
_FRANK_WOLFE_TOLERANCE = 1e-12
# Probabilities below zero by this much are rounding, of moments that are themselves rounded.
_NEGATIVE = 1e-9


def least_squares_point(row: FeasibleSet, columns: MomentMatrix, target: Float[Tensor, " m"]) -> Optimum:
    """Find a p in the simplex that minimises |Gᵀp - g|², for columns G that end with the ones."""
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
    """Return multipliers that prove C empty, the negative excess of the nearest p; None if they do not.

    At the nearest p, r = Gᵀp - g has rᵀ(g_j - g) ≥ |r|² for every token j (the Frank-Wolfe gap is zero).
    """
    y = -row.excess(least_squares_point(row, row.tokens, row.target).p)
    y[-1] = 0.0
    return y if proves_empty(row, y) else None


def proves_empty(row: FeasibleSet, y: Float[Tensor, " m"]) -> bool:
    """Say whether multipliers prove that no p has the members' moments, nor any that are all but those.

    That is so if Σ_i λ_iᵀ(a_ij - b_i) < -δ|y| for every token that may be answered, y the whitened multipliers, and δ
    ``SEPARATED``: a smaller margin may be rounding where heads share directions.
    """
    return bool(row.scores(y)[row.alive].max() < -SEPARATED * y[:-1].norm())


def moments_hold(row: FeasibleSet, p: Float[Tensor, " v"]) -> bool:
    """Say whether p has the members' moments."""
    return float(row.excess(p).norm()) <= MOMENT_TOLERANCE


def entropic_projection(
    row: FeasibleSet, tokens: Bool[Tensor, " v"], reference: Float[Tensor, " v"], target: Float[Tensor, " m"]
) -> tuple[Float[Tensor, " v"], Float[Tensor, " m"], int]:
    """Project ``reference`` onto the p on ``tokens`` with moments ``target``; return (p, multipliers, steps)."""
    ids = tokens.nonzero().squeeze(-1)
    columns, target = row.system[0], target @ row.joint
    columns = columns if len(ids) == len(tokens) else subset(columns, ids, len(tokens))
    # A reference that underflows keeps its place, at no cost that could be measured.
    start = reference[ids].clamp_min(torch.finfo(reference.dtype).eps ** 2)
    nothing = torch.zeros_like(start)
    program = Program(columns, target, nothing, torch.zeros_like(target), start, len(target) - 1, reference=start)
    found = interior_point(program, row.problem.settings.max_steps)
    p = torch.zeros_like(reference).index_copy(0, ids, found.x)
    return p / p.sum(), _without_sum(row.joint @ found.y), found.steps


def moments_repaired(row: FeasibleSet, p: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
    """Repair p's moments to round-off by the smallest change that does it, weighing tokens by 1 / p."""
    for _ in range(2):
        columns, target = row.system
        solve = Factored.of(columns.gram(p))
        if solve is None:
            break
        moved = p * (1 - columns.times(solve(columns.sums(p) - target)))
        if bool((moved < 0).any()) or float(row.excess(moved).norm()) >= float(row.excess(p).norm()):
            break
        p = moved
    return p


def exact_gap(row: FeasibleSet, log_p: Float[Tensor, " v"], dual: tuple[Float[Tensor, " _"], ...]) -> float:
    """Return KL(p̃‖p), a bound on the gap by the feasible p̃ nearest to p; p̃'s excess counts at the dual's price.

    Where nearly all mass is on a few tokens, none but tiny masses can repair moments, and this still finds a bound.
    """
    repaired = moments_repaired(row, log_p.exp())
    return float(kl(repaired.log(), log_p)) + float(row.excess(repaired).norm() * row.whitened(dual).norm())


def unique_feasible_point(row: FeasibleSet) -> tuple[Float[Tensor, " v"] | None, Float[Tensor, " m"]]:
    """Return (p, 0) with the one p that has the members' moments, (None, y) with a proof of none, or (None, 0).

    For rows that are ``unique``: Gᵀp = g has at most one solution. If it has none, g's distance e from the range of Gᵀ
    has G e = 0 and gᵀe = |e|² > 0, and proves it. If its solution has a p_j < 0, the y with G y = -1_j proves that no
    other point is in the simplex.
    """
    ids = row.alive.nonzero().squeeze(-1)
    G, g = row.tokens.rows(ids), row.target
    inverse = torch.linalg.pinv(G, rtol=1e-9)
    signed = g @ inverse
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


def _without_sum(y: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Return the multipliers of the moments alone: that of the sum moves every score by the same."""
    y = y.clone()
    y[-1] = 0.0
    return y
