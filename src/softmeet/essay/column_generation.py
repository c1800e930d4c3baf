"""Linear and quadratic programs over the simplex of tokens, by column generation around an interior-point method.

    minimise  cᵀp + ½ |E^{-½}(Gᵀp - g)|²   over p in the simplex

E is diagonal; a constraint with E = 0 is hard, (Gᵀp)_k = g_k, and leaves the sum. An optimum needs few tokens, so a
program over some tokens, the working set, is solved, and all tokens are priced by one read of the heads: for every y,
the optimum is at least min_j (c_j - g_jᵀy) + gᵀy - ½ yᵀE y (Lagrange), and tokens with a c_j - g_jᵀy below the working
set's minimum enter it. A point that is known to satisfy the hard constraints is one more column, so that every program
on the way has a solution (Dantzig and Wolfe 1960).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.essay.interior import Program, interior_point
from softmeet.essay.matrices import MomentMatrix, dense_matrix, stacked
from softmeet.essay.preference import preference
from softmeet.solvers.clock import time_is_over

# The size of the first working set, in tokens: per constraint, and at least.
_PER_CONSTRAINT = 4
_FEWEST = 2048
_ROUNDS = 60
# How many tokens leave, as a share of those that enter, and how many per constraint stay at least.
_LEAVING, _STAYING = 0.9, 2
# Masses below their own reduced cost are zeros that an interior point only approaches. They are set to zero up to this
# sum, each weighted by its effect on the moments.
_ZERO = 1e-9


@dataclass(frozen=True, eq=False)
class SimplexProgram:
    """A linear or quadratic program over the simplex of v tokens: minimise cᵀp + ½ |E^{-½}(Gᵀp - g)|², E diagonal.

    A constraint k with E_kk = 0 is hard, (Gᵀp)_k = g_k, and has no term in the sum. All numbers are fp64. Nothing is
    checked.

    Args:
        columns: G over all tokens, (v, m), such as :attr:`FeasibleSet.tokens`; one of its columns is all ones.
        target: g, (m,), with 1 at ``unit``.
        softness: the diagonal of E, (m,), not negative; 0 for a hard constraint, as the one at ``unit`` must be.
        cost: c, (v,).
        alive: the mask, (v,), of tokens that may have mass, at least one; the others get 0.
        unit: the index of the column of ones, which stands for Σp = 1.
        feasible: a p, (v,), that satisfies the hard constraints and is 0 outside ``alive``; None only if Σp = 1 is the
            only hard constraint.
        weight: numbers, (v,); the first working set has the tokens with the largest of them.
        tol: the gap, in units of the objective, at which to stop.
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

    def preference(self, p: Float[Tensor, " v"]) -> tuple[float, float]:
        """Return (the distance of ``p`` from the hard constraints, the objective there), as points are compared.

        The objective is cᵀp + ½ |E^{-½}(Gᵀp - g)|², the square over soft constraints only; the key is that of
        :func:`~softmeet.essay.preference.preference`.
        """
        soft, off = self.softness > 0, self.columns.sums(p) - self.target
        value = self.cost @ p + 0.5 * (off[soft].square() / self.softness[soft]).sum()
        return preference(float(off[~soft].norm()), float(value))

    def bound(self, reduced: Float[Tensor, " v"], y: Float[Tensor, " m"]) -> float:
        """Return a lower bound on the optimum: min_j (c - G y)_j + gᵀy - ½ yᵀE y, valid for any multipliers ``y``.

        ``reduced`` is c - G y, the reduced costs, (v,), computed for the same ``y``, (m,).
        """
        least = reduced[self.alive].min()
        return float(least + self.target @ y - 0.5 * (self.softness * y.square()).sum())


@dataclass(frozen=True, eq=False)
class Optimum:
    """The last point of :func:`solve_program`, which minimises cᵀp + ½ |E^{-½}(Gᵀp - g)|² over the simplex.

    Attributes:
        p: the solution, probabilities, (v,), fp64; nothing is proved about it, but ``y`` bounds the optimum
            (:meth:`SimplexProgram.bound`).
        y: the multipliers of Gᵀp = g, (m,).
        steps: interior-point steps of the programs over all working sets together.
        reduced: the reduced costs c - G y, (v,): least for the tokens that have mass.
    """

    p: Float[Tensor, " v"]
    y: Float[Tensor, " m"]
    steps: int
    reduced: Float[Tensor, " v"]


def solve_program(program: SimplexProgram, max_steps: int) -> Optimum:
    """Solve a program until its gap is at most its ``tol``, by column generation.

    The optimum over the last working set is returned, or that over an earlier one if it is better by
    :func:`~softmeet.essay.preference.preference`, as it can be if ``max_steps`` or the time ended the last.

    It may end earlier: after 60 working sets, once the working set has every token that may have mass, once no token
    outside it would lower the optimum over it, or once the time is over. Nothing is raised then. Masses so
    small that they are only rounding of 0 are set to 0 at the end.

    Args:
        program: the program.
        max_steps: the most interior-point steps of each program over a working set.
    """
    chosen, steps, best = _first(program), 0, None
    for _ in range(_ROUNDS):
        p, y, taken = _restricted(program, chosen, max_steps)
        steps += taken
        reduced = program.cost - program.columns.times(y)
        key = program.preference(p)
        best = (key, p, y, reduced) if best is None or key <= best[0] else best
        everything = bool((chosen | ~program.alive).all())
        if everything or time_is_over() or key[1] - program.bound(reduced, y) <= program.tol:
            break
        more = _more(program, chosen, reduced)
        if more is None:
            break
        chosen = more
    assert best is not None
    _, p, y, reduced = best
    moved = p * (1 + (program.cost - reduced - program.target @ y).abs())
    order = moved.argsort()
    small = torch.zeros_like(program.alive).index_copy(0, order, moved[order].cumsum(0) < _ZERO)
    p = p.masked_fill(small & (p < reduced - reduced[program.alive].min()), 0.0)
    return Optimum(p / p.sum(), y, steps, reduced)


def _first(program: SimplexProgram) -> Bool[Tensor, " v"]:
    """Return the first working set, a mask (v,): the tokens of largest weight, or all that may have mass if few may.

    The number is 2,048 or, if more, four times that of the constraints; "few" is up to twice that.
    """
    size = max(_FEWEST, _PER_CONSTRAINT * len(program.target))
    if int(program.alive.sum()) <= 2 * size:
        return program.alive.clone()
    weight = torch.where(program.alive, program.weight, -torch.inf)
    return torch.zeros_like(program.alive).index_fill(0, weight.topk(size).indices, True)


def _more(
    program: SimplexProgram, chosen: Bool[Tensor, " v"], reduced: Float[Tensor, " v"]
) -> Bool[Tensor, " v"] | None:
    """Return the next working set, a mask (v,), or None if no token outside ``chosen`` would lower the optimum over it.

    Of the tokens whose reduced cost is below the least in the set those of least reduced cost enter, at most half as
    many as the set has, or 64. Up to 0.9 times as many, those of largest reduced cost, leave, as long as two tokens per
    constraint stay. If it is None, the remaining gap is the interior-point method's own.

    Args:
        program: the program.
        chosen: the working set.
        reduced: the reduced costs c - G y of all tokens.
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
    """Solve the program over the working set ``chosen``; return (p on all tokens, the multipliers, the steps)."""
    tokens = chosen.nonzero().squeeze(-1)
    columns = program.columns if len(tokens) == len(chosen) else dense_matrix(program.columns.rows(tokens))
    cost, feasible = program.cost[tokens], program.feasible
    if feasible is not None and not bool((chosen | ~program.alive).all()):
        columns = stacked(columns, program.columns.sums(feasible)[None])
        cost = torch.cat([cost, (program.cost @ feasible)[None]])
    start = torch.full_like(cost, 1 / len(cost))
    part = Program(columns, program.target, cost, program.softness, start, program.unit)
    found = interior_point(part, max_steps)
    p = torch.zeros_like(program.cost).masked_scatter(chosen, found.x)
    if len(found.x) > len(tokens):
        assert feasible is not None
        p = p + found.x[-1] * feasible
    return p, found.y, found.steps
