"""The settings by which members are combined, as rules, gates and solvers read them: checked values.

How users give them, as texts and by names, is in :mod:`softmeet.rules.settings`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field

from softmeet.errors import InvalidInputError
from softmeet.rules.frozen import Frozen

Pool = Literal["logit-mean", "prob-mean"]
OnInfeasible = Literal["meet", "raise"]
POOLS: tuple[Pool, ...] = get_args(Pool)
# Small enough to cost little if members err beyond their narrow heads; `softmeet fit` chooses better ones from text.
DEFAULT_TRUST = 0.3
# Weights that go by members' sizes, which are known once an ensemble is loaded.
BY_SIZE = "auto"
# Short names that a rule's text may use for fields.
SHORT = {"temperature": "rule_temperature"}


def _numbers(value: Any) -> Any:
    """Convert a number, or a list, array or tensor of numbers on any device, to a float or a tuple of floats."""
    if value is None:
        return None
    import numpy as np  # late, so that `--help` does not wait for it

    value = value.detach().cpu().numpy() if hasattr(value, "detach") else value
    try:
        array = np.asarray(value, dtype=np.float64)
    except OverflowError:
        raise InvalidInputError("to be numbers that a float can hold, got an integer that is larger") from None
    except (TypeError, ValueError):
        raise InvalidInputError(f"to be a number or a list of numbers, got {value!r}") from None
    if array.ndim > 1:
        raise InvalidInputError(f"to be a number or a list of numbers, got an array of shape {array.shape}")
    # A single number in an array serves every member, as a bare one does; in a list it is the list of one member.
    bare = array.ndim == 0 or (array.size == 1 and not isinstance(value, list | tuple))
    return float(array.reshape(-1)[0]) if bare else tuple(array.tolist())


def _weights(value: Any) -> Any:
    return value if isinstance(value, str) and value == BY_SIZE else _numbers(value)


def _count(value: Any) -> Any:
    """Convert an integer of any type, or its text, to an int of at least 1; return None for None."""
    if value is None:
        return None
    try:
        found = 0 if isinstance(value, bool) else operator.index(int(value) if isinstance(value, str) else value)
    except (TypeError, ValueError):
        found = 0
    if found < 1:
        raise InvalidInputError(f"to be an integer of at least 1, got {value!r}")
    return found


def _trusts(value: Any) -> Any:
    found = _numbers(value)
    if not all(rho >= 0 for rho in ([found] if isinstance(found, float) else found)):
        raise InvalidInputError(f"expected trusts from 0 to inf, got {found}")
    return found


Count = Annotated[int, BeforeValidator(_count)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SettingValues(Frozen):
    """The values of all settings by which n members are combined, which never change.

    Rules read them in :class:`~softmeet.rules.problem.Problem`, where they are those of :meth:`for_members`.

    Attributes:
        rule: the :class:`softmeet.Rule`; of any type here, since rules themselves read these values.
        gate: the :class:`~softmeet.rules.gates.Gate`; None for none.
    """

    rule: Any
    trust: Annotated[float | tuple[float, ...], BeforeValidator(_trusts)] = DEFAULT_TRUST
    """How far meet may move the average towards the members, one number or one for each with commas between: 0 is not
    at all; inf is full agreement, within tol: the mean of the rows of each member's head (output layer) is then the
    same as under its own prediction.
    """
    weights: Annotated[tuple[float, ...] | float | Literal["auto"] | None, BeforeValidator(_weights)] = None
    """How much each model counts, in their order, as in 0.3,0.7 or 1,1. Left out, an average goes by size (numbers of
    parameters), where it is known; by other rules, and over a union, all count the same. auto goes by size with any
    rule. For the rule logit-mean weights may be below 0, as in 1.5,-0.5.
    """
    pool: Pool = "logit-mean"
    """The average that a rule starts from: logit-mean (of logits) or prob-mean (of probabilities)."""
    tol: Positive = 1e-3
    """How far the computed distribution may be from the rule's exact one, in nats of KL divergence."""
    max_steps: Count = 50
    """The most steps of the solver. Where more are needed, the best distribution found is used, and counted as
    NOT_CONVERGED in the output.
    """
    on_infeasible: OnInfeasible = "meet"
    """For rules that need exact agreement, such as max-entropy: where no distribution agrees with all members, meet
    uses the rule meet, and raise stops with an error.
    """
    free_weights: bool = False
    """Use weights as they are, and do not divide them by their sum."""
    rule_temperature: Positive = 1.0
    """The temperature T of the combined distribution, p^(1/T) normalised; temperature in a rule's text."""
    gate: Any = None

    def plain(self) -> dict[str, Any]:
        """Return every setting by name in the types of JSON: rules and gates as text, tuples as lists, inf as "inf"."""
        return {name: _plain(value) for name, value in self}

    def for_members(self, n: int) -> Self:
        """Return a copy for n members, with n weights and n trusts.

        Weights of None become 1/n; unless ``free_weights``, others are divided by their sum. ``trust`` may be a number
        (not a list of one), which serves all members.

        Raises:
            InvalidInputError: if weights are ``"auto"``, or their number or that of trusts does not fit; or a weight is
                not finite, none is positive, or they sum to 0, or, without ``free_weights``, to less.
        """
        weights = checked_weights(self.weights, n, free=self.free_weights)
        return self.model_copy(update={"weights": weights, "trust": checked_trust(self.trust, n)})

    def ungated(self) -> Self:
        """Return a copy without a gate, so that the rule is solved in every row."""
        return self if self.gate is None else self.model_copy(update={"gate": None})

    @property
    def member_trust(self) -> tuple[float, ...]:
        """The n trusts, in nats per nat.

        These settings must be from :meth:`for_members`, which is not checked.
        """
        return self.trust  # type: ignore[return-value]

    @property
    def member_weights(self) -> tuple[float, ...]:
        """The n weights; these settings must be from :meth:`for_members`, which is not checked."""
        return self.weights  # type: ignore[return-value]

    def relaxed(self) -> Self:
        """Return a copy of settings of :meth:`for_members` with infinite trusts replaced by 0.3, for the fallback."""
        trust = tuple([DEFAULT_TRUST if math.isinf(rho) else rho for rho in self.member_trust])
        return self.model_copy(update={"trust": trust})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return "inf" if math.isinf(value) else value
    return value if value is None or isinstance(value, bool | int | str) else str(value)


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
