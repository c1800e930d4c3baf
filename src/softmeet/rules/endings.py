"""Sentences on positions that a rule did not simply solve: how the solver ended there, and what answered instead."""

from __future__ import annotations

from collections.abc import Mapping


def endings(statuses: Mapping[str, int], fallbacks: int, unit: str = "token") -> list[str]:
    """Return a sentence for each status but OPTIMAL, and one on fallbacks; none if every position was solved.

    Args:
        statuses: the number of positions of each :class:`softmeet.Status`, by its name.
        fallbacks: the number of positions with no feasible distribution, which the rule ``meet`` answered.
        unit: what a position is: ``token`` or ``byte``.
    """
    from softmeet.solvers.base import Status

    total = sum(statuses.values())

    def at(count: int) -> str:
        return f"at {'all' if count == total else f'{count:,} of'} {total:,} {unit}s"

    found = [f"{name} {at(count)}: {Status[name]}" for name, count in statuses.items() if count and name != "OPTIMAL"]
    if fallbacks:
        found.append(f"answered by meet {at(fallbacks)}, as no distribution agrees with every member there")
    return found
