"""Linear and quadratic programs over the simplex of tokens, by column generation around an interior-point method.

    minimise  cᵀp + ½ |E^{-½}(Gᵀp - g)|²   over p in the simplex,  Gᵀp = g where E = 0

An optimum needs few tokens, so a program over some tokens is solved and all are priced with one read of the heads: for
every y, the optimum is at least min_j (c_j - g_jᵀy) + gᵀy - ½ yᵀE y (Lagrange), and tokens below the minimum over the
working set enter it. A point that is known to satisfy the hard constraints is one more column, so that every program on
the way has a solution (Dantzig and Wolfe 1960).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.essay.interior import Program, interior_point
from softmeet.essay.matrices import MomentMatrix, dense_matrix, stacked

# MomentMatrix to begin with, per constraint, and the fewest that are worth a choice.
_PER_CONSTRAINT = 4
_FEWEST = 2048
_ROUNDS = 60
# The share of the tokens that enter for which others leave, and how many per constraint stay.
_LEAVING, _STAYING = 0.9, 2
# Masses below their own reduced cost are zeros that an interior point only approaches; so much is cut in all, at most,
# of their sum and of what they bring to the multipliers' moments.
_ZERO = 1e-9


@dataclass(frozen=True, eq=False)
class SimplexProgram:
    """One linear or quadratic program over the simplex of tokens: see the module's docstring.

    Args:
        columns: G over all tokens, (v, m); one of its columns is 1 throughout.
        target: g.
        softness: the diagonal of E.
        cost: c, (v,).
        alive: tokens that may have mass.
        unit: the index of the column of ones.
        feasible: a p that satisfies the hard constraints, or None if all but the sum are soft.
        weight: which tokens to try first, the heaviest.
        tol: the gap at which to stop.
    """

    columns: MomentMatrix
    target: Float[Tensor, " m"]
    softness: Float[Tensor, " m"]
    cost: Float[Tensor, " v"]
    alive: Bool[Tensor, " v"]
    unit: int
    feasible: Float[Tensor, " v"] | None
    weight: Float[Tensor, " v"]
    tol: float

    def value(self, p: Float[Tensor, " v"]) -> float:
        """Return the objective at p."""
        soft = self.softness > 0
        off = (self.columns.sums(p) - self.target)[soft]
        return float(self.cost @ p + 0.5 * (off.square() / self.softness[soft]).sum())

    def bound(self, reduced: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> float:
        """Return a lower bound on the optimum, from the reduced costs c - G y."""
        least = reduced[self.alive].min()
        return float(least + self.target @ y - 0.5 * (self.softness * y.square()).sum())


@dataclass(frozen=True, eq=False)
class Optimum:
    """The solution p, the multipliers y, the steps of all programs, and the reduced costs c - G y."""

    p: Float[Tensor, " v"]
    y: Float[Tensor, " m"]
    steps: int
    reduced: Float[Tensor, " v"]


def solve_program(program: SimplexProgram, max_steps: int) -> Optimum:
    """Solve a program to ``tol``, or as well as it gets; callers certify the answer."""
    chosen = _first(program)
    steps = 0
    for _ in range(_ROUNDS):
        p, y, taken = _restricted(program, chosen, max_steps)
        steps += taken
        reduced = program.cost - program.columns.times(y)
        everything = bool((chosen | ~program.alive).all())
        if everything or program.value(p) - program.bound(reduced, y) <= program.tol:
            break
        more = _more(program, chosen, reduced)
        if more is None:
            break
        chosen = more
    moved = p * (1 + (program.cost - reduced - program.target @ y).abs())
    order = moved.argsort()
    small = torch.zeros_like(program.alive).index_copy(0, order, moved[order].cumsum(0) < _ZERO)
    p = p.masked_fill(small & (p < reduced - reduced[program.alive].min()), 0.0)
    return Optimum(p / p.sum(), y, steps, reduced)


def _first(program: SimplexProgram) -> Bool[Tensor, " v"]:
    size = max(_FEWEST, _PER_CONSTRAINT * len(program.target))
    if int(program.alive.sum()) <= 2 * size:
        return program.alive.clone()
    weight = torch.where(program.alive, program.weight, -torch.inf)
    return torch.zeros_like(program.alive).index_fill(0, weight.topk(size).indices, True)


def _more(
    program: SimplexProgram, chosen: Bool[Tensor, " v"], reduced: Float[Tensor, " v"]
) -> Bool[Tensor, " v"] | None:
    """Let the tokens that price out best enter, half as many again at most, and those that price out worst leave.

    As many leave as enter, but a few, as long as the support has room: what is held stays of one size. None where no
    token prices out: what is left of the gap is then the interior point's own.
    """
    size = int(chosen.sum())
    open_to = torch.where(program.alive & ~chosen, reduced, torch.inf)
    best = open_to.topk(min(max(size // 2, 64), int((program.alive & ~chosen).sum())), largest=False)
    found = best.indices[best.values < reduced[chosen].min()]
    if not len(found):
        return None
    room = max(size - int(_LEAVING * len(found)), _STAYING * len(program.target))
    if room < size:
        staying = torch.where(chosen, reduced, torch.inf).topk(room, largest=False).indices
        chosen = torch.zeros_like(chosen).index_fill(0, staying, True)
    return chosen.index_fill(0, found, True)


def _restricted(
    program: SimplexProgram, chosen: Bool[Tensor, " v"], max_steps: int
) -> tuple[Float[Tensor, " v"], Float[Tensor, " m"], int]:
    tokens = chosen.nonzero().squeeze(-1)
    everything = len(tokens) == len(chosen)
    columns: MomentMatrix = program.columns if everything else dense_matrix(program.columns.rows(tokens))
    cost, feasible = program.cost[tokens], program.feasible
    if feasible is not None and not bool((chosen | ~program.alive).all()):
        columns = stacked(columns, program.columns.sums(feasible)[None])
        cost = torch.cat([cost, (program.cost @ feasible)[None]])
    start = torch.full_like(cost, 1 / len(cost))
    found = interior_point(
        Program(columns, program.target, cost, program.softness, start, program.unit), max_steps=max_steps
    )
    p = torch.zeros_like(program.cost).index_copy(0, tokens, found.x[: len(tokens)])
    if len(found.x) > len(tokens):
        assert feasible is not None
        p = p + found.x[-1] * feasible
    return p, found.y, found.steps
