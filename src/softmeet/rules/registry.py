"""Every rule, in the order in which they are documented. A new rule is one file and one line here."""

from __future__ import annotations

from softmeet.errors import InvalidInputError
from softmeet.rules.base import Rule
from softmeet.rules.least_squares import LeastSquares
from softmeet.rules.meet import MaxEntropy, Meet
from softmeet.rules.min_cross_entropy import MinCrossEntropy
from softmeet.rules.min_reverse_cross_entropy import MinReverseCrossEntropy
from softmeet.rules.min_squared_cross_entropy import MinSquaredCrossEntropy
from softmeet.rules.min_underestimation import MinUnderestimation
from softmeet.rules.pools import LogitMean, OneHot, ProbMean

RULES: tuple[Rule, ...] = (
    Meet(),
    MaxEntropy(),
    LeastSquares(),
    MinCrossEntropy(),
    MinSquaredCrossEntropy(),
    MinUnderestimation(),
    MinReverseCrossEntropy(),
    LogitMean(),
    ProbMean(),
    OneHot(),
)


def find_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        InvalidInputError: there is none.
    """
    for rule in RULES:
        if rule.name == name:
            return rule
    raise InvalidInputError(f"unknown rule {name!r}: expected one of {', '.join(r.name for r in RULES)}")
