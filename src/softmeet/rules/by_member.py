"""Weights and trusts of n members: completed from what was given, and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from softmeet.errors import InvalidInputError

# Weights that sum to 1 within the first are left alone; they sum to 0 if their sum is below the second as a share of
# their absolute sum.
_ONE, _ZERO = 1e-6, 1e-9


def checked_weights(weights: Any, n: int, *, free: bool) -> tuple[float, ...]:
    """Return n weights that sum to 1; None stands for 1/n each, and a number for that of a single member.

    Args:
        weights: None, a number or a sequence of numbers; which signs a rule takes is not checked.
        n: the number of members.
        free: whether they stay as they are, and are not divided by their sum.

    Raises:
        InvalidInputError: if there are not n, one is not finite, none is positive, or they sum to 0, or, unless
            ``free``, to less.

    >>> checked_weights([3.0, -1.0], 2, free=False)
    (1.5, -0.5)
    """
    if isinstance(weights, str):
        raise InvalidInputError(
            f"expected weights as numbers here, got {weights!r}, which go by members' sizes: say so as they are loaded"
        )
    values = (1 / max(n, 1),) * n if weights is None else (weights,) if isinstance(weights, float) else tuple(weights)
    if len(values) != n:
        raise InvalidInputError(f"expected one weight per member, {n} in all, got {len(values)}: {list(values)}")
    total, size = sum(values), sum(map(abs, values))
    if not math.isfinite(size):
        raise InvalidInputError(f"expected finite weights with a finite sum, got {list(values)}")
    if n and not any(w > 0 for w in values):
        raise InvalidInputError(f"expected a positive weight, got {list(values)}")
    if n and (abs(total) if free else total) <= _ZERO * size:
        more = "do not sum to 0" if abs(total) <= _ZERO * size else "sum to more than 0"
        raise InvalidInputError(
            f"expected weights that {more}, got {list(values)}: let one be larger, so that they sum to 1, as 1.5 and "
            "-0.5 do"
        )
    return values if free or abs(total - 1) <= _ONE else tuple(value / total for value in values)


def checked_trust(trust: float | Sequence[float], n: int) -> tuple[float, ...]:
    """Return n trusts; one number serves every member.

    Raises:
        InvalidInputError: if there are neither one nor n.
    """
    values = (trust,) * n if isinstance(trust, float) else tuple(trust)
    if len(values) != n:
        raise InvalidInputError(f"expected one trust, or one per member, {n} in all, got {len(values)}: {list(values)}")
    return values
