"""Which of several points answers a row whose solver did not reach the tolerance."""

from __future__ import annotations

from softmeet.solvers.projection import MOMENT_TOLERANCE

# Distances that are equal to so many digits count as equal: more may be rounding.
_DIGITS = 9


def preference(off: float, objective: float) -> tuple[float, float]:
    """Return the key by which points are compared; the least is the best (Deb's feasibility rules).

    Of two points that both have the required moments the one of lower objective is better, a point that has them is
    better than one that has not, and of two that have not the nearer one is better. The pool is always among the points
    compared, so no answer is further from the moments than the pool, or as near and of a higher objective.

    K. Deb, *An efficient constraint handling method for genetic algorithms*, Comput. Methods Appl. Mech. Eng. 186,
    2000.

    Args:
        off: the Euclidean distance of the point's whitened moments, and sum, from the required ones; up to
            ``MOMENT_TOLERANCE`` (1e-6) it counts as none, and only nine digits count, so that rounding decides nothing.
            0 for a rule that requires no moments. NaN counts as inf.
        objective: the rule's objective there, in its unit; NaN counts as inf.

    Example:
        >>> nearer, lower, pool = preference(0.1, 5.0), preference(0.2, 1.0), preference(0.2, 2.0)
        >>> min(nearer, lower, pool) == nearer, min(lower, pool) == lower
        (True, True)
        >>> min(preference(1e-7, 3.0), preference(1e-9, 4.0))
        (1e-06, 3.0)
    """
    return float(f"{max(_known(off), MOMENT_TOLERANCE):.{_DIGITS}g}"), _known(objective)


def _known(x: float) -> float:
    return x if x == x else float("inf")
